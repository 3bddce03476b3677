//! The only reader: gathers what the plan needs. Objects and agents come from caches; a pod or a node by one GET, and
//! only when the plan will look at it.

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::reflector::store::WriterDropped;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client, ResourceExt};
use podcheckpoint_crds::PodCheckpoint;

use crate::agent_pod;
use crate::plan::{Settings, World, bound_node};

/// Why something could not be observed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ObserveError {
    /// The API server could not be asked.
    #[error("the API server could not be read")]
    Api(#[from] kube::Error),
    /// The watch that fills a cache has ended.
    #[error("the cache of agents is not filled any more")]
    Cache(#[from] WriterDropped),
}

/// Where things are read.
#[derive(Clone)]
pub(crate) struct Reader {
    /// API server.
    pub(crate) client: Client,
    /// Agents' pods.
    pub(crate) agents: Store<Pod>,
    /// What does not change.
    pub(crate) settings: Settings,
}

impl Reader {
    /// Observes everything about one object.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub(crate) async fn observe(&self, object: PodCheckpoint) -> Result<World, ObserveError> {
        // An object that has ended rests: thousands of them must cost nothing.
        let rests = object.is_terminal()
            && object.metadata.deletion_timestamp.is_none()
            && !object.has_open_patches();
        let bound = bound_node(&object).map(str::to_owned);
        let deleting = object.metadata.deletion_timestamp.is_some();
        let pod = match bound {
            None if !rests && !deleting => self.source_pod(&object).await?,
            _ => None,
        };
        let of_pod = || pod.as_ref().and_then(|p| p.spec.as_ref()?.node_name.clone());
        let node = match bound.clone().or_else(of_pod).filter(|_| !rests) {
            Some(name) => Api::<Node>::all(self.client.clone()).get_opt(&name).await?,
            None => None,
        };
        let agent = match bound.filter(|_| !rests) {
            Some(node) => self.agent(&node).await?,
            None => None,
        };
        Ok(World {
            object,
            pod,
            node,
            agent,
            agent_denied: None,
            settings: self.settings.clone(),
        })
    }

    /// The object as it stands now, past the cache.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub(crate) async fn current(
        &self,
        object: &PodCheckpoint,
    ) -> Result<Option<PodCheckpoint>, ObserveError> {
        let api: Api<PodCheckpoint> =
            Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default());
        let current = api.get_opt(&object.name_any()).await?;
        Ok(current.filter(|c| c.uid() == object.uid()))
    }

    /// The agent's pod on a node. One that is being deleted does not count.
    async fn agent(&self, node: &str) -> Result<Option<Pod>, WriterDropped> {
        self.agents.wait_until_ready().await?;
        let key = ObjectRef::new(&agent_pod::name(node)).within(&self.settings.namespace);
        let pod = self.agents.get(&key);
        let lives = pod.filter(|p| p.metadata.deletion_timestamp.is_none());
        Ok(lives.map(|p| (*p).clone()))
    }

    async fn source_pod(&self, object: &PodCheckpoint) -> Result<Option<Pod>, kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default());
        api.get_opt(&object.spec.source_pod_name).await
    }
}
