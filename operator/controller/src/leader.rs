//! Who may act: the holder of the Lease in the operator's namespace.

use std::time::Duration;

use kube::{Client, Config};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder};

/// Name of the Lease.
const LEASE: &str = "podcheckpoint-controller";
/// Seconds that a lease is good for.
const DURATION: u64 = 15;
/// The lease is renewed so many seconds before it ends.
const GRACE: u64 = 10;
/// How long renewing may fail before this replica stops by itself: together with the time of one attempt it is less
/// than GRACE, so that nobody else leads yet.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long one request for the lease may take.
const REQUEST: Duration = Duration::from_secs(3);

/// Why there is no leadership.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaderError {
    /// No client for the lease could be made.
    #[error("the client for the lease could not be made")]
    Client(#[source] Box<kube::Error>),
    /// The client's configuration was not found.
    #[error("the API server was not found")]
    Config(#[from] kube::config::InferConfigError),
    /// The Lease could not be read or written.
    #[error("the lease could not be renewed")]
    Lease(#[from] kube_lease_manager::LeaseManagerError),
}

/// This replica's claim to the lease.
pub(crate) struct Leadership(LeaseManager);

impl Leadership {
    /// Prepares the Lease.
    ///
    /// # Errors
    /// When the API server does not let us.
    pub(crate) async fn prepare(namespace: &str, identity: &str) -> Result<Self, LeaderError> {
        let mut config = Config::infer().await?;
        // A request that hangs must not outlive the lease.
        config.connect_timeout = Some(REQUEST);
        config.read_timeout = Some(REQUEST);
        config.write_timeout = Some(REQUEST);
        let client = Client::try_from(config).map_err(|error| LeaderError::Client(Box::new(error)))?;
        let manager = LeaseManagerBuilder::new(client, LEASE)
            .with_namespace(namespace)
            .with_identity(identity)
            .with_duration(DURATION)
            .with_grace(GRACE)
            .build()
            .await?;
        Ok(Self(manager))
    }

    /// Waits until this replica leads.
    ///
    /// # Errors
    /// When the lease cannot be read for longer than is reasonable.
    pub(crate) async fn gained(&self) -> Result<(), LeaderError> {
        while !self.changed().await? {}
        Ok(())
    }

    /// Waits until this replica does not lead any more. To be polled all the time, since it renews the lease.
    ///
    /// # Errors
    /// When renewing has failed for so long that somebody else may lead soon.
    pub(crate) async fn lost(&self) -> Result<(), LeaderError> {
        while self.changed().await? {}
        Ok(())
    }

    /// Lets another replica lead at once.
    pub(crate) async fn release(&self) {
        if let Err(error) = self.0.release().await {
            tracing::warn!(%error, "the lease was not released; it will run out");
        }
    }

    /// The next change, over failures that do not last.
    async fn changed(&self) -> Result<bool, LeaderError> {
        let mut since = tokio::time::Instant::now();
        let mut last: Option<tokio::time::Instant> = None;
        loop {
            let error = match self.0.changed().await {
                Ok(leads) => return Ok(leads),
                Err(error) => error,
            };
            let now = tokio::time::Instant::now();
            // After a pause without failures it is another outage.
            if last.is_none_or(|last| now.duration_since(last) > PATIENCE) {
                since = now;
            }
            last = Some(now);
            tracing::warn!(%error, "lease");
            if now.duration_since(since) >= PATIENCE {
                return Err(error.into());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
