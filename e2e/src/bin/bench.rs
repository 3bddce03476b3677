//! The measurements of `e2e/bench`, on node1 of the local cluster with the operator installed: `bench [WHAT]...` with
//! probe, checkpoint, controller.

#![forbid(unsafe_code)]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null and never panics"
)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::scenario::{IMAGE, KIND, Namespace, OPERATOR, document};
use podcheckpoint_e2e::{apply, eventually, get, kubectl, on_node, put_program};
use serde_json::{Value, json};

const NODE: &str = "node1";
const PROGRAMS: &str = "/run/podcheckpoint-test";
/// Rounds of which the median is shown.
const ROUNDS: usize = 3;
/// Memory that the target fills, in MiB.
const SIZES: [u64; 4] = [1, 64, 512, 2048];
/// Objects that have ended, for the controller's memory.
const OBJECTS: usize = 10_000;

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let wants = |what: &str| wanted.is_empty() || wanted.iter().any(|w| w == what);
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let busy: f64 = load.split(' ').next().unwrap_or("0").parse()?;
    if busy > 1.5 {
        eprintln!("WARNING: the load average is {busy}; the numbers will be worse than they should be");
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let mut result = json!({"cores": cores, "load": busy,
        "kernel": on_node(NODE, "uname -r")?.trim(), "criu": on_node(NODE, "criu --version | head -n 1")?.trim()});
    for program in ["probe-fixture", "podcheckpoint-probe"] {
        put_program(NODE, program, PROGRAMS)?;
    }
    if wants("probe") {
        result["probe"] = probe()?;
    }
    if wants("checkpoint") {
        result["checkpoint"] = checkpoint()?;
    }
    if wants("controller") {
        result["controller"] = controller()?;
    }
    std::fs::create_dir_all("target")?;
    std::fs::write("target/bench.json", serde_json::to_vec_pretty(&result)?)?;
    println!("\ntarget/bench.json has the same for programs");
    Ok(())
}

/// Median, least and most.
#[derive(Clone, Copy)]
struct Spread(f64, f64, f64);

impl Spread {
    fn of(mut values: Vec<f64>) -> Result<Self> {
        values.sort_by(f64::total_cmp);
        let (first, last) = (values.first().context("nothing measured")?, values.last());
        let middle = values.get(values.len() / 2).unwrap_or(first);
        Ok(Self(*middle, *first, *last.unwrap_or(first)))
    }

    fn json(self) -> Value {
        json!({"median": self.0, "min": self.1, "max": self.2})
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{:.1} ({:.1}-{:.1})", self.0, self.1, self.2))
    }
}

// --- the probe -----------------------------------------------------------------------------------------------------

/// Milliseconds of a command, and what it printed, measured on the node itself.
fn timed(command: &str) -> Result<(f64, String)> {
    let script = format!(
        "b=$(date +%s%N); {command} > /tmp/bench.out 2>&1 < /dev/null; echo $((($(date +%s%N) - b) / 1000)); cat /tmp/bench.out"
    );
    let printed = on_node(NODE, &script)?;
    let (micros, rest) = printed.split_once('\n').context("no time")?;
    Ok((micros.parse::<f64>()? / 1000.0, rest.to_owned()))
}

