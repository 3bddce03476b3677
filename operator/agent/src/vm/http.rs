//! Cloud Hypervisor and Firecracker: HTTP on a unix socket, one connection for each request, since Cloud Hypervisor
//! closes idle ones and a request on such a one waits for ever.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustix::fs::{AtFlags, Mode, mkdirat, unlinkat};
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::qmp::nonsense;
use super::{ANSWER, Description, Disk, Driver, VmError, snapshot};
use crate::sandbox::SocketPath;
use crate::sandbox::view::View;

/// Largest answer that is read, in bytes.
const LIMIT: usize = 4 << 20;
/// How long a machine may take to stand still or to run.
const SETTLE: Duration = Duration::from_secs(10);
/// How long saving may take when nobody gives it up before.
const SAVE: Duration = Duration::from_secs(3600);

/// One request on a connection of its own.
async fn ask(
    socket: &SocketPath,
    method: Method,
    path: &str,
    body: Option<Value>,
    limit: Duration,
) -> Result<Value, VmError> {
    let request = format!("{method} {path}");
    match timeout(limit, exchange(socket, method, path, body, &request)).await {
        Ok(answer) => answer,
        Err(_) => Err(nonsense(
            &request,
            &format!("no answer within {} s", limit.as_secs()),
        )),
    }
}

async fn exchange(
    socket: &SocketPath,
    method: Method,
    path: &str,
    body: Option<Value>,
    name: &str,
) -> Result<Value, VmError> {
    let failed = |error: &dyn std::fmt::Display| nonsense(name, &error.to_string());
    let stream = socket.connect().await.map_err(|error| VmError::Unreachable {
        socket: socket.to_string(),
        why: error.to_string(),
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(&e))?;
    let body = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("Host", "localhost")
        .header("Accept", "application/json")
        .header("Content-Type", "application/json")
        .body(Full::new(body))
        .map_err(|e| failed(&e))?;
    // Ends by itself with the sender, also when this is given up.
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|e| failed(&e))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LIMIT).collect().await;
    let bytes = body.map_err(|e| failed(&e))?.to_bytes();
    if !status.is_success() {
        let words = String::from_utf8_lossy(&bytes).into_owned();
        return Err(VmError::Refused {
            request: name.to_owned(),
            answer: format!("{status}: {words}"),
        });
    }
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&bytes).map_err(|_| nonsense(name, "an answer that is not JSON"))
}

fn text(value: &Value, pointer: &str) -> String {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

/// One Cloud Hypervisor (vmm/src/api/openapi/cloud-hypervisor.yaml, version 0.3.0 of its interface).
pub(super) struct CloudHypervisor {
    socket: SocketPath,
}

impl CloudHypervisor {
    pub(super) fn new(socket: &SocketPath) -> Self {
        Self {
            socket: socket.clone(),
        }
    }

    async fn get(&self, path: &str) -> Result<Value, VmError> {
        ask(&self.socket, Method::GET, path, None, ANSWER).await
    }

    async fn put(&self, path: &str, body: Option<Value>, limit: Duration) -> Result<(), VmError> {
        ask(&self.socket, Method::PUT, path, body, limit).await.map(drop)
    }

    async fn state(&self) -> Result<(String, Value), VmError> {
        let info = self.get("/api/v1/vm.info").await?;
        let state = text(&info, "/state");
        if state.is_empty() {
            return Err(nonsense("GET /api/v1/vm.info", &info.to_string()));
        }
        Ok((state, info))
    }
}

impl Driver for CloudHypervisor {
    fn describe(&mut self) -> BoxFuture<'_, Result<Description, VmError>> {
        async {
            let ping = self.get("/api/v1/vmm.ping").await?;
            let (state, info) = self.state().await?;
            Ok(Description {
                version: text(&ping, "/version"),
                running: state == "Running",
                state,
                memory: info.pointer("/config/memory/size").and_then(Value::as_u64),
                blockers: clh_devices(&info),
                disks: clh_disks(&info),
                format: "Cloud Hypervisor snapshot".to_owned(),
            })
        }
        .boxed()
    }

    fn pause(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        self.put("/api/v1/vm.pause", None, SETTLE).boxed()
    }

    fn save<'a>(&'a mut self, folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        let url = format!("file://{}", folder.display());
        async move {
            self.put("/api/v1/vm.snapshot", Some(json!({"destination_url": url})), SAVE)
                .await
        }
        .boxed()
    }

    fn resume(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        async {
            if self.state().await?.0 != "Running" {
                self.put("/api/v1/vm.resume", None, SETTLE).await?;
            }
            match self.state().await?.0 {
                state if state == "Running" => Ok(()),
                state => Err(nonsense("vm.resume", &format!("the machine is still {state:?}"))),
            }
        }
        .boxed()
    }

    fn restore_with(&self) -> &'static [&'static str] {
        &[
            "Start the same version of Cloud Hypervisor with nothing but an --api-socket of its own.",
            "Change the paths of sockets and disks in config.json if they are taken or elsewhere.",
            "ch-remote --api-socket SOCKET restore source_url=file:///PATH (network devices that were handed over as descriptors: with net_fds)",
            "ch-remote --api-socket SOCKET resume",
        ]
    }
}

