//! Cloud Hypervisor and Firecracker need hardware help, which is missing where this is built: here a stand-in replays
//! exchanges as their interfaces' specifications have them (cloud-hypervisor.yaml of version 50, firecracker.yaml of
//! version 1.13). It proves what is asked, in which order and what is made of each answer; it proves nothing about the
//! monitors themselves.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is a failed test"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use podcheckpoint_agent::sandbox::{Machine, ShimKind, SocketPath, VmmKind, facts};
use podcheckpoint_agent::vm::Handle;
use podcheckpoint_agent::vm::snapshot::{self, Limits};
use podcheckpoint_crds::Reason;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// One exchange: what is asked, and what comes back.
type Exchange = (&'static str, u16, Value);

/// A stand-in for a monitor: answers each request as recorded, the last exchange of a kind for ever, and does what the
/// request would have done to the disk.
struct StandIn {
    folder: tempfile::TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl StandIn {
    fn of(exchanges: Vec<Exchange>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("api.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        std::thread::spawn(move || {
            let mut left = exchanges;
            for stream in listener.incoming() {
                serve(stream.unwrap(), &mut left, &log);
            }
        });
        Self { folder, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn machine(&self, vmm: VmmKind, shim: ShimKind) -> Machine {
        let pid = i32::try_from(std::process::id()).unwrap();
        Machine {
            vmm,
            pid,
            started: facts::started(pid).unwrap(),
            arguments: Vec::new(),
            monitor: Some(SocketPath::own(self.folder.path().join("api.sock"))),
            vsock: None,
            memory: None,
            confidential: None,
            domain: None,
            shim,
        }
    }

    fn limits(&self, allow_degraded: bool) -> Limits {
        Limits {
            archive_root: self.folder.path().to_owned(),
            deadline: Duration::from_secs(60),
            allow_degraded,
            cancelled: CancellationToken::new(),
        }
    }

    fn archive(&self) -> PathBuf {
        let archive = self.folder.path().join("archive");
        std::fs::create_dir(&archive).unwrap();
        archive
    }
}

fn serve(stream: UnixStream, left: &mut Vec<Exchange>, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = String::from_utf8(body).unwrap();
    let request = first.trim().trim_end_matches(" HTTP/1.1").to_owned();
    log.lock()
        .unwrap()
        .push(format!("{request} {body}").trim().to_owned());
    let same: Vec<usize> = (0..left.len()).filter(|i| left[*i].0 == request).collect();
    let Some(at) = same.first() else { return };
    let (_, status, answer) = if same.len() > 1 {
        left.remove(*at)
    } else {
        left[*at].clone()
    };
    write_state(&request, &body);
    let answer = if answer.is_null() {
        String::new()
    } else {
        answer.to_string()
    };
    // Firecracker and Cloud Hypervisor answer 204 without a body to a request that changes something.
    let length = if status == 204 {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", answer.len())
    };
    write!(
        reader.get_mut(),
        "HTTP/1.1 {status} \r\nServer: stand-in\r\n{length}\r\n{answer}"
    )
    .unwrap();
}

/// The files that the request makes.
fn write_state(request: &str, body: &str) {
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let write = |path: &Path| std::fs::write(path, "state").unwrap();
    match request {
        "PUT /api/v1/vm.snapshot" => {
            let folder = Path::new(
                body["destination_url"]
                    .as_str()
                    .unwrap()
                    .strip_prefix("file://")
                    .unwrap(),
            );
            // Cloud Hypervisor wants the folder to be there.
            assert!(folder.is_dir());
            for file in ["config.json", "state.json", "memory-ranges"] {
                write(&folder.join(file));
            }
        }
        "PUT /snapshot/create" => {
            for key in ["snapshot_path", "mem_file_path"] {
                write(Path::new(body[key].as_str().unwrap()));
            }
        }
        _ => {}
    }
}

fn cloud_hypervisor(state: &'static str, config: Value) -> Vec<Exchange> {
    vec![
        (
            "GET /api/v1/vmm.ping",
            200,
            json!({"build_version": "v50.0", "version": "50.0.0", "pid": 7, "features": []}),
        ),
        (
            "GET /api/v1/vm.info",
            200,
            json!({"config": config, "state": state, "memory_actual_size": 268_435_456}),
        ),
    ]
}

fn config() -> Value {
    json!({"memory": {"size": 268_435_456}, "disks": [{"path": "/nowhere/root.img", "readonly": true, "id": "_disk0"}], "fs": null, "devices": null})
}

async fn take(stand_in: &StandIn, machine: &Machine) -> Result<snapshot::Taken, Reason> {
    let limits = stand_in.limits(true);
    let ready = snapshot::check(machine, &limits).await.map_err(|e| e.reason())?;
    snapshot::take(ready, &stand_in.archive(), &limits)
        .await
        .map_err(|e| e.reason())
}

/// The watchdog is the agent's own program, which is not this one.
fn name_the_agent() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        podcheckpoint_agent::vm::set_agent_program(env!("CARGO_BIN_EXE_podcheckpoint-agent").into())
    });
}

