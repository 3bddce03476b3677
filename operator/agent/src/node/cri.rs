//! The container runtime, by its Container Runtime Interface (runtime.v1 of k8s.io/cri-api).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::{chain, grpc};

/// Sockets of the runtimes that Kubernetes distributions ship, most common first.
const KNOWN_SOCKETS: [&str; 6] = [
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/k0s/containerd.sock",
    "/var/snap/microk8s/common/run/containerd.sock",
    "/run/cri-dockerd.sock",
];
/// How long the runtime may take for a call that only looks something up.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// A call to the runtime failed.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// No socket answered.
    #[error("no container runtime answered: {}", .tried.join("; "))]
    NotFound {
        /// Each socket that was tried, with its answer.
        tried: Vec<String>,
    },
    /// The call took longer than it may.
    #[error("the container runtime did not answer {call} within {} s", limit.as_secs())]
    Timeout {
        /// Name of the call.
        call: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The runtime answered with an error.
    #[error("{call}: {message}")]
    Status {
        /// Name of the call.
        call: &'static str,
        /// gRPC code.
        code: Code,
        /// The runtime's words.
        message: String,
    },
}

impl CriError {
    fn of(call: &'static str) -> impl Fn(Status) -> Self {
        move |status| Self::Status {
            call,
            code: status.code(),
            message: status.message().to_owned(),
        }
    }

    /// Whether the runtime does not know the call.
    pub fn is_unimplemented(&self) -> bool {
        matches!(
            self,
            Self::Status {
                code: Code::Unimplemented,
                ..
            }
        )
    }
}

/// Name and version of a runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeVersion {
    /// For example containerd or cri-o.
    pub name: String,
    /// For example v2.1.4.
    pub version: String,
}

impl RuntimeVersion {
    /// The first number of the version.
    pub fn major(&self) -> Option<u32> {
        self.version
            .trim_start_matches('v')
            .split('.')
            .next()?
            .parse()
            .ok()
    }

    /// Whether it is containerd.
    pub fn is_containerd(&self) -> bool {
        self.name == "containerd"
    }
}

/// The sandbox of a pod, and its containers.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The runtime's identifier.
    pub id: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Runtime handler; empty is the default one.
    pub handler: String,
    /// Its containers, also those that have ended.
    pub containers: Vec<Container>,
}

/// A container of a sandbox.
#[derive(Clone, Debug)]
pub struct Container {
    /// The runtime's identifier.
    pub id: String,
    /// Name in the pod.
    pub name: String,
    /// Whether it runs.
    pub running: bool,
    /// Main process, on the node.
    pub pid: Option<i32>,
    /// Shim, for example io.containerd.runc.v2.
    pub runtime_type: Option<String>,
    /// OCI runtime below the shim, where the runtime's configuration names one.
    pub binary: Option<String>,
    /// The OCI specification that it was started with.
    pub spec: Option<serde_json::Value>,
    /// Image as the pod names it.
    pub image: Option<String>,
}

/// What a command in a container printed, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status.
    pub code: i32,
}

/// A runtime handler, as a RuntimeClass names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler {
    /// Its name; empty is the default one.
    pub name: String,
    /// Its shim, for example io.containerd.runc.v2.
    pub runtime_type: Option<String>,
}

/// Every handler once, the default one first.
fn handlers(mut names: Vec<String>, config: &VerboseConfig) -> Vec<Handler> {
    names.extend(config.containerd.runtimes.keys().cloned());
    names.push(String::new());
    names.sort();
    names.dedup();
    let of = |name: String| {
        let key = if name.is_empty() {
            &config.containerd.default_runtime_name
        } else {
            &name
        };
        let runtime_type = config
            .containerd
            .runtimes
            .get(key)
            .map(|runtime| runtime.runtime_type.clone());
        Handler { name, runtime_type }
    };
    names.into_iter().map(of).collect()
}

