//! Real causes for the tests: each is made on the real kernel, and what was made ends with the value.

pub mod guest;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The program that makes them.
pub const FIXTURE: &str = env!("CARGO_BIN_EXE_probe-fixture");
/// The probe.
pub const PROBE: &str = env!("CARGO_BIN_EXE_podcheckpoint-probe");

/// A program of the fixtures that runs; it is ended with the value.
pub struct Running {
    child: Child,
    /// What it said after `ready`: a process.
    pub pid: i32,
}

impl Running {
    fn start(arguments: &[&str]) -> Result<Self> {
        let mut child = Command::new(FIXTURE)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        let pid = line
            .strip_prefix("ready ")
            .with_context(|| format!("{arguments:?} said {line:?}"))?
            .trim()
            .parse()?;
        Ok(Self { child, pid })
    }

    /// Its own number.
    pub fn id(&self) -> i32 {
        self.child.id().cast_signed()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A target that computes, and whose progress can be seen.
pub struct Target {
    pub running: Running,
    progress: PathBuf,
    _folder: tempfile::TempDir,
}

impl Target {
    /// Starts one in a mode of the fixture.
    pub fn start(mode: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // Some of them are other users.
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let progress = folder.path().join("progress");
        let path = progress.to_string_lossy().into_owned();
        let running = Running::start(&[&["target", &path], mode].concat())?;
        Ok(Self {
            running,
            progress,
            _folder: folder,
        })
    }

    pub fn pid(&self) -> i32 {
        self.running.pid
    }

    fn count(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.progress)?;
        let (count, correct) = text.trim().split_once(' ').context("no progress")?;
        ensure!(correct == "true", "its sum is wrong: {text}");
        Ok(count.parse()?)
    }

    /// It computes on, correctly, and nobody of ours traces it.
    pub fn assert_goes_on(&self) -> Result<()> {
        let patience = Duration::from_secs(5);
        let before = eventually(patience, || self.count())?;
        eventually(patience, || {
            let now = self.count()?;
            ensure!(now > before, "it stands at {before}");
            Ok(())
        })
    }

    /// No thread has a tracer.
    pub fn assert_untraced(&self) -> Result<()> {
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid()))?.flatten() {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let traced = status
                .lines()
                .any(|l| l.starts_with("TracerPid") && !l.ends_with("\t0"));
            ensure!(!traced, "traced: {status}");
        }
        Ok(())
    }

    /// State of its first thread.
    pub fn state(&self) -> char {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let state = status.lines().find_map(|l| l.strip_prefix("State:\t"));
        state.and_then(|s| s.chars().next()).unwrap_or('?')
    }
}

/// A cgroup of a test's own; thawed, emptied and removed with the value.
pub struct Cgroup {
    path: PathBuf,
    v1: bool,
}

impl Cgroup {
    /// A new one, `None` where this machine has no such hierarchy.
    pub fn new(v1: bool, name: &str) -> Option<Self> {
        let root = if v1 {
            "/sys/fs/cgroup/freezer"
        } else {
            "/sys/fs/cgroup/unified"
        };
        let v2_only = !v1 && Path::new("/sys/fs/cgroup/cgroup.procs").exists();
        let root = if v2_only { "/sys/fs/cgroup" } else { root };
        let path = Path::new(root).join(format!("probe-test-{name}-{}", std::process::id()));
        Path::new(root).join("cgroup.procs").exists().then_some(())?;
        fs::create_dir_all(&path).ok()?;
        Some(Self { path, v1 })
    }

    /// One below.
    pub fn below(&self) -> Result<Self> {
        let path = self.path.join("below");
        fs::create_dir_all(&path)?;
        Ok(Self { path, v1: self.v1 })
    }

    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    pub fn add(&self, pid: i32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).context("joining a cgroup")
    }

    pub fn freeze(&self) -> Result<()> {
        let (file, value) = if self.v1 {
            ("freezer.state", "FROZEN")
        } else {
            ("cgroup.freeze", "1")
        };
        fs::write(self.path.join(file), value)?;
        eventually(Duration::from_secs(2), || {
            let frozen = if self.v1 {
                fs::read_to_string(self.path.join(file))?.trim() == "FROZEN"
            } else {
                fs::read_to_string(self.path.join("cgroup.events"))?.contains("frozen 1")
            };
            ensure!(frozen, "not frozen");
            Ok(())
        })
    }

    pub fn thaw(&self) {
        let (file, value) = if self.v1 {
            ("freezer.state", "THAWED")
        } else {
            ("cgroup.freeze", "0")
        };
        let _ = fs::write(self.path.join(file), value);
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.thaw();
        let parent = self.path.parent().map(|p| p.join("cgroup.procs"));
        let members = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for (pid, parent) in members.lines().zip(std::iter::repeat(parent)) {
            let _ = parent.map(|parent| fs::write(parent, pid));
        }
        let _ = fs::remove_dir(&self.path);
    }
}

/// What the probe said.
pub struct Answer {
    pub report: Value,
    pub took: Duration,
}