#[tokio::test]
async fn contract_cloud_hypervisor_is_paused_saved_and_resumed() {
    name_the_agent();
    let mut exchanges = cloud_hypervisor("Running", config());
    let info = |state: &str| {
        (
            "GET /api/v1/vm.info",
            200,
            json!({"config": config(), "state": state}),
        )
    };
    exchanges.extend([info("Paused"), info("Running")]);
    exchanges.extend([
        ("PUT /api/v1/vm.pause", 204, Value::Null),
        ("PUT /api/v1/vm.snapshot", 204, Value::Null),
        ("PUT /api/v1/vm.resume", 204, Value::Null),
    ]);
    let stand_in = StandIn::of(exchanges);
    let taken = take(
        &stand_in,
        &stand_in.machine(VmmKind::CloudHypervisor, ShimKind::KataGo),
    )
    .await
    .unwrap();
    assert_eq!(
        (taken.description.version.as_str(), taken.description.memory),
        ("50.0.0", Some(256 << 20))
    );
    assert_eq!(
        taken.disks[0].not_copied.as_deref(),
        Some("the guest cannot write to it")
    );
    let asked = stand_in.asked();
    let url = format!(
        "{{\"destination_url\":\"file://{}\"}}",
        stand_in.folder.path().join("archive").display()
    );
    assert_eq!(
        asked,
        [
            "GET /api/v1/vmm.ping",
            "GET /api/v1/vm.info",
            "PUT /api/v1/vm.pause",
            &format!("PUT /api/v1/vm.snapshot {url}"),
            "GET /api/v1/vm.info",
            "PUT /api/v1/vm.resume",
            "GET /api/v1/vm.info",
        ]
    );
}

#[tokio::test]
async fn contract_cloud_hypervisor_whose_snapshot_fails_runs_again() {
    name_the_agent();
    let mut exchanges = cloud_hypervisor("Running", config());
    let info = |state: &str| {
        (
            "GET /api/v1/vm.info",
            200,
            json!({"config": config(), "state": state}),
        )
    };
    exchanges.extend([info("Paused"), info("Running")]);
    exchanges.extend([
        ("PUT /api/v1/vm.pause", 204, Value::Null),
        (
            "PUT /api/v1/vm.snapshot",
            500,
            json!(["Error from API", "No space left on device (os error 28)"]),
        ),
        ("PUT /api/v1/vm.resume", 204, Value::Null),
    ]);
    let stand_in = StandIn::of(exchanges);
    let machine = stand_in.machine(VmmKind::CloudHypervisor, ShimKind::Other);
    assert_eq!(take(&stand_in, &machine).await.unwrap_err(), Reason::StorageFull);
    assert!(
        stand_in
            .asked()
            .iter()
            .any(|asked| asked == "PUT /api/v1/vm.resume")
    );
}

#[tokio::test]
async fn contract_cloud_hypervisor_with_virtiofs_or_vfio_is_refused_before_the_pause() {
    for (key, device) in [
        ("fs", json!([{"tag": "kataShared", "socket": "/s"}])),
        ("devices", json!([{"path": "/sys/bus/pci/devices/0000:01:00.0"}])),
    ] {
        let mut config = config();
        config[key] = device;
        let stand_in = StandIn::of(cloud_hypervisor("Running", config));
        let machine = stand_in.machine(VmmKind::CloudHypervisor, ShimKind::KataGo);
        assert_eq!(
            take(&stand_in, &machine).await.unwrap_err(),
            Reason::VmDeviceNotSnapshottable
        );
        assert!(stand_in.asked().iter().all(|asked| asked.starts_with("GET ")));
    }
}