fn probe() -> Result<Value> {
    println!("\nThe probe, beside strace -p (for 0.2 s) and criu check; milliseconds, median (min-max) of 9");
    println!(
        "{:>8} {:>22} {:>24} {:>22} {:>22}",
        "threads", "probe", "longest pause, us", "strace -p", "criu check"
    );
    let mut rows = Vec::new();
    for threads in [1, 10, 100, 1000] {
        let start = format!(
            "cd {PROGRAMS}; setsid ./probe-fixture target /tmp/bench.progress threads {threads} > /tmp/bench.ready 2>&1 < /dev/null &
             p=$!; until grep -q ready /tmp/bench.ready; do sleep 0.05; done; echo $p"
        );
        let pid = on_node(NODE, &start)?.trim().to_owned();
        let (mut probe, mut pause, mut strace, mut check) = (vec![], vec![], vec![], vec![]);
        for _ in 0..9 {
            let (time, said) = timed(&format!("{PROGRAMS}/podcheckpoint-probe --json --pid {pid}"))?;
            ensure!(said.contains("PtraceWorks"), "{said}");
            probe.push(time);
            pause.push(longest_pause(&said));
            // It is ended by a signal after 0.2 s; what it took beyond that is attaching and detaching.
            let (time, _) = timed(&format!("timeout -s INT 0.2 strace -f -o /dev/null -p {pid}"))?;
            strace.push(time - 200.0);
            check.push(timed("criu check")?.0);
        }
        on_node(NODE, &format!("kill -KILL {pid}"))?;
        let all = [probe, pause, strace, check].map(Spread::of);
        let [probe, pause, strace, check] = all;
        let (probe, pause, strace, check) = (probe?, pause?, strace?, check?);
        println!("{threads:>8} {probe:>22} {pause:>24} {strace:>22} {check:>22}");
        rows.push(
            json!({"threads": threads, "probeMillis": probe.json(), "longestPauseMicros": pause.json(),
            "straceMillis": strace.json(), "criuCheckMillis": check.json()}),
        );
    }
    let bytes = on_node(NODE, &format!("stat -c %s {PROGRAMS}/podcheckpoint-probe"))?;
    println!("The probe is {} bytes.", bytes.trim());
    Ok(json!({"rows": rows, "bytes": bytes.trim()}))
}

/// The probe's own measure: a detached thread's value is how long it stood still.
fn longest_pause(said: &str) -> f64 {
    let events = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let detached = events.filter(|e| e["on"] == "Target" && e["step"] == "Detach");
    detached
        .filter_map(|e| e["end"]["done"].as_f64())
        .fold(0.0, f64::max)
}

// --- checkpoints ---------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Way {
    OperatorCri,
    OperatorDirect,
    Kubelet,
    Runc,
}

/// One target that fills memory and notes when it stood still.
struct Subject {
    namespace: Namespace,
    container: String,
    /// Its notes, on the node.
    notes: String,
}

