//! gRPC over a unix socket. The few messages in use are declared where they are used, with the field numbers of their
//! public specifications.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

/// How long a socket may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Connects to a socket.
///
/// # Errors
/// When nobody accepts within two seconds.
pub(super) async fn connect(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let socket: PathBuf = socket.to_owned();
    // The address is never used: the connector decides.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
}

/// One unary call.
///
/// # Errors
/// The status that the server answered.
pub(super) async fn call<Q, A>(
    channel: &Channel,
    path: &'static str,
    request: Request<Q>,
) -> Result<A, Status>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<Q, A>::default();
    grpc.unary(request, PathAndQuery::from_static(path), codec)
        .await
        .map(tonic::Response::into_inner)
}
