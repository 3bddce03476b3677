//! Snapshots of real QEMU machines, which run without hardware help: what is saved is restored and goes on, the source
//! goes on too, and whatever stands in the way has its reason in time.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod machines;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use machines::{Machine, Wanted, alone, check_archive, skipped, wait_for, words};
use podcheckpoint_agent::sandbox::{SocketPath, VmmKind};
use podcheckpoint_agent::vm::{Handle, by_hand};
use podcheckpoint_crds::Reason;
use serde_json::json;

/// A machine with nothing but firmware: enough for all that happens before anything is saved.
fn firmware(more: &[&str]) -> Option<Machine> {
    Machine::start(&Wanted {
        memory: 64,
        more: more.iter().map(|word| (*word).to_owned()).collect(),
        ..Wanted::default()
    })
}

fn counting(memory: u32, filled: u32) -> Wanted {
    Wanted {
        memory,
        filled: Some(filled),
        ..Wanted::default()
    }
}

/// Saves a counting machine, and restores it beside its source.
fn saved_and_restored(wanted: &Wanted) {
    let Some(source) = Machine::start(wanted) else {
        return;
    };
    let before = source.wait_past(3);
    let folder = source.path("snapshot");
    let output = source.snapshot(&folder, 60).output().unwrap();
    assert!(output.status.success(), "{}", words(&output));
    eprintln!("{} MiB: {}", wanted.memory, words(&output).trim());
    let at = source.wait_past(before);
    source.wait_past(at + 3);
    assert_eq!(source.owner().status(), "running");
    let manifest = check_archive(&folder);
    assert_eq!(
        (&manifest["kind"], &manifest["vmm"]),
        (&json!("VMSnapshot"), &json!("QEMU"))
    );
    assert_eq!(manifest["memoryBytes"], json!(u64::from(wanted.memory) << 20));
    let counted = *source.counted().last().unwrap();
    drop_but_keep(&source, &folder, &|state| {
        let incoming = Some(state.to_owned());
        let restored = Machine::start(&Wanted {
            incoming,
            ..wanted.clone()
        })
        .unwrap();
        let first = wait_for("the restored count", || restored.counted().first().copied());
        assert!(
            first > before && first <= counted,
            "{before} < {first} <= {counted}"
        );
        restored.wait_past(first + 3);
    });
}

/// The source runs while the copy does, so that both are seen to go on.
fn drop_but_keep(source: &Machine, folder: &Path, restore: &dyn Fn(&Path)) {
    restore(&folder.join("vmstate"));
    let last = *source.counted().last().unwrap();
    source.wait_past(last);
}

#[test]
fn a_counter_goes_on_in_a_new_machine_and_in_the_source() {
    let _alone = alone();
    saved_and_restored(&counting(128, 32));
}

#[test]
fn a_gigabyte_of_memory_is_saved_and_restored() {
    let _alone = alone();
    saved_and_restored(&counting(1024, 700));
}

#[test]
fn a_disk_that_the_guest_may_write_to_is_copied_at_the_moment_of_the_memory() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(8 << 20).unwrap();
    fs::write(disk.path(), [b"disk ".as_slice(), &vec![0; 8 << 20]].concat()).unwrap();
    let drive = format!("id=d,file={},format=raw,if=none", disk.path().display());
    let Some(machine) = firmware(&["-drive", &drive, "-device", "virtio-blk-pci,drive=d"]) else {
        return;
    };
    let folder = machine.path("snapshot");
    let output = machine.snapshot(&folder, 60).output().unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let manifest = check_archive(&folder);
    assert_eq!(manifest["disks"][0]["copy"], json!("disk0"), "{manifest}");
    assert!(
        manifest["consistency"]
            .as_str()
            .unwrap()
            .contains("of one moment")
    );
    assert_eq!(
        fs::read(folder.join("disk0")).unwrap(),
        fs::read(disk.path()).unwrap()
    );
}

#[test]
fn a_machine_is_recognised_by_its_process_and_its_sockets() {
    let Some(machine) = firmware(&["-device", "vhost-vsock-pci,guest-cid=7"]).or_else(|| firmware(&[]))
    else {
        return;
    };
    let seen = by_hand::machine(machine.pid()).unwrap();
    assert_eq!(
        (seen.vmm, seen.pid, seen.memory),
        (VmmKind::Qemu, machine.pid(), Some(64 << 20))
    );
    assert_eq!(seen.monitor.unwrap().path, machine.path("monitor.sock"));
}

#[test]
fn a_device_that_cannot_be_saved_is_named_before_anything_is_paused() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let drive = format!("id=d,file={},format=raw,if=none", disk.path().display());
    let Some(machine) = firmware(&["-drive", &drive, "-device", "nvme,drive=d,serial=1"]) else {
        return;
    };
    let stops = watch_for_stop(&machine);
    let said = machine.refused("VmDeviceNotSnapshottable");
    assert!(said.contains("nvme"), "{said}");
    assert!(!stops.seen(), "it was paused");
}

