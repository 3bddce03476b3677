//! Which method takes the checkpoint, and why the others do not. Pure: no client, no clock.

use podcheckpoint_crds::{Consistency, Method, Reason, SkippedMethod};

/// What is known of the node and the target.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Name of the container runtime.
    pub runtime: String,
    /// Its major version.
    pub runtime_major: Option<u32>,
    /// Shims of the chosen containers.
    pub shims: Vec<Option<String>>,
    /// Runtime handler of the pod.
    pub handler: String,
    /// How many containers are to be checkpointed.
    pub containers: usize,
    /// Whether the agent may ask the kubelet.
    pub kubelet: bool,
}

/// How to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The method.
    pub method: Method,
    /// Whether the containers will be one cut.
    pub consistency: Consistency,
}

/// The order in which Auto tries them. Direct comes first for several containers, since only it can freeze all of them
/// before it dumps any; for one, CRI writes the layout that most tools know.
fn preference(containers: usize) -> [Method; 4] {
    if containers > 1 {
        [Method::Direct, Method::Cri, Method::Kubelet, Method::VmSnapshot]
    } else {
        [Method::Cri, Method::Kubelet, Method::Direct, Method::VmSnapshot]
    }
}

/// Chooses the method; the second value has every other one with the reason why it is not used.
///
/// # Errors
/// Reason and message when no method can be used.
pub fn choose(wanted: Method, facts: &Facts) -> (Result<Plan, (Reason, String)>, Vec<SkippedMethod>) {
    let mut chosen = None;
    let mut skipped = Vec::new();
    for method in preference(facts.containers) {
        let obstacle = obstacle(method, facts);
        if chosen.is_none() && obstacle.is_none() && (wanted == Method::Auto || wanted == method) {
            chosen = Some(method);
            continue;
        }
        let preferred = || {
            (
                Reason::MethodNotChosen,
                "another method was asked for or preferred".to_owned(),
            )
        };
        let (reason, message) = obstacle.unwrap_or_else(preferred);
        skipped.push(SkippedMethod {
            method,
            reason: reason.as_str().to_owned(),
            message,
        });
    }
    let plan = chosen.map(|method| Plan {
        method,
        consistency: consistency(method, facts.containers),
    });
    (plan.ok_or_else(|| no_method(wanted, facts)), skipped)
}

/// The methods that can be used, and why the others cannot.
pub fn usable(facts: &Facts) -> (Vec<Method>, Vec<SkippedMethod>) {
    let (mut methods, mut skipped) = (Vec::new(), Vec::new());
    for method in preference(facts.containers) {
        match obstacle(method, facts) {
            None => methods.push(method),
            Some((reason, message)) => skipped.push(SkippedMethod {
                method,
                reason: reason.as_str().to_owned(),
                message,
            }),
        }
    }
    (methods, skipped)
}

fn consistency(method: Method, containers: usize) -> Consistency {
    if containers <= 1 || method == Method::Direct {
        Consistency::Pod
    } else {
        Consistency::PerContainer
    }
}

/// Why nothing can be done: the obstacle of the method that was asked for, or of the most preferred one.
fn no_method(wanted: Method, facts: &Facts) -> (Reason, String) {
    let first = if wanted == Method::Auto {
        Method::Cri
    } else {
        wanted
    };
    obstacle(first, facts).unwrap_or((
        Reason::MethodUnavailable,
        "no method can be used on this node".into(),
    ))
}

fn obstacle(method: Method, facts: &Facts) -> Option<(Reason, String)> {
    match method {
        Method::Auto => None,
        Method::VmSnapshot => Some((
            Reason::MethodUnavailable,
            "this version takes no snapshots of virtual machines".into(),
        )),
        Method::Cri => unsupported_shim(facts).or_else(|| too_old(facts)),
        Method::Kubelet if !facts.kubelet => Some((
            Reason::MethodUnavailable,
            "the agent may not ask the kubelet (chart value agent.kubelet.enabled)".into(),
        )),
        Method::Kubelet => unsupported_shim(facts).or_else(|| too_old(facts)),
        Method::Direct => unsupported_shim(facts).or_else(|| not_containerd(facts)),
    }
}