impl Subject {
    fn new(mebibytes: u64) -> Result<Self> {
        let namespace = Namespace::new("bench")?;
        let command = [
            "sh",
            "-c",
            &format!("exec {PROGRAMS}/probe-fixture target /tmp/notes memory {mebibytes}"),
        ]
        .map(str::to_owned);
        namespace.manifest("v1", "Pod", "target", json!({
            "nodeName": NODE, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": command,
                "volumeMounts": [{"name": "programs", "mountPath": PROGRAMS}, {"name": "tmp", "mountPath": "/tmp"}]}],
            "volumes": [{"name": "programs", "hostPath": {"path": PROGRAMS}}, {"name": "tmp", "emptyDir": {}}],
        }))?;
        eventually(Duration::from_secs(120), || {
            let log = kubectl(&["-n", &namespace.0, "logs", "target"])?;
            ensure!(log.starts_with("ready"), "{log:?}");
            Ok(())
        })?;
        let pod = get(&namespace.0, "pod", "target")?;
        let id = pod["status"]["containerStatuses"][0]["containerID"]
            .as_str()
            .unwrap_or_default();
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        Ok(Self {
            container: id.trim_start_matches("containerd://").to_owned(),
            notes: format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/tmp/notes"),
            namespace,
        })
    }

    fn notes(&self) -> Result<Vec<f64>> {
        let text = on_node(NODE, &format!("cat {}", self.notes))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Takes one checkpoint, and removes it; what it took.
    fn take(&self, way: Way, number: usize) -> Result<Taken> {
        let before = self.notes()?.len();
        let written = sectors()?;
        let begun = Instant::now();
        let mut phases = BTreeMap::new();
        match way {
            Way::OperatorCri => phases = self.by_operator("CRI", &format!("cri-{number}"))?,
            Way::OperatorDirect => phases = self.by_operator("Direct", &format!("direct-{number}"))?,
            Way::Kubelet => {
                let path = format!(
                    "/api/v1/nodes/{NODE}/proxy/checkpoint/{}/target/main",
                    self.namespace.0
                );
                kubectl(&["create", "--raw", &path, "-f", "/dev/null"])?;
            }
            Way::Runc => {
                on_node(
                    NODE,
                    &format!(
                        "d=/var/lib/podcheckpoint/bench; mkdir -p $d; runc --root /run/containerd/runc/k8s.io checkpoint \
                     --leave-running --image-path $d/images --work-path $d/work {}",
                        self.container
                    ),
                )?;
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        on_node(NODE, "sync")?;
        let written = sectors()? - written;
        let notes = self.notes()?;
        let frozen = notes
            .get(before..)
            .unwrap_or_default()
            .iter()
            .copied()
            .fold(0.0, f64::max)
            / 1000.0;
        for name in [format!("cri-{number}"), format!("direct-{number}")] {
            kubectl(&[
                "-n",
                &self.namespace.0,
                "delete",
                KIND,
                &name,
                "--ignore-not-found",
            ])?;
        }
        on_node(
            NODE,
            "rm -rf /var/lib/podcheckpoint/bench /var/lib/kubelet/checkpoints/*; sync",
        )?;
        Ok(Taken {
            seconds,
            frozen,
            bytes: written * 512.0,
            phases,
        })
    }

    fn by_operator(&self, method: &str, name: &str) -> Result<BTreeMap<String, f64>> {
        self.namespace
            .checkpoint(name, json!({"sourcePodName": "target", "method": method}))?;
        // A watch, and no asking again and again: what is measured must not be disturbed.
        kubectl(&[
            "-n",
            &self.namespace.0,
            "wait",
            "--for=condition=Ready",
            &format!("{KIND}/{name}"),
            "--timeout=280s",
        ])?;
        let log = kubectl(&[
            "-n",
            OPERATOR,
            "logs",
            "-l",
            "app.kubernetes.io/component=agent",
            "--tail=50",
        ])?;
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of_this = lines.filter(|line| line["fields"]["name"] == name);
        let phases = of_this
            .filter_map(|line| line["fields"]["phases"].as_str().map(str::to_owned))
            .next_back();
        let phases = phases.unwrap_or_default();
        let pairs = phases.split(' ').filter_map(|pair| pair.split_once('='));
        Ok(pairs
            .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
            .collect())
    }
}

struct Taken {
    seconds: f64,
    /// Milliseconds, as the application saw it.
    frozen: f64,
    bytes: f64,
    /// Seconds by phase of the agent.
    phases: BTreeMap<String, f64>,
}

/// Sectors of 512 bytes that were written to the disks of this machine.
fn sectors() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/diskstats")?;
    // Partitions and stacked devices would count twice.
    let disks = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let whole = disks.filter(|f| {
        f.get(2).is_some_and(|name| {
            std::path::Path::new("/sys/block")
                .join(name)
                .join("device")
                .exists()
        })
    });
    Ok(whole
        .filter_map(|fields| fields.get(9)?.parse::<f64>().ok())
        .sum())
}

fn checkpoint() -> Result<Value> {
    println!(
        "\nCheckpoints, apply to Ready (operator) or call to return (others), interleaved; median (min-max) of {ROUNDS}"
    );
    println!(
        "{:>8} {:<16} {:>20} {:>24} {:>14}  phases of the agent, s",
        "MiB", "", "seconds", "frozen, ms", "written/memory"
    );
    let mut rows = Vec::new();
    for mebibytes in SIZES {
        let subject = Subject::new(mebibytes)?;
        // An agent is there, and its caches are warm.
        subject.take(Way::OperatorCri, 999)?;
        let ways = [Way::OperatorCri, Way::OperatorDirect, Way::Kubelet, Way::Runc];
        let mut taken: BTreeMap<Way, Vec<Taken>> = BTreeMap::new();
        for number in 0..ROUNDS {
            for way in ways {
                taken.entry(way).or_default().push(subject.take(way, number)?);
            }
        }
        for (way, all) in &taken {
            let of = |value: fn(&Taken) -> f64| Spread::of(all.iter().map(value).collect());
            let (seconds, frozen, bytes) = (of(|t| t.seconds)?, of(|t| t.frozen)?, of(|t| t.bytes)?);
            let copies = bytes.0 / (mebibytes as f64 * 1024.0 * 1024.0);
            let phases = all.first().map(|t| t.phases.clone()).unwrap_or_default();
            let words: Vec<String> = phases
                .iter()
                .map(|(name, time)| format!("{name} {time:.2}"))
                .collect();
            println!(
                "{mebibytes:>8} {:<16} {:>20} {frozen:>24} {copies:>14.1}  {}",
                format!("{way:?}"),
                format!("{:.2} ({:.2}-{:.2})", seconds.0, seconds.1, seconds.2),
                words.join(", ")
            );
            rows.push(
                json!({"mebibytes": mebibytes, "way": format!("{way:?}"), "seconds": seconds.json(),
                "frozenMillis": frozen.json(), "bytesWritten": bytes.json(), "phaseSeconds": phases}),
            );
        }
    }
    Ok(Value::Array(rows))
}

// --- the controller ------------------------------------------------------------------------------------------------

fn controller() -> Result<Value> {
    let namespace = Namespace::new("bench-many")?;
    let begun = Instant::now();
    let before = controllers_writes()?;
    let (resident, _) = controllers_cost()?;
    for chunk in 0..OBJECTS / 500 {
        let objects = (0..500).map(|number| {
            let name = format!("ended-{chunk}-{number}");
            document(
                &namespace.0,
                "podcheckpoint.dev/v1alpha1",
                "PodCheckpoint",
                &name,
                &json!({"sourcePodName": "missing"}),
            )
        });
        apply(&objects.collect::<Vec<_>>().join("\n---\n"))?;
    }
    eventually(Duration::from_secs(600), || {
        let reasons = kubectl(&[
            "-n",
            &namespace.0,
            "get",
            KIND,
            "-o",
            "jsonpath={.items[*].status.reason}",
        ])?;
        let ended = reasons
            .split(' ')
            .filter(|reason| *reason == "PodNotFound")
            .count();
        ensure!(ended >= OBJECTS / 500 * 500, "{ended} have ended");
        Ok(())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    let writes = (controllers_writes()? - before) / OBJECTS as f64;
    std::thread::sleep(Duration::from_secs(10));
    let (full, ticks) = controllers_cost()?;
    std::thread::sleep(Duration::from_secs(30));
    let (_, later) = controllers_cost()?;
    println!(
        "\nThe controller: {resident:.1} MiB resident, {full:.1} MiB with {OBJECTS} that have ended (all of them in {seconds:.0} s)"
    );
    println!(
        "  idle with them: {:.0} ms of CPU in 30 s; writes for each, events left out: {writes:.2}",
        (later - ticks) * 10.0
    );
    Ok(
        json!({"objects": OBJECTS, "seconds": seconds, "residentMebibytesBefore": resident, "residentMebibytes": full,
        "idleCpuMillisIn30Seconds": (later - ticks) * 10.0, "writesForEach": writes}),
    )
}

/// Resident MiB and clock ticks of 10 ms of the controller.
fn controllers_cost() -> Result<(f64, f64)> {
    let script = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2> /dev/null)\" != podcheckpoint-c ] || \
        { sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' $p/status; cut -d' ' -f14,15 $p/stat; }; done";
    let printed = on_node(NODE, script)?;
    let numbers: Vec<f64> = printed
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    match numbers.as_slice() {
        [kibibytes, user, system] => Ok((kibibytes / 1024.0, user + system)),
        _ => anyhow::bail!("not one controller: {printed}"),
    }
}

/// Writes of the controller that the API server has noted, without events and leases.
fn controllers_writes() -> Result<f64> {
    let count = "cat /var/log/kubernetes/audit*.log | grep -c -E '\"verb\":\"(create|update|patch|delete)\".*serviceaccount:podcheckpoint-system:podcheckpoint-controller.*\"resource\":\"(podcheckpoints|pods|checkpointnodes)\"' || true";
    Ok(on_node(NODE, count)?.trim().parse()?)
}
