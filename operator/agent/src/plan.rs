//! Which method takes the checkpoint, and why the others do not. Pure: no client, no clock.

use podcheckpoint_crds::{Consistency, Method, Reason, SandboxKind, SkippedMethod};

use crate::sandbox::{Recognised, VmmKind};

/// What is known of the node and the target.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Name of the container runtime.
    pub runtime: String,
    /// Its major version.
    pub runtime_major: Option<u32>,
    /// What the pod's processes run in.
    pub sandbox: Recognised,
    /// How many containers are to be checkpointed.
    pub containers: usize,
    /// Whether the agent may ask the kubelet.
    pub kubelet: bool,
    /// Whether CRIU can be run in the pod's virtual machine, if it is in one, and why not.
    pub guest: Result<(), (Reason, String)>,
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
/// before it dumps any; for one, CRI writes the layout that most tools know. Of a pod in a machine the processes are
/// saved rather than the machine, whose snapshot is the largest and is restored as a machine and not as containers.
/// gVisor's own checkpoint meets none of the others.
fn preference(containers: usize) -> [Method; 6] {
    use Method::{Cri, Direct, Guest, Gvisor, Kubelet, VmSnapshot};
    if containers > 1 {
        [Direct, Cri, Kubelet, Guest, VmSnapshot, Gvisor]
    } else {
        [Cri, Kubelet, Direct, Guest, VmSnapshot, Gvisor]
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
    let whole = matches!(method, Method::Direct | Method::Gvisor);
    if containers <= 1 || whole {
        Consistency::Pod
    } else {
        Consistency::PerContainer
    }
}

/// Why nothing can be done: the obstacle of the method that was asked for, or of the one that comes nearest.
fn no_method(wanted: Method, facts: &Facts) -> (Reason, String) {
    let first = match wanted {
        Method::Auto if is_machine(facts) => Method::VmSnapshot,
        Method::Auto => Method::Cri,
        _ => wanted,
    };
    obstacle(first, facts).unwrap_or((
        Reason::MethodUnavailable,
        "no method can be used on this node".into(),
    ))
}

fn obstacle(method: Method, facts: &Facts) -> Option<(Reason, String)> {
    match method {
        Method::Auto => None,
        Method::Guest => not_in_a_guest(facts),
        Method::VmSnapshot => no_snapshot(facts),
        Method::Gvisor => not_gvisor(facts),
        Method::Cri => not_on_the_node(facts).or_else(|| too_old(facts)),
        Method::Kubelet if !facts.kubelet => Some((
            Reason::MethodUnavailable,
            "the agent may not ask the kubelet (chart value agent.kubelet.enabled)".into(),
        )),
        Method::Kubelet => not_on_the_node(facts).or_else(|| too_old(facts)),
        Method::Direct => not_on_the_node(facts).or_else(|| not_containerd(facts)),
    }
}

fn is_machine(facts: &Facts) -> bool {
    matches!(
        facts.sandbox.kind,
        SandboxKind::Kata | SandboxKind::VirtualMachine
    )
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

/// Only what runs on the node's own kernel can be dumped from there. A virtual machine monitor or gVisor's kernel is a
/// process of the node, but not the pod's, so nothing is tried on it.
fn not_on_the_node(facts: &Facts) -> Option<(Reason, String)> {
    let what = match facts.sandbox.kind {
        SandboxKind::Container => return None,
        // A runtime that tells nothing of its shim is believed to run containers.
        SandboxKind::Unknown if facts.sandbox.evidence.is_empty() => return None,
        SandboxKind::Unknown => "the sandbox is of no kind that is known",
        SandboxKind::Kata | SandboxKind::VirtualMachine => {
            "the pod's processes are in a virtual machine, where nothing on the node reaches them"
        }
        SandboxKind::Gvisor => "the pod's processes are inside gVisor's kernel",
    };
    // All that was seen is in status.runtime.sandbox; here it would be said once for each method.
    let seen = match facts.sandbox.machine() {
        Some(machine) => format!("{}, process {}", machine.vmm.as_str(), machine.pid),
        None => facts.sandbox.evidence.first().cloned().unwrap_or_default(),
    };
    Some((Reason::OciRuntimeUnsupported, format!("{what} ({seen})")))
}

fn not_gvisor(facts: &Facts) -> Option<(Reason, String)> {
    let other = facts.sandbox.kind != SandboxKind::Gvisor;
    other.then(|| {
        (
            Reason::MethodUnavailable,
            "the pod does not run on gVisor's kernel".to_owned(),
        )
    })
}

fn not_in_a_guest(facts: &Facts) -> Option<(Reason, String)> {
    if !is_machine(facts) {
        return Some(no_machine());
    }
    facts.guest.clone().err()
}

fn no_machine() -> (Reason, String) {
    let text = "the pod runs in no virtual machine".to_owned();
    (Reason::MethodUnavailable, text)
}

/// Why the machine of the sandbox cannot be saved, as far as that is known without asking its monitor.
fn no_snapshot(facts: &Facts) -> Option<(Reason, String)> {
    let seen = || facts.sandbox.evidence.join("; ");
    if !is_machine(facts) {
        return Some(no_machine());
    }
    let Some(machine) = facts.sandbox.machine() else {
        return Some((Reason::VmMonitorNotFound, seen()));
    };
    if matches!(machine.vmm, VmmKind::Dragonball | VmmKind::StratoVirt) {
        let text = format!("{} gives no snapshot: {}", machine.vmm.as_str(), seen());
        return Some((Reason::VmmUnsupported, text));
    }
    if let Some(how) = &machine.confidential {
        let text = format!("the guest's memory is kept from the node by {how}: {}", seen());
        return Some((Reason::VmConfidential, text));
    }
    let reachable = machine.monitor.is_some() || machine.domain.is_some();
    (!reachable).then(|| {
        let text = format!("{} has no control socket: {}", machine.vmm.as_str(), seen());
        (Reason::VmMonitorNotFound, text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{Machine, ShimKind, SocketPath};

    fn facts() -> Facts {
        Facts {
            runtime: "containerd".into(),
            runtime_major: Some(2),
            sandbox: Recognised {
                kind: SandboxKind::Container,
                ..Recognised::default()
            },
            containers: 1,
            kubelet: true,
            guest: Err((Reason::GuestToolMissing, "no criu".into())),
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

    fn in_a_machine(vmm: VmmKind, change: impl Fn(&mut Machine)) -> Facts {
        let mut machine = Machine {
            vmm,
            pid: 11,
            started: 1,
            arguments: Vec::new(),
            monitor: Some(SocketPath::own("/m")),
            vsock: None,
            memory: None,
            confidential: None,
            domain: None,
            shim: ShimKind::Other,
        };
        change(&mut machine);
        let sandbox = Recognised {
            kind: SandboxKind::Kata,
            machine: Some(machine),
            evidence: vec!["seen".into()],
            ..Recognised::default()
        };
        Facts { sandbox, ..facts() }
    }

    #[test]
    fn a_vmm_is_never_dumped_in_place_of_its_guest() {
        let facts = in_a_machine(VmmKind::Qemu, |_| {});
        for method in [Method::Cri, Method::Kubelet, Method::Direct] {
            assert_eq!(chosen(method, &facts), Err(Reason::OciRuntimeUnsupported));
        }
        assert_eq!(chosen(Method::Auto, &facts), Ok(Method::VmSnapshot));
    }

    #[test]
    fn processes_in_a_guest_are_saved_rather_than_the_guest_if_it_has_criu() {
        let mut facts = in_a_machine(VmmKind::Qemu, |_| {});
        assert_eq!(chosen(Method::Guest, &facts), Err(Reason::GuestToolMissing));
        let skipped = choose(Method::Auto, &facts).1;
        let why = skipped.iter().find(|s| s.method == Method::Guest).unwrap();
        assert_eq!(why.message, "no criu");
        facts.guest = Ok(());
        facts.containers = 2;
        let plan = choose(Method::Auto, &facts).0.unwrap();
        assert_eq!(
            (plan.method, plan.consistency),
            (Method::Guest, Consistency::PerContainer)
        );
    }

    #[test]
    fn what_makes_a_snapshot_impossible_is_the_reason_of_auto() {
        let confidential = in_a_machine(VmmKind::Qemu, |m| m.confidential = Some("tdx".into()));
        assert_eq!(chosen(Method::Auto, &confidential), Err(Reason::VmConfidential));
        let closed = in_a_machine(VmmKind::Qemu, |m| m.monitor = None);
        assert_eq!(chosen(Method::Auto, &closed), Err(Reason::VmMonitorNotFound));
        let inside = in_a_machine(VmmKind::Dragonball, |_| {});
        assert_eq!(chosen(Method::Auto, &inside), Err(Reason::VmmUnsupported));
    }

    #[test]
    fn a_pod_on_the_nodes_kernel_has_no_machine_to_save() {
        assert_eq!(
            chosen(Method::VmSnapshot, &facts()),
            Err(Reason::MethodUnavailable)
        );
    }

    #[test]
    fn a_pod_on_gvisors_kernel_is_saved_by_that_kernel_and_nothing_else() {
        let facts = Facts {
            sandbox: Recognised {
                kind: SandboxKind::Gvisor,
                evidence: vec!["seen".into()],
                ..Recognised::default()
            },
            containers: 2,
            ..facts()
        };
        let (plan, skipped) = choose(Method::Auto, &facts);
        let expected = Plan {
            method: Method::Gvisor,
            consistency: Consistency::Pod,
        };
        assert_eq!(plan, Ok(expected));
        assert_eq!(skipped.len(), 5);
        assert_eq!(chosen(Method::Direct, &facts), Err(Reason::OciRuntimeUnsupported));
        assert_eq!(
            chosen(Method::Gvisor, &super::tests::facts()),
            Err(Reason::MethodUnavailable)
        );
    }

    #[test]
    fn every_method_is_either_used_or_skipped_with_a_documented_reason() {
        let (plan, skipped) = choose(Method::Auto, &facts());
        let mut methods: Vec<_> = skipped.iter().map(|s| s.method).collect();
        methods.push(plan.unwrap().method);
        methods.sort();
        assert_eq!(
            methods,
            [
                Method::Cri,
                Method::Kubelet,
                Method::Direct,
                Method::Guest,
                Method::VmSnapshot,
                Method::Gvisor
            ]
        );
        assert!(skipped.iter().all(|s| Reason::parse(&s.reason).is_some()));
    }
}
