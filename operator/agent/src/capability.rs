//! The report on this node: what its kernel, its CRIU and its runtime handlers can do. Written when the agent starts and
//! whenever something has changed, never by a clock.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use podcheckpoint_crds::conditions::{self, Verdict as Status};
use podcheckpoint_crds::{
    AGENT_MANAGER, CheckpointNode, CheckpointNodeStatus, ConditionType, HandlerCapability, Method, Outcome,
    Reason, SandboxKind,
};
use podcheckpoint_probe::observation::Observations;
use podcheckpoint_probe::verdict::{Verdict, verdict};
use serde_json::json;

use crate::node::cri::{Cri, Handler, RuntimeVersion};
use crate::operation::Context;
use crate::plan;
use crate::sandbox;
use crate::validate;

/// Looks at the node and writes the report if it differs from the last one.
pub async fn report(client: &Client, node: &str, context: &Context, last: &mut Option<CheckpointNodeStatus>) {
    let Some(mut status) = look(context).await else {
        return;
    };
    (status.patches, status.unreadable_journal) = context.security.in_force();
    if last.as_ref() == Some(&status) {
        return;
    }
    let mut written = status.clone();
    written.checked_time = Some(Time(k8s_openapi::jiff::Timestamp::now()));
    stamp(&mut written);
    match write(client, node, &written).await {
        Ok(()) => *last = Some(status),
        // The report is made by the controller with the agent; without one there is nothing to fill.
        Err(kube::Error::Api(answer)) if answer.code == 404 => {
            tracing::debug!("no report on this node is wanted")
        }
        Err(error) => tracing::warn!(%error, "the report on this node is not written"),
    }
}

async fn look(context: &Context) -> Option<CheckpointNodeStatus> {
    let cri = Cri::discover(context.runtime_socket.as_deref()).await.ok()?;
    let handlers = cri.handlers().await.unwrap_or_default();
    let seen = context.node.look(cri.process().await?).await.ok()?;
    Some(status(&seen, cri.version(), handlers, context.kubelet.is_some()))
}

/// The report, without times; pure.
fn status(
    seen: &Observations,
    runtime: &RuntimeVersion,
    handlers: Vec<Handler>,
    kubelet: bool,
) -> CheckpointNodeStatus {
    let verdict = verdict(seen);
    let handlers: Vec<_> = handlers
        .into_iter()
        .map(|handler| capability(handler, runtime, kubelet))
        .collect();
    let missing = seen.kernel.features.iter().filter(|(_, present)| !**present);
    CheckpointNodeStatus {
        checked_time: None,
        kernel: Some(seen.kernel.release.clone()),
        runtime: Some(format!("{} {}", runtime.name, runtime.version)),
        criu_version: seen.criu.as_ref().and_then(|criu| criu.version.clone()),
        security_modules: seen.kernel.lsm.clone().unwrap_or_default(),
        yama_ptrace_scope: seen.kernel.yama,
        missing_features: missing.map(|(name, _)| name.clone()).collect(),
        summary: Some(summary(&handlers)),
        handlers,
        findings: validate::findings(&verdict, &Default::default()),
        patches: Vec::new(),
        unreadable_journal: Vec::new(),
        conditions: vec![ready(&verdict)],
    }
}

fn capability(handler: Handler, runtime: &RuntimeVersion, kubelet: bool) -> HandlerCapability {
    let facts = plan::Facts {
        runtime: runtime.name.clone(),
        runtime_major: runtime.major(),
        sandbox: sandbox::recognise(&sandbox::Facts {
            handler: handler.name.clone(),
            runtime_type: handler.runtime_type.clone(),
            ..sandbox::Facts::default()
        }),
        containers: 1,
        kubelet,
        // As with the machine below.
        guest: Ok(()),
    };
    let (mut methods, mut skipped_methods) = plan::usable(&facts);
    // Whether a machine can be saved is only seen when there is one.
    if facts.sandbox.kind == SandboxKind::Kata {
        skipped_methods.retain(|skipped| skipped.method != Method::VmSnapshot);
        methods.push(Method::VmSnapshot);
    }
    HandlerCapability {
        name: handler.name,
        runtime_type: handler.runtime_type,
        methods,
        skipped_methods,
    }
}

/// `default: CRI, Kubelet, Direct; kata: Guest, VMSnapshot`
fn summary(handlers: &[HandlerCapability]) -> String {
    let words = |handler: &HandlerCapability| {
        let name = if handler.name.is_empty() {
            "default"
        } else {
            &handler.name
        };
        let methods: Vec<&str> = handler
            .methods
            .iter()
            .map(|method: &Method| method.as_str())
            .collect();
        let methods = if methods.is_empty() {
            "none".to_owned()
        } else {
            methods.join(", ")
        };
        format!("{name}: {methods}")
    };
    handlers.iter().map(words).collect::<Vec<_>>().join("; ")
}

fn ready(verdict: &Verdict) -> k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition {
    let (reason, evidence) = verdict
        .root()
        .map_or((Reason::ProbeIncomplete, ""), |f| (f.reason, f.evidence.as_str()));
    let status = match verdict.outcome {
        Outcome::Pass | Outcome::Degraded => Status::True,
        Outcome::Fail => Status::False,
        Outcome::Unknown => Status::Unknown,
    };
    let message = format!("{evidence}. {}", reason.doc().remedy);
    let epoch = Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH);
    conditions::condition(
        ConditionType::Ready,
        status,
        reason,
        message.trim(),
        None,
        &[],
        &epoch,
    )
}

fn stamp(status: &mut CheckpointNodeStatus) {
    for condition in &mut status.conditions {
        condition.last_transition_time = Time(k8s_openapi::jiff::Timestamp::now());
    }
}

async fn write(client: &Client, node: &str, status: &CheckpointNodeStatus) -> Result<(), kube::Error> {
    let api: Api<CheckpointNode> = Api::all(client.clone());
    let body = json!({
        "apiVersion": "podcheckpoint.dev/v1alpha1", "kind": "CheckpointNode", "metadata": { "name": node }, "status": status,
    });
    let params = PatchParams::apply(AGENT_MANAGER).force();
    api.patch_status(node, &params, &Patch::Apply(&body))
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler(name: &str, runtime_type: &str) -> Handler {
        Handler {
            name: name.into(),
            runtime_type: Some(runtime_type.into()),
        }
    }

    #[test]
    fn each_handler_has_its_own_methods() {
        let runtime = RuntimeVersion {
            name: "containerd".into(),
            version: "v2.4.2".into(),
        };
        let handlers = vec![
            handler("", "io.containerd.runc.v2"),
            handler("kata", "io.containerd.kata.v2"),
        ];
        let status = status(&Observations::default(), &runtime, handlers, false);
        assert_eq!(
            status.summary.as_deref(),
            Some("default: CRI, Direct; kata: Guest, VMSnapshot")
        );
        assert_eq!(
            status.handlers[1].skipped_methods[0].reason,
            "OciRuntimeUnsupported"
        );
    }

    #[test]
    fn a_node_that_was_not_looked_at_is_not_called_ready() {
        let condition = ready(&verdict(&Observations::default()));
        assert_eq!(
            (condition.status.as_str(), condition.reason.as_str()),
            ("Unknown", "ProbeIncomplete")
        );
    }
}
