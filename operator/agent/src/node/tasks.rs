//! containerd's own task service (containerd.services.tasks.v1.Tasks), for the method Direct.

use std::path::Path;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Request, Status};

use super::grpc;

/// A call to the task service failed.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// The socket did not accept.
    #[error("the task service cannot be reached")]
    Connect(#[source] tonic::transport::Error),
    /// The service answered with an error.
    #[error("{call}: {}", status.message())]
    Status {
        /// Name of the call.
        call: &'static str,
        /// Its answer.
        status: Status,
    },
    /// The service did not answer in time.
    #[error("{call}: no answer within {} ms", limit.as_millis())]
    Timeout {
        /// Name of the call.
        call: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The namespace header could not be made.
    #[error("the namespace is no header value")]
    Header,
}

impl TasksError {
    /// Whether containerd knows no such container, or no longer.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status, .. } if status.code() == tonic::Code::NotFound)
    }
}

/// A connection to the task service, in the namespace of Kubernetes.
#[derive(Clone, Debug)]
pub struct Tasks {
    channel: Channel,
}

impl Tasks {
    /// Connects to containerd's socket.
    ///
    /// # Errors
    /// When nobody accepts.
    pub async fn connect(socket: &Path) -> Result<Self, TasksError> {
        Ok(Self {
            channel: grpc::connect(socket).await.map_err(TasksError::Connect)?,
        })
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// What containerd answered.
    pub async fn pause(&self, id: &str) -> Result<(), TasksError> {
        let request = ContainerId {
            container_id: id.to_owned(),
        };
        self.call::<_, Empty>("Pause", "/containerd.services.tasks.v1.Tasks/Pause", request)
            .await
            .map(drop)
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// What containerd answered.
    pub async fn resume(&self, id: &str) -> Result<(), TasksError> {
        let request = ContainerId {
            container_id: id.to_owned(),
        };
        self.call::<_, Empty>("Resume", "/containerd.services.tasks.v1.Tasks/Resume", request)
            .await
            .map(drop)
    }

    /// Thaws a container, or gives up. A call that was given up may still be carried out later.
    ///
    /// # Errors
    /// What containerd answered, or that it did not.
    pub async fn resume_within(&self, id: &str, limit: Duration) -> Result<(), TasksError> {
        let answer = tokio::time::timeout(limit, self.resume(id)).await;
        answer.map_err(|_| TasksError::Timeout {
            call: "Resume",
            limit,
        })?
    }

    /// Whether containerd believes that a container is paused. Its shim keeps this by itself and does not look at the
    /// freezer.
    ///
    /// # Errors
    /// What containerd answered, or that it did not.
    pub async fn is_paused(&self, id: &str, limit: Duration) -> Result<bool, TasksError> {
        let request = ContainerId {
            container_id: id.to_owned(),
        };
        let ask = self.call::<_, GetResponse>("Get", "/containerd.services.tasks.v1.Tasks/Get", request);
        let answer = tokio::time::timeout(limit, ask).await;
        let answer = answer.map_err(|_| TasksError::Timeout { call: "Get", limit })??;
        Ok(answer.process.is_some_and(|process| process.status == PAUSED))
    }

    /// Lets the OCI runtime write CRIU's images straight to a folder; the container goes on afterwards.
    ///
    /// # Errors
    /// What containerd answered.
    pub async fn checkpoint(&self, id: &str, images: &Path, work: &Path) -> Result<(), TasksError> {
        let path = |p: &Path| p.to_string_lossy().into_owned();
        let options = CheckpointOptions {
            image_path: path(images),
            work_path: path(work),
        };
        let options = Any {
            type_url: "containerd.runc.v1.CheckpointOptions".into(),
            value: prost::Message::encode_to_vec(&options),
        };
        let request = CheckpointTaskRequest {
            container_id: id.to_owned(),
            options: Some(options),
        };
        self.call::<_, Empty>(
            "Checkpoint",
            "/containerd.services.tasks.v1.Tasks/Checkpoint",
            request,
        )
        .await
        .map(drop)
    }

    async fn call<Q, A>(&self, call: &'static str, path: &'static str, request: Q) -> Result<A, TasksError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut request = Request::new(request);
        let namespace = "k8s.io".parse().map_err(|_| TasksError::Header)?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        grpc::call(&self.channel, path, request)
            .await
            .map_err(|status| TasksError::Status { call, status })
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

/// containerd.v1.types.Status.PAUSED
const PAUSED: i32 = 4;

#[derive(Clone, PartialEq, prost::Message)]
struct GetResponse {
    #[prost(message, optional, tag = "1")]
    process: Option<TaskProcess>,
}

/// containerd.v1.types.Process
#[derive(Clone, PartialEq, prost::Message)]
struct TaskProcess {
    #[prost(int32, tag = "4")]
    status: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerId {
    #[prost(string, tag = "1")]
    container_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckpointTaskRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(message, optional, tag = "3")]
    options: Option<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// containerd.runc.v1.CheckpointOptions; what is left out is false.
#[derive(Clone, PartialEq, prost::Message)]
struct CheckpointOptions {
    #[prost(string, tag = "8")]
    image_path: String,
    #[prost(string, tag = "9")]
    work_path: String,
}