#[tokio::test]
async fn contract_a_paused_cloud_hypervisor_is_left_as_it_is() {
    let stand_in = StandIn::of(cloud_hypervisor("Paused", config()));
    let machine = stand_in.machine(VmmKind::CloudHypervisor, ShimKind::KataGo);
    assert_eq!(
        take(&stand_in, &machine).await.unwrap_err(),
        Reason::VmAlreadyPaused
    );
    assert!(stand_in.asked().iter().all(|asked| asked.starts_with("GET ")));
}

fn firecracker(states: &[&'static str]) -> Vec<Exchange> {
    let instance = |state: &&str| {
        (
            "GET /",
            200,
            json!({"app_name": "Firecracker", "id": "s", "state": state, "vmm_version": "1.13.1"}),
        )
    };
    let config = json!({
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false},
        "drives": [{"drive_id": "rootfs", "path_on_host": "rootfs.ext4", "is_read_only": true, "socket": null}],
    });
    let mut exchanges: Vec<Exchange> = states.iter().map(instance).collect();
    exchanges.extend([
        ("GET /vm/config", 200, config),
        ("PATCH /vm", 204, Value::Null),
        ("PUT /snapshot/create", 204, Value::Null),
    ]);
    exchanges
}

#[tokio::test]
async fn contract_firecracker_writes_into_its_jail_and_the_files_are_taken_out() {
    name_the_agent();
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: this needs root: the stand-in's jail is the root of this machine");
        return;
    }
    let stand_in = StandIn::of(firecracker(&["Running", "Paused", "Running"]));
    let machine = stand_in.machine(VmmKind::Firecracker, ShimKind::Other);
    let taken = take(&stand_in, &machine).await.unwrap();
    assert_eq!(
        (taken.description.version.as_str(), taken.description.memory),
        ("1.13.1", Some(128 << 20))
    );
    let archive = stand_in.folder.path().join("archive");
    assert!(archive.join("vmstate").exists() && archive.join("memory").exists());
    let inside = format!("/podcheckpoint-{}", std::process::id());
    assert!(!Path::new(&inside).exists());
    let create = json!({
        "snapshot_type": "Full", "snapshot_path": format!("{inside}/vmstate"), "mem_file_path": format!("{inside}/memory"),
    });
    assert_eq!(
        stand_in.asked(),
        [
            "GET /",
            "GET /vm/config",
            r#"PATCH /vm {"state":"Paused"}"#,
            &format!("PUT /snapshot/create {create}"),
            "GET /",
            r#"PATCH /vm {"state":"Resumed"}"#,
            "GET /",
        ]
    );
}

#[tokio::test]
async fn contract_firecracker_below_kata_is_refused_unless_the_loss_of_its_vsock_is_accepted() {
    let stand_in = StandIn::of(firecracker(&["Running"]));
    let machine = stand_in.machine(VmmKind::Firecracker, ShimKind::KataGo);
    let refused = snapshot::check(&machine, &stand_in.limits(false))
        .await
        .err()
        .unwrap();
    assert_eq!(refused.reason(), Reason::VmDeviceNotSnapshottable);
    assert!(snapshot::check(&machine, &stand_in.limits(true)).await.is_ok());
}

#[tokio::test]
async fn contract_an_interface_that_takes_the_request_and_says_nothing_is_not_waited_for() {
    // No exchange is recorded, so the stand-in closes; the second one does not even accept.
    let closes = StandIn::of(Vec::new());
    let silent = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(silent.path().join("api.sock")).unwrap();
    let mut handles = vec![Handle::of(
        &closes.machine(VmmKind::CloudHypervisor, ShimKind::Other),
    )];
    let monitor = Some(SocketPath::own(silent.path().join("api.sock")));
    handles.push(Handle {
        monitor,
        ..handles[0].clone()
    });
    for handle in handles {
        let begun = Instant::now();
        let error = handle.open().await.unwrap().describe().await.unwrap_err();
        assert_eq!(error.reason(), Reason::VmMonitorFailed, "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
