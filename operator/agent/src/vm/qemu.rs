//! QEMU by QMP: a migration into a file, with the machine standing still.
//!
//! The file is opened here and handed over as a descriptor: QEMU may see other paths, be another user, or be forbidden to
//! open or to start anything.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::qmp::{Qmp, nonsense};
use super::{ANSWER, Description, Disk, Driver, VmError, on_disk};
use crate::journal::DISK;
use crate::sandbox::{SocketPath, facts};

/// Name of the state in an archive.
pub(super) const STATE: &str = "vmstate";
/// How often a migration is looked at.
const TICK: Duration = Duration::from_millis(20);
/// How long a machine may take to stand still, or to run: QEMU waits for its disks.
const SETTLE: Duration = Duration::from_secs(10);
/// A migration is throttled for the sake of networks, by default to 128 MiB/s; a file needs no such care.
const BANDWIDTH: u64 = 1 << 40;
/// What QEMU begins with.
const DEFAULT_BANDWIDTH: u64 = 128 << 20;
/// Every page of memory has its place in the file.
const MAPPED: &str = "mapped-ram";
/// Capabilities of a migration that change what is written; whatever somebody has set is put back afterwards. multifd is
/// turned off: QEMU 10.0 was seen to die of a segmentation fault in its writing threads when a save was given up.
const CAPABILITIES: [&str; 2] = [MAPPED, "multifd"];
/// Name of our descriptor in QEMU.
const NAME: &str = "podcheckpoint";

/// One QEMU.
pub(super) struct Qemu {
    qmp: Qmp,
    pid: i32,
    /// What was set before it was changed.
    before: Option<Before>,
    /// The file of the state, opened before the machine stands still.
    file: Option<File>,
}

struct Before {
    bandwidth: u64,
    capabilities: Value,
}

impl Qemu {
    /// Connects to the monitor.
    pub(super) async fn connect(socket: &SocketPath, pid: i32) -> Result<Self, VmError> {
        Ok(Self {
            qmp: Qmp::connect(socket).await?,
            pid,
            before: None,
            file: None,
        })
    }

    async fn status(&mut self) -> Result<String, VmError> {
        let answer = self.qmp.execute("query-status", json!({})).await?;
        let status = answer.get("status").and_then(Value::as_str);
        status
            .map(str::to_owned)
            .ok_or_else(|| nonsense("query-status", &answer.to_string()))
    }

    async fn look(&mut self) -> Result<Description, VmError> {
        let state = self.status().await?;
        let summary = self.qmp.execute("query-memory-size-summary", json!({})).await?;
        let size = |key: &str| summary.get(key).and_then(Value::as_u64).unwrap_or_default();
        let memory = size("base-memory") + size("plugged-memory");
        let migration = self.qmp.execute("query-migrate", json!({})).await?;
        let mut blockers = strings(migration.get("blocked-reasons"));
        if blockers.is_empty() {
            blockers.extend(self.refusal(&migration).await?);
        }
        blockers.extend(devices(self.pid));
        let (major, minor, micro) = self.qmp.version;
        Ok(Description {
            version: format!("{major}.{minor}.{micro}"),
            running: state == "running",
            state,
            memory: (memory > 0).then_some(memory),
            blockers,
            disks: disks(&self.qmp.execute("query-block", json!({})).await?),
            format: if self.mapped().await? {
                "QEMU migration stream, mapped-ram"
            } else {
                "QEMU migration stream"
            }
            .to_owned(),
        })
    }

    /// A device that cannot be saved is only named when a migration is asked for, so one is, to a descriptor that there
    /// is not: QEMU looks at its devices first, and at the descriptor afterwards. Nothing is paused or written.
    async fn refusal(&mut self, migration: &Value) -> Result<Option<String>, VmError> {
        let status = migration
            .get("status")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if matches!(
            status,
            "setup" | "active" | "device" | "cancelling" | "pre-switchover" | "wait-unplug"
        ) {
            return Ok(Some(format!(
                "a migration of the machine is under way ({status})"
            )));
        }
        let nowhere = json!({"uri": "fd:podcheckpoint-nowhere"});
        match self.qmp.execute("migrate", nowhere).await {
            Err(VmError::Refused { answer, .. }) if answer.contains("podcheckpoint-nowhere") => Ok(None),
            // Somebody has set mapped-ram, for which this is no place: then the devices were not looked at.
            Err(VmError::Refused { answer, .. }) if answer.contains("transport") => Ok(None),
            Err(VmError::Refused { answer, .. }) => Ok(Some(answer)),
            Err(error) => Err(error),
            Ok(answer) => Err(nonsense("migrate to nowhere", &answer.to_string())),
        }
    }

    /// Whether memory can be written by several threads, each page at a place of its own (QEMU 9.0 and later). The
    /// descriptors go in by a set, which several threads can open, from 9.1 on.
    async fn mapped(&mut self) -> Result<bool, VmError> {
        let known = self.capabilities().await?;
        let has = |name: &str| known.iter().any(|(known, _)| known == name);
        Ok(CAPABILITIES.into_iter().all(has) && self.qmp.version >= (9, 1, 0))
    }