/// Read by itself: whatever else of the configuration cannot be read, this is known. containerd 1.7 and 2 call it the same
/// (criconfig.Config.RootDir), and it is the folder of the CRI plugin below containerd's own.
fn root(config: &str) -> Option<PathBuf> {
    let config: RootConfig = serde_json::from_str(config).ok()?;
    Some(config.root_dir).filter(|root| root.is_absolute())
}

/// A connection to the runtime.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
    socket: PathBuf,
    version: RuntimeVersion,
}

impl Cri {
    /// Connects to the configured socket, or to the first known one that answers.
    ///
    /// # Errors
    /// [`CriError::NotFound`] with what each socket answered.
    pub async fn discover(configured: Option<&Path>) -> Result<Self, CriError> {
        let candidates: Vec<&Path> =
            configured.map_or_else(|| KNOWN_SOCKETS.map(Path::new).to_vec(), |c| vec![c]);
        let mut tried = Vec::new();
        for socket in candidates {
            match Self::connect(socket).await {
                Ok(cri) => return Ok(cri),
                Err(answer) => tried.push(format!("{}: {answer}", socket.display())),
            }
        }
        Err(CriError::NotFound { tried })
    }

    async fn connect(socket: &Path) -> Result<Self, String> {
        if let Err(error) = std::fs::metadata(socket) {
            return Err(if error.kind() == io::ErrorKind::NotFound {
                "does not exist".into()
            } else {
                error.to_string()
            });
        }
        let channel = grpc::connect(socket).await.map_err(|error| chain(&error))?;
        let ask = grpc::call::<_, VersionResponse>(
            &channel,
            "/runtime.v1.RuntimeService/Version",
            Request::new(VersionRequest {
                version: String::new(),
            }),
        );
        let answer = tokio::time::timeout(Duration::from_secs(2), ask).await;
        let answer = answer
            .map_err(|_| "no answer within 2 s")?
            .map_err(|status| status.message().to_owned())?;
        let version = RuntimeVersion {
            name: answer.runtime_name,
            version: answer.runtime_version,
        };
        Ok(Self {
            channel,
            socket: socket.to_owned(),
            version,
        })
    }

    /// Name and version.
    pub fn version(&self) -> &RuntimeVersion {
        &self.version
    }

    /// The runtime's process, by its end of the socket.
    pub async fn process(&self) -> Option<i32> {
        let stream = tokio::net::UnixStream::connect(&self.socket).await.ok()?;
        stream.peer_cred().ok()?.pid()
    }

