//! The kubelet's checkpoint endpoint: POST /checkpoint/NAMESPACE/POD/CONTAINER, resource nodes/checkpoint.

use std::path::PathBuf;
use std::time::Duration;

use podcheckpoint_crds::Reason;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Deserialize;

/// The kubelet did not take the checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// Its address, authority or the agent's token are not usable.
    #[error("the kubelet cannot be asked: {0}")]
    Setup(String),
    /// It could not be reached, or its certificate was not accepted.
    #[error("the kubelet at {address}: {message}")]
    Transport {
        /// Address that was asked.
        address: String,
        /// What went wrong, with its causes.
        message: String,
    },
    /// It answered with an error.
    #[error("the kubelet answered {code}: {message}")]
    Answer {
        /// HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
}

impl KubeletError {
    /// The reason, unless it is in the runtime's words that the kubelet passes on.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Setup(_) => Some(Reason::KubeletUnreachable),
            Self::Transport { message, .. } if message.contains("certificate") => {
                Some(Reason::KubeletUntrusted)
            }
            Self::Transport { .. } => Some(Reason::KubeletUnreachable),
            Self::Answer { code: 401 | 403, .. } => Some(Reason::KubeletDenied),
            Self::Answer { code: 404, .. } => Some(Reason::KubeletCheckpointUnavailable),
            Self::Answer { .. } => None,
        }
    }
}

/// The kubelet of this node.
#[derive(Clone)]
pub struct Kubelet {
    client: kube::Client,
    address: String,
}

impl Kubelet {
    /// The kubelet at an address, asked with the agent's own token. Its certificate is verified against `authority`
    /// (PEM), or else against the cluster's.
    ///
    /// # Errors
    /// When the agent does not run in a cluster or the authority is no certificate.
    pub fn new(host: &str, port: u16, authority: Option<&str>) -> Result<Self, KubeletError> {
        let setup = |error: &dyn std::fmt::Display| KubeletError::Setup(error.to_string());
        let mut config = kube::Config::incluster().map_err(|e| setup(&e))?;
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.to_owned()
        };
        let address = format!("https://{host}:{port}");
        config.cluster_url = address.parse().map_err(|e| setup(&e))?;
        if let Some(pem) = authority {
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
            let certificates = certificates.map_err(|e| setup(&e))?;
            config.root_cert = Some(certificates.into_iter().map(|c| c.to_vec()).collect());
        }
        // The caller owns the deadline of a dump.
        config.read_timeout = None;
        let client = kube::Client::try_from(config).map_err(|e| setup(&e))?;
        Ok(Self { client, address })
    }

    /// Lets the kubelet take the checkpoint of a container; the file's path on the node.
    ///
    /// # Errors
    /// When it cannot be reached or answers with an error.
    pub async fn checkpoint(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        timeout: Duration,
    ) -> Result<PathBuf, KubeletError> {
        let path = format!(
            "/checkpoint/{namespace}/{pod}/{container}?timeout={}",
            timeout.as_secs()
        );
        let request = http::Request::post(path)
            .body(Vec::new())
            .map_err(|e| KubeletError::Setup(e.to_string()))?;
        let answer: Items = self
            .client
            .request(request)
            .await
            .map_err(|error| self.explain(&error))?;
        answer
            .items
            .into_iter()
            .next()
            .map(PathBuf::from)
            .ok_or_else(|| KubeletError::Answer {
                code: 200,
                message: "no file was named".into(),
            })
    }

    fn explain(&self, error: &kube::Error) -> KubeletError {
        match error {
            kube::Error::Api(status) => KubeletError::Answer {
                code: status.code,
                message: status.message.clone(),
            },
            other => {
                let mut message = other.to_string();
                let mut source = std::error::Error::source(other);
                while let Some(error) = source {
                    message = format!("{message}: {error}");
                    source = error.source();
                }
                KubeletError::Transport {
                    address: self.address.clone(),
                    message,
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct Items {
    items: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_runtime_is_left_to_the_signatures() {
        assert_eq!(
            KubeletError::Answer {
                code: 500,
                message: "rpc error".into()
            }
            .reason(),
            None
        );
    }

    #[test]
    fn a_refused_token_is_told_from_a_missing_endpoint() {
        let reason = |code| {
            KubeletError::Answer {
                code,
                message: String::new(),
            }
            .reason()
        };
        assert_eq!(reason(403), Some(Reason::KubeletDenied));
        assert_eq!(reason(404), Some(Reason::KubeletCheckpointUnavailable));
    }
}