    async fn capabilities(&mut self) -> Result<Vec<(String, bool)>, VmError> {
        let answer = self.qmp.execute("query-migrate-capabilities", json!({})).await?;
        let pair = |value: &Value| {
            Some((
                value.get("capability")?.as_str()?.to_owned(),
                value.get("state")?.as_bool()?,
            ))
        };
        Ok(answer.as_array().into_iter().flatten().filter_map(pair).collect())
    }

    async fn set_up(&mut self, mapped: bool) -> Result<(), VmError> {
        let parameters = self.qmp.execute("query-migrate-parameters", json!({})).await?;
        let bandwidth = parameters
            .get("max-bandwidth")
            .and_then(Value::as_u64)
            .unwrap_or(DEFAULT_BANDWIDTH);
        let known = self.capabilities().await?;
        let ours = known
            .iter()
            .filter(|(name, _)| CAPABILITIES.contains(&name.as_str()));
        let before = ours
            .clone()
            .map(|(name, state)| json!({"capability": name, "state": state}));
        self.before = Some(Before {
            bandwidth,
            capabilities: before.collect(),
        });
        let wanted: Value = ours
            .map(|(name, _)| json!({"capability": name, "state": mapped && name == MAPPED}))
            .collect();
        self.set(BANDWIDTH, wanted).await
    }

    async fn set(&mut self, bandwidth: u64, capabilities: Value) -> Result<(), VmError> {
        self.qmp
            .execute("migrate-set-parameters", json!({"max-bandwidth": bandwidth}))
            .await?;
        let arguments = json!({"capabilities": capabilities});
        self.qmp
            .execute("migrate-set-capabilities", arguments)
            .await
            .map(drop)
    }

    async fn migrate(&mut self, folder: &Path) -> Result<(), VmError> {
        let mapped = self.mapped().await?;
        self.set_up(mapped).await?;
        let file = match self.file.take() {
            Some(file) => file,
            None => open_state(folder).await?,
        };
        let uri = self.hand_over(&file, mapped).await?;
        drop(file);
        self.qmp
            .execute_within("migrate", json!({"uri": uri}), SETTLE, None)
            .await?;
        loop {
            let answer = self.qmp.execute("query-migrate", json!({})).await?;
            match answer.get("status").and_then(Value::as_str).unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" => return Err(self.why(&answer, folder)),
                _ => sleep(TICK).await,
            }
        }
    }

    async fn hand_over(&mut self, file: &File, mapped: bool) -> Result<String, VmError> {
        let descriptor = Some(file.as_fd());
        if !mapped {
            let arguments = json!({"fdname": NAME});
            self.qmp
                .execute_within("getfd", arguments, ANSWER, descriptor)
                .await?;
            return Ok(format!("fd:{NAME}"));
        }
        let answer = self
            .qmp
            .execute_within("add-fd", json!({"opaque": NAME}), ANSWER, descriptor)
            .await?;
        let set = answer.get("fdset-id").and_then(Value::as_u64);
        let set = set.ok_or_else(|| nonsense("add-fd", &answer.to_string()))?;
        Ok(format!("file:/dev/fdset/{set}"))
    }

    /// QEMU before 9.1 does not say why a write failed, so the disk is asked.
    fn why(&self, answer: &Value, folder: &Path) -> VmError {
        let words = answer
            .get("error-desc")
            .and_then(Value::as_str)
            .unwrap_or("no reason was given");
        let full = rustix::fs::statvfs(folder)
            .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) < 1 << 20);
        if full {
            let why = format!("No space left on device (QEMU: {words})");
            return VmError::Disk {
                path: folder.join(STATE),
                why,
                full,
            };
        }
        VmError::Refused {
            request: "migrate".to_owned(),
            answer: words.to_owned(),
        }
    }

    async fn give_up(&mut self) {
        // Refused when there is nothing to give up.
        let _ = self.qmp.execute("migrate_cancel", json!({})).await;
        let until = Instant::now() + SETTLE;
        while Instant::now() < until {
            let answer = self
                .qmp
                .execute("query-migrate", json!({}))
                .await
                .unwrap_or_default();
            let status = answer.get("status").and_then(Value::as_str).unwrap_or_default();
            if !matches!(
                status,
                "setup" | "active" | "device" | "cancelling" | "pre-switchover" | "wait-unplug"
            ) {
                return;
            }
            sleep(TICK).await;
        }
    }

    async fn run_again(&mut self) -> Result<(), VmError> {
        let until = Instant::now() + SETTLE;
        loop {
            let status = self.status().await?;
            if status == "running" {
                break;
            }
            // While a migration is being given up this is refused, so it is tried until it is not.
            let told = self.qmp.execute_within("cont", json!({}), SETTLE, None).await;
            if Instant::now() >= until {
                told?;
                return Err(nonsense("cont", &format!("the machine is still {status:?}")));
            }
            if told.is_err() {
                sleep(TICK).await;
            }
        }
        Ok(())
    }

    /// The machine runs; what was set for the sake of the snapshot goes back to what it was.
    async fn put_back(&mut self) {
        let before = match self.before.take() {
            Some(before) => before,
            None => match self.left_behind().await {
                Some(before) => before,
                None => return,
            },
        };
        if let Err(error) = self.set(before.bandwidth, before.capabilities).await {
            tracing::warn!(%error, "the parameters of QEMU's migration are not put back");
        }
        let _ = self.qmp.execute("closefd", json!({"fdname": NAME})).await;
        let sets = self
            .qmp
            .execute("query-fdsets", json!({}))
            .await
            .unwrap_or_default();
        let ours = |set: &&Value| set.to_string().contains(NAME);
        for set in sets.as_array().into_iter().flatten().filter(ours) {
            let id = set.get("fdset-id").cloned().unwrap_or_default();
            let _ = self.qmp.execute("remove-fd", json!({"fdset-id": id})).await;
        }
    }

    /// QEMU's defaults, when a process that is gone has left its own settings. No network has this bandwidth, so it is
    /// known by it.
    async fn left_behind(&mut self) -> Option<Before> {
        let parameters = self
            .qmp
            .execute("query-migrate-parameters", json!({}))
            .await
            .ok()?;
        let bandwidth = parameters.get("max-bandwidth").and_then(Value::as_u64);
        let known = self.capabilities().await.ok()?;
        let ours = known
            .iter()
            .filter(|(name, _)| CAPABILITIES.contains(&name.as_str()));
        (bandwidth == Some(BANDWIDTH)).then(|| Before {
            bandwidth: DEFAULT_BANDWIDTH,
            capabilities: ours
                .map(|(name, _)| json!({"capability": name, "state": false}))
                .collect(),
        })
    }
}