    /// The socket that answered.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The runtime handlers, with their shims where the runtime tells. The default one comes first, without a name.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn handlers(&self) -> Result<Vec<Handler>, CriError> {
        let answer = self.status().await?;
        // The verbose part is the runtime's own JSON; containerd's has its configuration.
        let config: VerboseConfig = answer
            .info
            .get("config")
            .and_then(|json| serde_json::from_str(json).ok())
            .unwrap_or_default();
        let names = answer.runtime_handlers.into_iter().map(|handler| handler.name);
        Ok(handlers(names.collect(), &config))
    }

    /// The folder on the node in which containerd keeps what it knows of containers. None when it does not tell, or when
    /// this is another runtime.
    pub async fn root(&self) -> Option<PathBuf> {
        if !self.version.is_containerd() {
            return None;
        }
        root(self.status().await.ok()?.info.get("config")?)
    }

    async fn status(&self) -> Result<StatusResponse, CriError> {
        let request = StatusRequest { verbose: true };
        self.look_up("Status", "/runtime.v1.RuntimeService/Status", request)
            .await
    }

    /// The ready sandbox of a pod, found by the pod's UID and never by its name.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn sandbox_of_pod(&self, uid: &str) -> Result<Option<Sandbox>, CriError> {
        let labels = HashMap::from([("io.kubernetes.pod.uid".to_owned(), uid.to_owned())]);
        let request = ListPodSandboxRequest {
            filter: Some(PodSandboxFilter {
                state: Some(SandboxStateValue { state: SANDBOX_READY }),
                label_selector: labels,
            }),
        };
        let answer: ListPodSandboxResponse = self
            .look_up(
                "ListPodSandbox",
                "/runtime.v1.RuntimeService/ListPodSandbox",
                request,
            )
            .await?;
        let Some(item) = answer
            .items
            .into_iter()
            .find(|s| s.metadata.as_ref().is_some_and(|m| m.uid == uid))
        else {
            return Ok(None);
        };
        let metadata = item.metadata.unwrap_or_default();
        let containers = self.containers(&item.id).await?;
        let (namespace, name) = (metadata.namespace, metadata.name);
        Ok(Some(Sandbox {
            id: item.id,
            namespace,
            name,
            handler: item.runtime_handler,
            containers,
        }))
    }

    async fn containers(&self, sandbox: &str) -> Result<Vec<Container>, CriError> {
        let request = ListContainersRequest {
            filter: Some(ContainerFilter {
                pod_sandbox_id: sandbox.to_owned(),
            }),
        };
        let answer: ListContainersResponse = self
            .look_up(
                "ListContainers",
                "/runtime.v1.RuntimeService/ListContainers",
                request,
            )
            .await?;
        let mut containers = Vec::new();
        for item in answer.containers {
            containers.push(self.container(item).await?);
        }
        Ok(containers)
    }

    async fn container(&self, item: ContainerItem) -> Result<Container, CriError> {
        let request = ContainerStatusRequest {
            container_id: item.id.clone(),
            verbose: true,
        };
        let status: ContainerStatusResponse = self
            .look_up(
                "ContainerStatus",
                "/runtime.v1.RuntimeService/ContainerStatus",
                request,
            )
            .await?;
        // The verbose part is the runtime's own JSON: containerd and CRI-O both put pid and runtimeSpec there.
        let info: VerboseInfo = status
            .info
            .get("info")
            .and_then(|json| serde_json::from_str(json).ok())
            .unwrap_or_default();
        Ok(Container {
            id: item.id,
            name: item.metadata.unwrap_or_default().name,
            running: item.state == CONTAINER_RUNNING,
            pid: info.pid.filter(|pid| *pid > 0),
            runtime_type: info.runtime_type,
            binary: info.runtime_options.and_then(RuntimeOptions::binary),
            spec: info.runtime_spec,
            image: item.image.map(|image| image.image),
        })
    }

    /// Lets the runtime write the checkpoint of one container to a file on the node.
    ///
    /// When this is dropped the runtime is told to give up; it may leave the container frozen, which is why a
    /// watchdog must be armed before.
    ///
    /// # Errors
    /// What the runtime answered.
    pub async fn checkpoint(&self, id: &str, location: &Path, timeout: Duration) -> Result<(), CriError> {
        let request = CheckpointContainerRequest {
            container_id: id.to_owned(),
            location: location.to_string_lossy().into_owned(),
            timeout: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        };
        let path = "/runtime.v1.RuntimeService/CheckpointContainer";
        grpc::call::<_, Empty>(&self.channel, path, Request::new(request))
            .await
            .map(drop)
            .map_err(CriError::of("CheckpointContainer"))
    }

    /// Runs a command in a container and waits for its end; the runtime ends it after `timeout`.
    ///
    /// # Errors
    /// What the runtime answered. A command that fails is no error.
    pub async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<ExecOutput, CriError> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command,
            timeout: i64::try_from(timeout.as_secs().max(1)).unwrap_or(i64::MAX),
        };
        let path = "/runtime.v1.RuntimeService/ExecSync";
        let answer = grpc::call::<_, ExecSyncResponse>(&self.channel, path, Request::new(request)).await;
        let answer = answer.map_err(CriError::of("ExecSync"))?;
        Ok(ExecOutput {
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            code: answer.exit_code,
        })
    }

    async fn look_up<Q, A>(&self, call: &'static str, path: &'static str, request: Q) -> Result<A, CriError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let answer = tokio::time::timeout(
            LOOKUP_TIMEOUT,
            grpc::call(&self.channel, path, Request::new(request)),
        )
        .await;
        answer
            .map_err(|_| CriError::Timeout {
                call,
                limit: LOOKUP_TIMEOUT,
            })?
            .map_err(CriError::of(call))
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VerboseInfo {
    pid: Option<i32>,
    runtime_type: Option<String>,
    runtime_options: Option<RuntimeOptions>,
    runtime_spec: Option<serde_json::Value>,
}