/// Events of the machine, seen by its owner.
struct Stops(UnixStream);

fn watch_for_stop(machine: &Machine) -> Stops {
    let mut stream = UnixStream::connect(machine.path("owner.sock")).unwrap();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
    Stops(stream)
}

impl Stops {
    /// Whether the machine has been told to stop since.
    fn seen(mut self) -> bool {
        use std::io::Read;
        self.0.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let (mut text, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = self.0.read(&mut part) {
            text.extend_from_slice(&part[..count]);
        }
        String::from_utf8_lossy(&text).contains("\"STOP\"")
    }
}

#[test]
fn a_monitor_with_another_client_is_called_busy_within_its_second() {
    let Some(machine) = firmware(&[]) else { return };
    let _client = machines::Monitor::connect(&machine.path("monitor.sock"));
    machine.refused("VmMonitorBusy");
    assert_eq!(machine.owner().status(), "running");
}

#[test]
fn a_machine_that_is_paused_already_is_left_as_it_is() {
    let Some(machine) = firmware(&[]) else { return };
    machine.owner().ask("stop", json!({}));
    let said = machine.refused("VmAlreadyPaused");
    assert!(said.contains("paused"), "{said}");
    assert_eq!(machine.owner().status(), "paused");
}

#[test]
fn a_monitor_whose_process_is_stopped_is_told_from_a_busy_one() {
    let Some(machine) = firmware(&[]) else { return };
    let signal = |name: &str| {
        Command::new("kill")
            .args([name, &machine.pid().to_string()])
            .status()
            .unwrap()
    };
    signal("-STOP");
    let said = machine.refused("VmMonitorFailed");
    signal("-CONT");
    assert!(said.contains("is stopped by a signal"), "{said}");
}

/// A monitor at another socket than the machine's own.
fn handle(machine: &Machine, socket: &Path) -> Handle {
    let seen = Handle::of(&by_hand::machine(machine.pid()).unwrap());
    Handle {
        monitor: Some(SocketPath {
            path: socket.to_owned(),
            // The fake one is served by the test itself.
            owners: vec![machine.pid(), i32::try_from(std::process::id()).unwrap()],
        }),
        ..seen
    }
}

async fn reason(handle: &Handle) -> (Reason, Duration) {
    let begun = Instant::now();
    let error = match handle.open().await {
        Err(error) => error,
        Ok(mut driver) => driver.describe().await.unwrap_err(),
    };
    (error.reason(), begun.elapsed())
}

#[tokio::test]
async fn qemus_monitor_for_people_is_no_qmp() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("people.sock");
    let Some(machine) = firmware(&[
        "-monitor",
        &format!("unix:{},server=on,wait=off", socket.display()),
    ]) else {
        return;
    };
    let (reason, took) = reason(&handle(&machine, &socket)).await;
    assert_eq!(reason, Reason::VmMonitorFailed);
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
async fn a_fake_monitor_that_greets_and_then_says_nothing_is_not_waited_for() {
    let Some(machine) = firmware(&[]) else { return };
    let socket = machine.path("fake.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let greeting =
        r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":""},"capabilities":[]}}"#;
    let silent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{greeting}").unwrap();
        std::thread::sleep(Duration::from_secs(6));
    });
    let (reason, took) = reason(&handle(&machine, &socket)).await;
    assert_eq!(reason, Reason::VmMonitorFailed);
    assert!(took < Duration::from_secs(5), "{took:?}");
    silent.join().unwrap();
}

#[test]
fn a_pause_that_does_not_fit_is_refused_with_the_numbers() {
    let Some(machine) = firmware(&[]) else { return };
    let output = machine.snapshot(&machine.path("late"), 0).output().unwrap();
    let said = words(&output);
    assert!(
        said.contains("VmPauseBudgetExceeded: ") && said.contains("MiB/s"),
        "{said}"
    );
}

/// Signals a snapshot while the machine is paused for it. On a busy machine the moment can be missed, which is seen by the
/// machine running again; then another snapshot is taken.
fn interrupt(machine: &Machine, folder: &Path, timeout: u32, signal: &str) -> (Child, Instant) {
    for attempt in 0..10 {
        let to = folder.join(format!("snapshot{attempt}"));
        let begun = Instant::now();
        let mut child = machine.snapshot(&to, timeout).spawn().unwrap();
        let mut owner = machine.owner();
        let paused = wait_for("the pause or the end", || {
            let paused = owner.status() != "running";
            (paused || child.try_wait().unwrap().is_some()).then_some(paused)
        });
        if paused && tell(&child, signal) && owner.status() != "running" {
            return (child, begun);
        }
        tell(&child, "-CONT");
        child.wait().unwrap();
        let _ = fs::remove_dir_all(&to);
    }
    panic!("the pause was missed again and again");
}