/// Devices whose other half is outside: open files of virtiofsd and the state of real hardware are in no snapshot.
fn clh_devices(info: &Value) -> Vec<String> {
    let list = |key: &str| {
        info.pointer(&format!("/config/{key}"))
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let mut found: Vec<String> = Vec::new();
    for (key, name) in [
        ("fs", "virtio-fs"),
        ("devices", "VFIO"),
        ("user_devices", "vfio-user"),
        ("vdpa", "vDPA"),
    ] {
        let devices = list(key);
        found.extend((!devices.is_empty()).then(|| {
            format!(
                "{} {name} device(s) have their state outside of Cloud Hypervisor",
                devices.len()
            )
        }));
    }
    for key in ["disks", "net"] {
        let user = list(key)
            .iter()
            .filter(|d| d.get("vhost_user") == Some(&Value::Bool(true)))
            .count();
        found.extend((user > 0).then(|| {
            format!("{user} vhost-user device(s) in {key} have their state outside of Cloud Hypervisor")
        }));
    }
    found
}

fn clh_disks(info: &Value) -> Vec<Disk> {
    let disks = info
        .pointer("/config/disks")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let disk = |value: &Value| Disk {
        device: text(value, "/id"),
        file: text(value, "/path"),
        format: "raw".to_owned(),
        read_only: value.get("readonly") == Some(&Value::Bool(true)),
    };
    disks.map(disk).collect()
}

/// One Firecracker (src/firecracker/swagger/firecracker.yaml).
pub(super) struct Firecracker {
    socket: SocketPath,
    pid: i32,
}

impl Firecracker {
    pub(super) fn new(socket: &SocketPath, pid: i32) -> Self {
        Self {
            socket: socket.clone(),
            pid,
        }
    }

    async fn get(&self, path: &str) -> Result<Value, VmError> {
        ask(&self.socket, Method::GET, path, None, ANSWER).await
    }

    async fn turn(&self, state: &str) -> Result<(), VmError> {
        ask(
            &self.socket,
            Method::PATCH,
            "/vm",
            Some(json!({"state": state})),
            SETTLE,
        )
        .await
        .map(drop)
    }

    async fn state(&self) -> Result<(String, Value), VmError> {
        let info = self.get("/").await?;
        let state = text(&info, "/state");
        if state.is_empty() {
            return Err(nonsense("GET /", &info.to_string()));
        }
        Ok((state, info))
    }

    fn name(&self) -> String {
        format!("podcheckpoint-{}", self.pid)
    }

    /// A folder inside the jail: Firecracker sees nothing else, and is nobody who may write elsewhere.
    async fn create(&self, folder: &Path) -> Result<(), VmError> {
        let name = self.name();
        let wrong = |error: io::Error| VmError::disk(Path::new(&format!("the jail's /{name}")))(error);
        let jail = View::root_of(self.pid).map_err(wrong)?;
        let inside = prepare(&jail, &name, self.pid).map_err(wrong)?;
        let body = json!({
            "snapshot_type": "Full", "snapshot_path": format!("/{name}/vmstate"), "mem_file_path": format!("/{name}/memory"),
        });
        let saved = ask(&self.socket, Method::PUT, "/snapshot/create", Some(body), SAVE).await;
        let to = folder.to_owned();
        // Given up with this future, as the copies of disks are.
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let taken = tokio::task::spawn_blocking(move || match saved {
            Ok(_) => ["vmstate", "memory"]
                .iter()
                .try_for_each(|file| take(&inside, file, &to.join(file), &stop)),
            Err(error) => Err(error),
        });
        let taken = taken
            .await
            .map_err(|error| nonsense("PUT /snapshot/create", &error.to_string()));
        drop(guard);
        // The guest's memory must not stay where nobody looks for it.
        let removed = remove(&jail, &name).map_err(wrong);
        taken?.and(removed)
    }
}

/// Moves a result out of the jail. Whoever is in there could have put something else in its place.
fn take(inside: &View, name: &str, to: &Path, stop: &CancellationToken) -> Result<(), VmError> {
    let copy = || {
        let found = inside.find_here(name)?;
        if found.stat.st_nlink != 1 {
            return Err(io::Error::other("the monitor's file has other names"));
        }
        snapshot::copy_sparse(&found.read()?, to, stop)
    };
    copy().map_err(VmError::disk(to))?;
    unlinkat(inside, name, AtFlags::empty()).map_err(|error| VmError::disk(to)(error.into()))
}

/// Makes the folder. The jail's user is not root.
fn prepare(jail: &View, name: &str, pid: i32) -> io::Result<View> {
    let owner = fs::metadata(format!("/proc/{pid}"))?;
    mkdirat(jail, name, Mode::RWXU)?;
    let made = jail.find_here(name)?;
    let folder = File::open(made.name())?;
    std::os::unix::fs::fchown(&folder, Some(owner.uid()), Some(owner.gid()))?;
    made.folder()
}

/// Removes the folder. If it has become a link, then the link alone.
fn remove(jail: &View, name: &str) -> io::Result<()> {
    fs::remove_dir_all(jail.name().join(name))
}

impl Driver for Firecracker {
    fn describe(&mut self) -> BoxFuture<'_, Result<Description, VmError>> {
        async {
            let (state, info) = self.state().await?;
            let config = self.get("/vm/config").await?;
            let mebibytes = config
                .pointer("/machine-config/mem_size_mib")
                .and_then(Value::as_u64);
            let drives = config
                .get("drives")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            let user = drives
                .iter()
                .filter(|d| d.get("socket").is_some_and(|s| !s.is_null()))
                .count();
            let disk = |value: &Value| Disk {
                device: text(value, "/drive_id"),
                file: text(value, "/path_on_host"),
                format: "raw".to_owned(),
                read_only: value.get("is_read_only") == Some(&Value::Bool(true)),
            };
            Ok(Description {
                version: text(&info, "/vmm_version"),
                running: state == "Running",
                state,
                memory: mebibytes.map(|size| size << 20),
                blockers: (user > 0)
                    .then(|| format!("{user} vhost-user drive(s) have their state outside of Firecracker"))
                    .into_iter()
                    .collect(),
                disks: drives.iter().map(disk).collect(),
                format: "Firecracker snapshot".to_owned(),
            })
        }
        .boxed()
    }

    fn pause(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        self.turn("Paused").boxed()
    }

    fn save<'a>(&'a mut self, folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        self.create(folder).boxed()
    }

    fn resume(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        async {
            if self.state().await?.0 != "Running" {
                self.turn("Resumed").await?;
            }
            // Left there by a save that was given up.
            let _ = View::root_of(self.pid).and_then(|jail| remove(&jail, &self.name()));
            match self.state().await?.0 {
                state if state == "Running" => Ok(()),
                state => Err(nonsense("PATCH /vm", &format!("the machine is still {state:?}"))),
            }
        }
        .boxed()
    }

    fn restore_with(&self) -> &'static [&'static str] {
        &[
            "Start the same version of Firecracker with nothing but an --api-sock of its own, and put its disks where the source had them.",
            "PUT /snapshot/load {\"snapshot_path\":\"/PATH/vmstate\",\"mem_backend\":{\"backend_type\":\"File\",\"backend_path\":\"/PATH/memory\"},\"resume_vm\":true}",
            "Open connections over vsock are closed by a snapshot.",
        ]
    }
}