/// Options of runc's shim (containerd.runc.v1.Options), as far as they are needed.
#[derive(Default, Deserialize)]
#[serde(default)]
struct RuntimeOptions {
    binary_name: String,
}

impl RuntimeOptions {
    fn binary(self) -> Option<String> {
        Some(self.binary_name).filter(|name| !name.is_empty())
    }
}

const SANDBOX_READY: i32 = 0;
const CONTAINER_RUNNING: i32 = 1;

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
struct VersionRequest {
    #[prost(string, tag = "1")]
    version: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VersionResponse {
    #[prost(string, tag = "2")]
    runtime_name: String,
    #[prost(string, tag = "3")]
    runtime_version: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {
    #[prost(bool, tag = "1")]
    verbose: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
    #[prost(message, repeated, tag = "3")]
    runtime_handlers: Vec<RuntimeHandler>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeHandler {
    #[prost(string, tag = "1")]
    name: String,
}

/// containerd's configuration, as far as it is needed.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct VerboseConfig {
    containerd: ContainerdConfig,
}

/// As [`VerboseConfig`], where its files are.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RootConfig {
    root_dir: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ContainerdConfig {
    default_runtime_name: String,
    runtimes: HashMap<String, RuntimeConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RuntimeConfig {
    runtime_type: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    filter: Option<PodSandboxFilter>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxFilter {
    #[prost(message, optional, tag = "2")]
    state: Option<SandboxStateValue>,
    #[prost(map = "string, string", tag = "3")]
    label_selector: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxStateValue {
    #[prost(int32, tag = "1")]
    state: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListPodSandboxResponse {
    #[prost(message, repeated, tag = "1")]
    items: Vec<SandboxItem>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxItem {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "2")]
    metadata: Option<SandboxMetadata>,
    #[prost(string, tag = "7")]
    runtime_handler: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListContainersRequest {
    #[prost(message, optional, tag = "1")]
    filter: Option<ContainerFilter>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerFilter {
    #[prost(string, tag = "3")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListContainersResponse {
    #[prost(message, repeated, tag = "1")]
    containers: Vec<ContainerItem>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerItem {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "3")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "4")]
    image: Option<ImageSpec>,
    #[prost(int32, tag = "6")]
    state: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStatusRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStatusResponse {
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckpointContainerRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    location: String,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_with_and_without_a_v() {
        let of = |version: &str| {
            RuntimeVersion {
                name: "containerd".into(),
                version: version.into(),
            }
            .major()
        };
        assert_eq!((of("v2.4.2"), of("1.7.24~ds1"), of("")), (Some(2), Some(1), None));
    }

    #[test]
    fn the_folder_of_containers_is_that_of_the_cri_plugin_and_not_that_of_containerd() {
        let told = r#"{"containerd": {"runtimes": null}, "containerdRootDir": "/data/containerd",
            "containerdEndpoint": "/run/containerd/containerd.sock",
            "rootDir": "/data/containerd/io.containerd.grpc.v1.cri",
            "stateDir": "/run/containerd/io.containerd.grpc.v1.cri"}"#;
        let folder = PathBuf::from("/data/containerd/io.containerd.grpc.v1.cri");
        assert_eq!(root(told), Some(folder));
        for nothing in ["[crio]", "{}", r#"{"rootDir": ""}"#, r#"{"rootDir": "data"}"#] {
            assert_eq!(root(nothing), None);
        }
    }

    #[tokio::test]
    async fn a_missing_socket_is_named_with_what_was_seen() {
        let error = Cri::discover(Some(Path::new("/nonexistent/runtime.sock")))
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "no container runtime answered: /nonexistent/runtime.sock: does not exist"
        );
    }
}