fn tell(child: &Child, signal: &str) -> bool {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    status.is_ok_and(|status| status.success())
}

fn until_it_runs(machine: &Machine, since: Instant) -> Duration {
    let mut owner = machine.owner();
    wait_for("the machine to run", || {
        (owner.status() == "running").then(|| since.elapsed())
    })
}

/// How much longer than promised it may take on a machine that has other things to do.
const SLACK: Duration = Duration::from_secs(2);

#[test]
fn a_snapshot_that_is_killed_leaves_a_machine_that_runs_within_a_second() {
    let _alone = alone();
    let Some(machine) = Machine::start(&counting(1024, 700)) else {
        return;
    };
    machine.wait_past(1);
    let (mut child, _) = interrupt(&machine, machine.folder.path(), 60, "-STOP");
    child.kill().unwrap();
    let took = until_it_runs(&machine, Instant::now());
    eprintln!("it ran {} ms after the kill", took.as_millis());
    child.wait().unwrap();
    assert!(took < Duration::from_secs(1) + SLACK, "{took:?}");
    let last = *machine.counted().last().unwrap();
    machine.wait_past(last + 3);
    // What was under way has been given up: the next one is not in its way.
    let output = machine.snapshot(&machine.path("next"), 60).output().unwrap();
    assert!(output.status.success(), "{}", words(&output));
}

#[test]
fn a_snapshot_that_hangs_loses_the_monitor_at_its_deadline() {
    let _alone = alone();
    // A fast disk: a slow one would make the snapshot be refused for a deadline that a test can wait for.
    let Some(fast) = Small::of(1200) else { return };
    let Some(machine) = Machine::start(&counting(1024, 700)) else {
        return;
    };
    machine.wait_past(1);
    let (mut child, begun) = interrupt(&machine, fast.0.path(), 6, "-STOP");
    let took = until_it_runs(&machine, begun);
    eprintln!(
        "it ran {} ms after the start of a snapshot that hung, with 8 s allowed",
        took.as_millis()
    );
    child.kill().unwrap();
    child.wait().unwrap();
    // Looking and trying the disk come before the deadline begins.
    assert!(took > Duration::from_secs(7), "{took:?}");
    assert!(took < Duration::from_secs(8 + 1) + SLACK * 2, "{took:?}");
}

/// A file system of its own, with so many bytes.
struct Small(tempfile::TempDir);

impl Small {
    fn of(mebibytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={mebibytes}m"),
                "podcheckpoint-test",
            ])
            .arg(folder.path())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            skipped("a small file system can only be mounted by root");
        }
        mounted.then_some(Self(folder))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_is_too_small_is_refused_before_anything_is_paused() {
    let (Some(machine), Some(small)) = (firmware(&[]), Small::of(16)) else {
        return;
    };
    let stops = watch_for_stop(&machine);
    let output = machine
        .snapshot(&small.0.path().join("snapshot"), 60)
        .output()
        .unwrap();
    assert!(words(&output).contains("StorageFull: "), "{}", words(&output));
    assert!(!stops.seen(), "it was paused");
}

#[test]
fn a_disk_that_fills_up_ends_the_snapshot_and_not_the_machine() {
    let _alone = alone();
    let Some(small) = Small::of(1200) else { return };
    let Some(machine) = Machine::start(&counting(1024, 700)) else {
        return;
    };
    machine.wait_past(1);
    let folder = small.0.path().join("snapshot");
    let child = machine.snapshot(&folder, 60).spawn().unwrap();
    wait_for("the state to be begun", || {
        let state = folder.with_extension("partial").join("vmstate");
        fs::metadata(state).is_ok_and(|m| m.len() > 0).then_some(())
    });
    fill(small.0.path());
    let output = child.wait_with_output().unwrap();
    assert!(words(&output).contains("StorageFull: "), "{}", words(&output));
    assert!(!folder.exists() && !folder.with_extension("partial").exists());
    let last = *machine.counted().last().unwrap();
    machine.wait_past(last + 3);
}

/// Takes all the room that is left, at once.
fn fill(folder: &Path) {
    let path = folder.join("filler");
    let file = File::create(&path).unwrap();
    let free = rustix::fs::statvfs(folder).unwrap();
    let bytes = free.f_bavail * free.f_frsize;
    let flags = rustix::fs::FallocateFlags::empty();
    for part in [bytes, bytes / 2, bytes / 4] {
        let length = file.metadata().unwrap().len();
        let _ = rustix::fs::fallocate(&file, flags, length, part);
    }
    let chunk = vec![1; 1 << 16];
    let mut rest = OpenOptions::new().append(true).open(&path).unwrap();
    while rest.write_all(&chunk).is_ok() {}
}