impl Answer {
    /// The root finding.
    pub fn root(&self) -> &Value {
        &self.report["verdict"]["findings"][0]
    }

    pub fn reason(&self) -> &str {
        self.root()["reason"].as_str().unwrap_or_default()
    }

    pub fn evidence(&self) -> &str {
        self.root()["evidence"].as_str().unwrap_or_default()
    }

    pub fn outcome(&self) -> &str {
        self.report["verdict"]["outcome"].as_str().unwrap_or_default()
    }

    /// Reason, words in the evidence, and the limit of two seconds.
    pub fn assert(&self, reason: &str, words: &[&str]) -> Result<()> {
        self.assert_says(reason, words)?;
        ensure!(
            self.took < Duration::from_secs(2),
            "it took {:?}: {:#}",
            self.took,
            self.report
        );
        Ok(())
    }

    /// Reason, and words in the evidence.
    pub fn assert_says(&self, reason: &str, words: &[&str]) -> Result<()> {
        ensure!(
            self.reason() == reason,
            "{} instead of {reason}: {:#}",
            self.reason(),
            self.report
        );
        for word in words {
            ensure!(
                self.evidence().contains(word),
                "no {word:?} in {:?}",
                self.evidence()
            );
        }
        Ok(())
    }
}

/// Runs the probe in a context of the fixture, or in none.
pub fn probe(context: Option<&str>, arguments: &[&str]) -> Result<Answer> {
    let mut command = match context {
        None => Command::new(PROBE),
        Some(context) => {
            let mut command = Command::new(FIXTURE);
            command.args(["under", context, PROBE]);
            command
        }
    };
    let started = Instant::now();
    let output = command
        .arg("--json")
        .args(arguments)
        .stdin(Stdio::null())
        .output()?;
    let took = started.elapsed();
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text
        .lines()
        .last()
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))?;
    let report: Value = serde_json::from_str(last)?;
    ensure!(report["event"] == "report", "no report: {last}");
    record(&test_name(), &report);
    Ok(Answer { report, took })
}

/// The test that runs.
fn test_name() -> String {
    std::thread::current().name().unwrap_or("unnamed").to_owned()
}

/// Keeps what was seen as a case to replay, when asked to by RECORD_CASES; not what is large by its mere number.
pub fn record(name: &str, report: &Value) {
    if report["observations"]["processes"]
        .as_array()
        .is_some_and(|all| all.len() > 4)
    {
        return;
    }
    if std::env::var_os("RECORD_CASES").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/recorded")
            .join(format!("{name}.json"));
        let reason = report["verdict"]["findings"][0]["reason"].clone();
        let case = serde_json::json!({"reason": reason, "observations": report["observations"]});
        let _ = fs::write(path, format!("{case:#}\n"));
    }
}

/// Asks again until the answer is there.
pub fn eventually<T>(limit: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match ask() {
            Err(_) if started.elapsed() < limit => std::thread::sleep(Duration::from_millis(2)),
            answer => return answer,
        }
    }
}

/// Root is needed, or the test says what is missing and is not run.
pub fn can(what: &str, possible: bool) -> bool {
    if !possible {
        eprintln!("SKIPPED: needs {what}");
    }
    possible
}

pub fn is_root() -> bool {
    can(
        "root",
        fs::read_to_string("/proc/self/status").is_ok_and(|s| s.contains("\nUid:\t0\t0")),
    )
}

/// Somebody who traces a thread and stays.
pub fn tracer(tid: i32) -> Result<Running> {
    Running::start(&["trace", &tid.to_string()])
}

/// A machine of its own in which CRIU has written its cache, while the kernel seemed to lack a system call, if one is
/// given. `None` where there is no root file system with CRIU 4; then it has been said.
pub fn criu_cache(missing: Option<i64>) -> Result<Option<Running>> {
    let named = std::env::var_os("PROBE_CRIU_ROOT").map(PathBuf::from);
    let built = || {
        parts()
            .into_iter()
            .find(|part| part.join("usr/sbin/criu").exists())
    };
    let Some(root) = named.or_else(built) else {
        can("a root file system with CRIU 4 in PROBE_CRIU_ROOT", false);
        return Ok(None);
    };
    let missing = missing.map_or("none".into(), |number| number.to_string());
    Running::start(&["criu-cache", &root.to_string_lossy(), &missing]).map(Some)
}

/// What `e2e/cluster` has built.
pub fn parts() -> Vec<PathBuf> {
    let set = std::env::var_os("PODCHECKPOINT_CACHE").map(PathBuf::from);
    let usual = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/podcheckpoint"));
    let folder = set.or_else(usual).unwrap_or_default().join("parts");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The youngest thread of a process.
pub fn last_thread(pid: i32) -> Result<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .max()
        .context("no thread")
}

/// kill(1), by name of the signal.
pub fn signal(pid: i32, name: &str) -> Result<()> {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()?;
    ensure!(status.success(), "kill -{name} {pid}");
    Ok(())
}
