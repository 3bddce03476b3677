//! The only reader: gathers what the plan needs. The object and the agents come from caches, a pod or node by one GET
//! and only when the plan will look at it.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client, ResourceExt};
use podcheckpoint_crds::PodCheckpoint;

use crate::agent_pod;
use crate::config::Config;
use crate::plan::{World, bound_node};

/// Where things are read.
#[derive(Clone)]
pub struct Reader {
    /// API server.
    pub client: Client,
    /// Agents' pods.
    pub agents: Store<Pod>,
    /// Namespace of the operator.
    pub namespace: String,
    /// Configuration.
    pub config: Arc<Config>,
}

impl Reader {
    /// Observes everything about one object.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn observe(&self, object: &PodCheckpoint) -> Result<World, kube::Error> {
        let quiet = object.is_terminal() && object.metadata.deletion_timestamp.is_none();
        let bound = bound_node(object).map(str::to_owned);
        let pod = if bound.is_none() && !quiet {
            self.source_pod(object).await?
        } else {
            None
        };
        let node_name = bound
            .clone()
            .or_else(|| pod.as_ref().and_then(|p| p.spec.as_ref()?.node_name.clone()));
        let node = match node_name.as_deref() {
            Some(name) if !quiet && !name.is_empty() => self.node(name).await?,
            _ => None,
        };
        Ok(World {
            object: object.clone(),
            pod,
            node,
            agent: bound.as_deref().and_then(|node| self.agent(node)),
            agent_denied: None,
            operator_namespace: self.namespace.clone(),
            start_timeout: self.config.agent.start_timeout_seconds,
        })
    }

    /// The agent's pod on a node, from the cache. One that is being deleted does not count.
    pub fn agent(&self, node: &str) -> Option<Pod> {
        let key = ObjectRef::new(&agent_pod::name(node)).within(&self.namespace);
        let pod = self.agents.get(&key)?;
        pod.metadata.deletion_timestamp.is_none().then(|| (*pod).clone())
    }

    async fn source_pod(&self, object: &PodCheckpoint) -> Result<Option<Pod>, kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default());
        api.get_opt(&object.spec.source_pod_name).await
    }

    async fn node(&self, name: &str) -> Result<Option<Node>, kube::Error> {
        Api::<Node>::all(self.client.clone()).get_opt(name).await
    }
}