fn too_old(facts: &Facts) -> Option<(Reason, String)> {
    let old = facts.runtime == "containerd" && facts.runtime_major.is_some_and(|major| major < 2);
    old.then(|| {
        (
            Reason::RuntimeTooOld,
            "containerd before 2.0 has no CheckpointContainer".into(),
        )
    })
}

fn not_containerd(facts: &Facts) -> Option<(Reason, String)> {
    let other = facts.runtime != "containerd";
    other.then(|| {
        (
            Reason::MethodUnavailable,
            format!("{} has no task service", facts.runtime),
        )
    })
}

/// Only shims that hand over to an OCI runtime with CRIU can checkpoint; the VMM's process on the node is not the
/// pod's, so nothing is tried on it.
fn unsupported_shim(facts: &Facts) -> Option<(Reason, String)> {
    let shim = facts
        .shims
        .iter()
        .flatten()
        .find(|shim| !shim.starts_with("io.containerd.runc."))?;
    Some((
        Reason::OciRuntimeUnsupported,
        format!("the shim {shim} (handler {:?}) has no checkpoint", facts.handler),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            runtime: "containerd".into(),
            runtime_major: Some(2),
            shims: vec![Some("io.containerd.runc.v2".into())],
            handler: String::new(),
            containers: 1,
            kubelet: true,
        }
    }

    fn chosen(wanted: Method, facts: &Facts) -> Result<Method, Reason> {
        choose(wanted, facts)
            .0
            .map(|plan| plan.method)
            .map_err(|(reason, _)| reason)
    }

    #[test]
    fn one_container_is_left_to_the_runtime() {
        assert_eq!(chosen(Method::Auto, &facts()), Ok(Method::Cri));
    }

    #[test]
    fn several_containers_are_frozen_together() {
        let facts = Facts {
            containers: 2,
            ..facts()
        };
        let plan = choose(Method::Auto, &facts).0.unwrap();
        assert_eq!(
            plan,
            Plan {
                method: Method::Direct,
                consistency: Consistency::Pod
            }
        );
    }

    #[test]
    fn several_containers_through_the_runtime_are_said_not_to_be_one_cut() {
        let facts = Facts {
            containers: 2,
            ..facts()
        };
        assert_eq!(
            choose(Method::Cri, &facts).0.unwrap().consistency,
            Consistency::PerContainer
        );
    }

    #[test]
    fn a_runtime_without_the_call_is_got_around() {
        let facts = Facts {
            runtime_major: Some(1),
            ..facts()
        };
        assert_eq!(chosen(Method::Auto, &facts), Ok(Method::Direct));
        assert_eq!(chosen(Method::Cri, &facts), Err(Reason::RuntimeTooOld));
    }

    #[test]
    fn a_vmm_is_never_dumped_in_place_of_its_guest() {
        let facts = Facts {
            shims: vec![Some("io.containerd.kata.v2".into())],
            ..facts()
        };
        assert_eq!(chosen(Method::Auto, &facts), Err(Reason::OciRuntimeUnsupported));
    }

    #[test]
    fn every_method_is_either_used_or_skipped_with_a_documented_reason() {
        let (plan, skipped) = choose(Method::Auto, &facts());
        let mut methods: Vec<_> = skipped.iter().map(|s| s.method).collect();
        methods.push(plan.unwrap().method);
        methods.sort();
        assert_eq!(
            methods,
            [Method::Cri, Method::Kubelet, Method::Direct, Method::VmSnapshot]
        );
        assert!(skipped.iter().all(|s| Reason::parse(&s.reason).is_some()));
    }
}