impl Driver for Qemu {
    fn describe(&mut self) -> BoxFuture<'_, Result<Description, VmError>> {
        self.look().boxed()
    }

    fn prepare<'a>(&'a mut self, folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        async move {
            self.file = Some(open_state(folder).await?);
            Ok(())
        }
        .boxed()
    }

    fn pause(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        async {
            self.qmp.execute_within("stop", json!({}), SETTLE, None).await?;
            match self.status().await?.as_str() {
                "running" => Err(nonsense("stop", "the machine still runs")),
                _ => Ok(()),
            }
        }
        .boxed()
    }

    fn save<'a>(&'a mut self, folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        self.migrate(folder).boxed()
    }

    fn resume(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        async {
            if self.status().await? != "running" {
                self.give_up().await;
            }
            self.run_again().await?;
            self.put_back().await;
            Ok(())
        }
        .boxed()
    }

    fn connection(&self) -> Option<OwnedFd> {
        self.qmp.duplicate()
    }

    fn restore_with(&self) -> &'static [&'static str] {
        &[
            "Start the same version of QEMU with commandLine, with sockets, disks and network of its own in place of the source's, and with -incoming defer and a QMP socket.",
            "When the format names mapped-ram: migrate-set-capabilities with mapped-ram set to true.",
            "{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"file:/PATH/vmstate\"}} (before QEMU 8.2: \"exec:cat /PATH/vmstate\")",
            "When query-status says paused: {\"execute\":\"cont\"}.",
        ]
    }
}

async fn open_state(folder: &Path) -> Result<File, VmError> {
    let path = folder.join(STATE);
    let made = path.clone();
    on_disk(DISK, &path, move || create(&made).map_err(VmError::disk(&made))).await
}

/// Only for root, and new: a state holds every secret of the guest's memory.
fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Devices whose other half is outside of QEMU. Newer versions let some of them be migrated, but what the other half
/// holds, such as open files of virtiofsd, is not in the state.
fn devices(pid: i32) -> Vec<String> {
    let arguments = facts::process(pid).map(|p| p.arguments).unwrap_or_default();
    let following = arguments.iter().zip(arguments.iter().skip(1));
    let devices = following
        .filter(|(option, _)| option.trim_start_matches('-') == "device")
        .map(|(_, value)| value);
    let outside = |device: &&String| device.contains("vhost-user-") || device.contains("vfio-");
    let name = |device: &String| {
        let json: Option<Value> = serde_json::from_str(device).ok();
        let driver = json.and_then(|json| Some(json.get("driver")?.as_str()?.to_owned()));
        driver.unwrap_or_else(|| device.split(',').next().unwrap_or(device).to_owned())
    };
    devices
        .filter(outside)
        .map(|device| format!("the device {} has its state outside of QEMU", name(device)))
        .collect()
}

fn disks(answer: &Value) -> Vec<Disk> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let disk = |value: &Value| {
        let inserted = value.get("inserted")?;
        let device = text(value.get("device"));
        Some(Disk {
            device: if device.is_empty() {
                text(value.get("qdev"))
            } else {
                device
            },
            file: text(inserted.get("file")),
            format: text(inserted.get("drv")),
            read_only: inserted.get("ro").and_then(Value::as_bool).unwrap_or_default(),
        })
    };
    answer.as_array().into_iter().flatten().filter_map(disk).collect()
}
