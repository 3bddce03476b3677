//! Which sandbox the facts are of, and by what that is known. Pure.

use podcheckpoint_crds::SandboxKind;

use super::facts::{Facts, Process};
use super::{Machine, Sentry, ShimKind, SocketPath, VmmKind, Vsock, vmm};
use crate::words::tame;

/// What a sandbox is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recognised {
    /// Its kind.
    pub kind: SandboxKind,
    /// The runtime that made it.
    pub runtime: Option<String>,
    /// Its machine, when it is one.
    pub machine: Option<Machine>,
    /// gVisor's kernel, when it is one's and was found.
    pub sentry: Option<Sentry>,
    /// What was seen that says so.
    pub evidence: Vec<String>,
}

/// Recognises a sandbox.
pub fn recognise(facts: &Facts) -> Recognised {
    let found = gvisor(facts)
        .or_else(|| machine(facts))
        .or_else(|| in_the_shim(facts))
        .or_else(|| kata_without_monitor(facts))
        .unwrap_or_else(|| container(facts));
    // Names of programs, paths and arguments are whatever somebody has called them.
    Recognised {
        evidence: found.evidence.iter().map(|words| tame(words)).collect(),
        ..found
    }
}

fn shim_type(facts: &Facts) -> &str {
    facts.runtime_type.as_deref().unwrap_or_default()
}

fn shim_words(facts: &Facts) -> Vec<String> {
    let kind = facts.runtime_type.as_ref().map(|name| {
        format!(
            "the runtime says that handler {:?} has the shim {name}",
            facts.handler
        )
    });
    let process = facts
        .shim
        .as_ref()
        .map(|p| format!("its shim is process {} ({})", p.pid, p.program));
    kind.into_iter().chain(process).collect()
}

/// gVisor has a shim of its own, or is run by runc's shim as runsc; its kernel calls itself `runsc-sandbox` or has
/// `boot` among its arguments. Only the runtime's word makes a process gVisor's kernel, whose program the agent runs: a
/// container's process may call itself anything.
fn gvisor(facts: &Facts) -> Option<Recognised> {
    // The one that the runtime names comes first: the pod's code runs in further processes of runsc, and has a hand in what
    // those call themselves.
    let mut sentries: Vec<&Process> = facts.processes.iter().filter(|p| is_sentry(p)).collect();
    sentries.sort_by_key(|p| !facts.named.contains(&p.pid));
    let sentry = sentries.first().copied();
    let binary = facts
        .binary
        .as_deref()
        .filter(|b| file_name(b).starts_with("runsc"));
    let said = binary.is_some() || shim_type(facts).starts_with("io.containerd.runsc.");
    if !said && (sentry.is_none() || facts.runtime_type.is_some()) {
        return None;
    }
    let mut evidence = shim_words(facts);
    evidence.extend(binary.map(|binary| format!("the runtime is configured to run {binary}")));
    evidence.extend(sentry.map(|p| format!("process {} is gVisor's kernel ({})", p.pid, p.program)));
    Some(Recognised {
        kind: SandboxKind::Gvisor,
        runtime: Some("runsc".into()),
        machine: None,
        sentry: sentry.filter(|_| said).and_then(describe_sentry),
        evidence,
    })
}

fn is_sentry(process: &Process) -> bool {
    let first = process.arguments.first().map(String::as_str).unwrap_or_default();
    first.starts_with("runsc-sandbox")
        || process.program.starts_with("runsc") && process.arguments.iter().any(|a| a == "boot")
}

/// `runsc-sandbox --root=DIR ... boot ... SANDBOX`: runsc hands every option that counts on to its kernel.
fn describe_sentry(process: &Process) -> Option<Sentry> {
    Some(Sentry {
        pid: process.pid,
        started: process.started,
        root: vmm::values(&process.arguments, "root").next()?.into(),
        sandbox: process.arguments.last()?.clone(),
        overlay: vmm::values(&process.arguments, "overlay2").all(|value| value != "none"),
    })
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A monitor among the processes. Below Kata's shim it is the pod's machine. Below runc's it is a program of the pod's
/// own, and the pod a container whatever runs in it, unless the administrator says otherwise.
fn machine(facts: &Facts) -> Option<Recognised> {
    if is_kata(facts) || !is_container_shim(facts) {
        let (process, machine) = monitors(facts).into_iter().next()?;
        return Some(Recognised {
            kind: SandboxKind::Kata,
            runtime: Some("Kata".into()),
            evidence: evidence(facts, "below the shim runs", process, &machine),
            machine: Some(machine),
            sentry: None,
        });
    }
    match (facts.machines_in_pods, is_container_for_sure(facts)) {
        (true, _) => machine_in_pod(facts),
        (false, true) => None,
        (false, false) => unclear(facts),
    }
}

/// The jailer of Firecracker becomes Firecracker; of several processes of one kind, the one with a monitor comes first.
fn monitors(facts: &Facts) -> Vec<(&Process, Machine)> {
    let monitors = facts
        .processes
        .iter()
        .filter_map(|process| Some((process, describe(facts, vmm::kind(&process.program)?, process))));
    let mut found: Vec<(&Process, Machine)> = monitors.collect();
    found.sort_by_key(|(process, machine)| (machine.monitor.is_none(), process.pid));
    found
}

/// A machine in an ordinary pod: the one in the container that is to be checkpointed, if it can be controlled. A program
/// may run small machines for itself.
fn machine_in_pod(facts: &Facts) -> Option<Recognised> {
    let mut found = monitors(facts);
    found.retain(|(process, machine)| process.container.is_some() && machine.monitor.is_some());
    let (kind, count) = (found.first()?.1.vmm, found.len());
    let refused = |why: String| Recognised {
        kind: SandboxKind::VirtualMachine,
        runtime: Some(kind.as_str().to_owned()),
        evidence: shim_words(facts).into_iter().chain([why]).collect(),
        ..Recognised::default()
    };
    if count > 1 {
        let pids: Vec<String> = found.iter().map(|(process, _)| process.pid.to_string()).collect();
        return Some(refused(format!(
            "the pod's containers run several machines (processes {}), and none of them is the pod",
            pids.join(", ")
        )));
    }
    let (process, machine) = found.into_iter().next()?;
    if facts.named.len() > 1 {
        return Some(refused(format!(
            "the machine, process {}, is in one of the {} containers, and the others are not in it: name that one alone in spec.containers",
            process.pid,
            facts.named.len()
        )));
    }
    Some(Recognised {
        kind: SandboxKind::VirtualMachine,
        runtime: Some(kind.as_str().to_owned()),
        evidence: evidence(facts, "in the pod's container runs", process, &machine),
        machine: Some(machine),
        sentry: None,
    })
}

/// Neither a shim nor a handler that is known says that these are containers, and there is a monitor: nothing is tried.
fn unclear(facts: &Facts) -> Option<Recognised> {
    let (process, _) = monitors(facts).into_iter().next()?;
    Some(Recognised {
        evidence: vec![format!(
            "process {} ({}) is a virtual machine monitor, and whether handler {:?} made it or the pod did is not known",
            process.pid, process.program, facts.handler
        )],
        ..Recognised::default()
    })
}

fn evidence(facts: &Facts, role: &str, process: &Process, machine: &Machine) -> Vec<String> {
    let mut evidence = shim_words(facts);
    let role = if facts.named.contains(&process.pid) {
        "the process that the runtime calls the container's is"
    } else {
        role
    };
    evidence.push(format!("{role} process {} ({})", process.pid, process.program));
    evidence.extend(
        machine
            .monitor
            .as_ref()
            .map(|socket| format!("it is controlled at {socket}")),
    );
    evidence.extend(
        machine
            .domain
            .as_ref()
            .map(|name| format!("it is the libvirt domain {name}")),
    );
    evidence.extend(machine.vsock.as_ref().map(|vsock| match vsock {
        Vsock::Hybrid(socket) => format!("its vsock is at {socket}"),
        Vsock::Cid(cid) => format!("its vsock has the context identifier {cid}"),
    }));
    evidence.extend(
        machine
            .confidential
            .as_ref()
            .map(|how| format!("its arguments turn on {how}")),
    );
    evidence
}

fn describe(facts: &Facts, kind: VmmKind, process: &Process) -> Machine {
    let shim = facts.shim.as_ref().map(|shim| shim.pid);
    let monitor = vmm::monitor(kind, process, shim);
    Machine {
        vmm: kind,
        pid: process.pid,
        started: process.started,
        vsock: vsock(facts, kind, process, monitor.as_ref()),
        memory: vmm::memory(kind, &process.arguments),
        confidential: vmm::confidential(kind, &process.arguments),
        // Its virsh would be the pod's own program, and its name whatever the pod says.
        domain: vmm::domain(&process.arguments).filter(|_| process.on_node),
        shim: shim_kind(facts),
        arguments: process.arguments.clone(),
        monitor,
    }
}

fn vsock(facts: &Facts, kind: VmmKind, process: &Process, monitor: Option<&SocketPath>) -> Option<Vsock> {
    if matches!(kind, VmmKind::Qemu | VmmKind::StratoVirt) {
        let back_ends = vmm::vsock_back_ends(&process.arguments);
        let hybrid = back_ends.iter().find_map(|socket| hybrid_of(facts, socket));
        return hybrid.or_else(|| vmm::cid(&process.arguments).map(Vsock::Cid));
    }
    // Cloud Hypervisor and Firecracker take the path through their interface, so only the open socket tells; the only
    // other thing they listen on is a console, which Kata does not give them.
    let other = process
        .sockets
        .iter()
        .find(|s| s.listens && monitor.is_none_or(|m| m.path != s.path));
    let owner = |path: &std::path::Path| SocketPath {
        path: path.to_owned(),
        owners: vec![process.pid],
    };
    other.map(|socket| Vsock::Hybrid(owner(&socket.path)))
}

/// The vsock of a back end in a process of its own (vhost-device-vsock): it serves one socket to the monitor and
/// listens on the other.
fn hybrid_of(facts: &Facts, back_end: &str) -> Option<Vsock> {
    let serves =
        |p: &&Process| vmm::kind(&p.program).is_none() && p.arguments.iter().any(|a| a.contains(back_end));
    let process = facts.processes.iter().find(serves)?;
    let argument = vmm::values(&process.arguments, "uds-path")
        .last()
        .map(str::to_owned);
    let vm = vmm::values(&process.arguments, "vm").find_map(|value| vmm::key(value, "uds-path"));
    let path = argument.or(vm).map(Into::into).or_else(|| {
        let other = process
            .sockets
            .iter()
            .find(|s| s.listens && s.path.to_str() != Some(back_end));
        other.map(|socket| socket.path.clone())
    })?;
    Some(Vsock::Hybrid(SocketPath {
        path,
        owners: vec![process.pid],
    }))
}

/// The shims of Kata serve the same monitor socket, in Go below /run/vc and in Rust below /run/kata.
fn shim_kind(facts: &Facts) -> ShimKind {
    let sockets = facts
        .shim
        .iter()
        .flat_map(|shim| &shim.sockets)
        .filter(|s| s.listens);
    let monitor = sockets.filter(|s| s.path.file_name().is_some_and(|n| n == "shim-monitor.sock"));
    let path = monitor.map(|s| s.path.to_string_lossy().into_owned()).next();
    match path {
        Some(path) if path.contains("/kata/") => ShimKind::KataRust,
        Some(_) => ShimKind::KataGo,
        None => ShimKind::Other,
    }
}

fn is_kata(facts: &Facts) -> bool {
    let program = facts
        .shim
        .as_ref()
        .map(|p| p.program.as_str())
        .unwrap_or_default();
    match shim_type(facts) {
        "" => program.contains("kata"),
        name => name.contains("kata"),
    }
}

/// By the type that the runtime tells; where it tells none, by the shim's program. CRI-O has none for containers.
fn is_container_shim(facts: &Facts) -> bool {
    match (&facts.runtime_type, &facts.shim) {
        (Some(name), _) => name.starts_with("io.containerd.runc."),
        (None, Some(shim)) => shim.program.contains("-runc-"),
        (None, None) => true,
    }
}

/// CRI-O tells no type and has no shim for containers: then it is the handler that says what makes them.
fn is_container_for_sure(facts: &Facts) -> bool {
    let told = facts.runtime_type.is_some() || facts.shim.is_some();
    told || ["", "runc", "crun", "youki"].contains(&facts.handler.as_str())
}

/// Dragonball is a library: the process that the runtime calls the container's is the shim itself.
fn in_the_shim(facts: &Facts) -> Option<Recognised> {
    let shim = facts
        .shim
        .as_ref()
        .filter(|shim| is_kata(facts) && facts.named.contains(&shim.pid))?;
    let hybrid = shim
        .sockets
        .iter()
        .find(|s| s.listens && s.path.extension().is_some_and(|e| e == "hvsock"));
    let mut evidence = shim_words(facts);
    evidence.push(
        "the process that the runtime calls the container's is the shim itself, as with Dragonball".into(),
    );
    let machine = Machine {
        vmm: VmmKind::Dragonball,
        pid: shim.pid,
        started: shim.started,
        arguments: shim.arguments.clone(),
        monitor: None,
        vsock: hybrid.map(|s| {
            Vsock::Hybrid(SocketPath {
                path: s.path.clone(),
                owners: vec![shim.pid],
            })
        }),
        memory: None,
        confidential: None,
        domain: None,
        shim: ShimKind::KataRust,
    };
    Some(Recognised {
        kind: SandboxKind::Kata,
        runtime: Some("Kata".into()),
        machine: Some(machine),
        sentry: None,
        evidence,
    })
}

fn kata_without_monitor(facts: &Facts) -> Option<Recognised> {
    is_kata(facts).then(|| {
        let mut evidence = shim_words(facts);
        evidence.push("no virtual machine monitor was found below the shim".into());
        Recognised {
            kind: SandboxKind::Kata,
            runtime: Some("Kata".into()),
            machine: None,
            sentry: None,
            evidence,
        }
    })
}

fn container(facts: &Facts) -> Recognised {
    let mut evidence = shim_words(facts);
    let binary = facts
        .binary
        .as_deref()
        .map(file_name)
        .filter(|name| !name.is_empty());
    evidence.extend(binary.map(|name| format!("the runtime is configured to run {name}")));
    let named = facts.processes.iter().find(|p| facts.named.contains(&p.pid));
    let ours = is_container_shim(facts);
    if let Some(process) = named.filter(|_| ours) {
        let text = "runs on the node's kernel";
        evidence.push(format!(
            "the container's process {} ({}) {text}",
            process.pid, process.program
        ));
    }
    let runc = shim_type(facts).contains(".runc.");
    let kind = if ours && (runc || named.is_some()) {
        SandboxKind::Container
    } else {
        SandboxKind::Unknown
    };
    let runtime = binary.map(str::to_owned).or_else(|| runc.then(|| "runc".into()));
    Recognised {
        kind,
        runtime,
        machine: None,
        sentry: None,
        evidence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::facts::UnixSocket;

    fn process(pid: i32, program: &str, arguments: &str) -> Process {
        Process {
            pid,
            started: 1,
            program: program.into(),
            arguments: std::iter::once(program)
                .chain(arguments.split(' '))
                .map(str::to_owned)
                .collect(),
            sockets: Vec::new(),
            on_node: false,
            container: None,
        }
    }

    fn listening(fd: i32, path: &str) -> UnixSocket {
        UnixSocket {
            fd,
            path: path.into(),
            listens: true,
        }
    }

    fn kata(monitor: Process) -> Facts {
        Facts {
            handler: "kata".into(),
            runtime_type: Some("io.containerd.kata.v2".into()),
            named: vec![monitor.pid],
            shim: Some(process(10, "containerd-shim-kata-v2", "-id s")),
            processes: vec![monitor],
            ..Facts::default()
        }
    }

    #[test]
    fn a_container_of_runc_crun_or_youki_shows_its_processes() {
        for (binary, expected) in [
            (None, "runc"),
            (Some("/usr/bin/crun"), "crun"),
            (Some("youki"), "youki"),
        ] {
            let facts = Facts {
                runtime_type: Some("io.containerd.runc.v2".into()),
                binary: binary.map(str::to_owned),
                named: vec![7],
                shim: Some(process(6, "containerd-shim-runc-v2", "-id s")),
                processes: vec![process(7, "busybox", "sh")],
                ..Facts::default()
            };
            let found = recognise(&facts);
            assert_eq!(
                (found.kind, found.runtime.as_deref()),
                (SandboxKind::Container, Some(expected))
            );
            assert!(found.shows_processes());
        }
    }

    #[test]
    fn kata_with_qemu_gives_its_monitor_memory_and_vsock() {
        let found = recognise(&kata(process(
            11,
            "qemu-system-x86_64",
            "-m 2048M -qmp unix:/run/vc/vm/s/qmp.sock,server=on -device vhost-vsock-pci,guest-cid=77,vhostfd=3",
        )));
        let machine = found.machine().unwrap();
        assert_eq!(
            (found.kind, machine.vmm, machine.pid),
            (SandboxKind::Kata, VmmKind::Qemu, 11)
        );
        assert_eq!(
            machine.monitor.as_ref().unwrap().to_string(),
            "/run/vc/vm/s/qmp.sock"
        );
        assert_eq!(
            (machine.memory, &machine.vsock),
            (Some(2 << 30), &Some(Vsock::Cid(77)))
        );
        assert!(!found.shows_processes());
        assert!(
            found
                .evidence
                .iter()
                .any(|e| e.contains("process 11 (qemu-system-x86_64)")),
            "{:?}",
            found.evidence
        );
    }

    #[test]
    fn a_vsock_in_user_space_is_found_through_its_back_end() {
        let mut facts = kata(process(
            11,
            "qemu-system-x86_64",
            "-chardev socket,id=c0,path=/x/vhu.sock -device vhost-user-vsock-pci,chardev=c0",
        ));
        facts.processes.push(process(
            12,
            "vhost-device-vsock",
            "--guest-cid 3 --socket /x/vhu.sock --uds-path /x/kata.hvsock",
        ));
        let vsock = recognise(&facts).machine.unwrap().vsock.unwrap();
        assert_eq!(
            vsock,
            Vsock::Hybrid(SocketPath {
                path: "/x/kata.hvsock".into(),
                owners: vec![12]
            })
        );
    }

    #[test]
    fn cloud_hypervisor_and_a_jailed_firecracker_are_told_apart() {
        let mut clh = process(11, "cloud-hypervisor", "--api-socket /run/vc/vm/s/clh-api.sock");
        clh.sockets = vec![
            listening(4, "/run/vc/vm/s/clh-api.sock"),
            listening(9, "/run/vc/vm/s/clh.sock"),
        ];
        let machine = recognise(&kata(clh)).machine.unwrap();
        assert_eq!(machine.vmm, VmmKind::CloudHypervisor);
        assert!(matches!(&machine.vsock, Some(Vsock::Hybrid(s)) if s.path.ends_with("clh.sock")));
        let mut fc = process(12, "firecracker", "--id s --api-sock /run/firecracker.socket");
        fc.sockets = vec![
            listening(4, "/run/firecracker.socket"),
            listening(9, "/kata.hvsock"),
        ];
        let machine = recognise(&kata(fc)).machine.unwrap();
        assert_eq!(machine.vmm, VmmKind::Firecracker);
        assert_eq!(machine.monitor.unwrap().owners, [12, 10]);
    }

    #[test]
    fn dragonball_is_known_by_a_container_that_is_the_shim() {
        let shim = process(10, "containerd-shim-kata-v2", "-id s");
        let facts = Facts {
            shim: Some(shim.clone()),
            named: vec![10],
            ..kata(shim)
        };
        assert_eq!(recognise(&facts).machine.unwrap().vmm, VmmKind::Dragonball);
    }

    #[test]
    fn the_shims_health_check_is_known_by_its_socket() {
        let mut facts = kata(process(11, "qemu-system-x86_64", "-m 1G"));
        assert_eq!(recognise(&facts).machine.unwrap().shim, ShimKind::Other);
        for (path, kind) in [
            ("/run/vc/sbs/s/shim-monitor.sock", ShimKind::KataGo),
            ("/run/kata/s/shim-monitor.sock", ShimKind::KataRust),
        ] {
            facts.shim.as_mut().unwrap().sockets = vec![listening(5, path)];
            assert_eq!(recognise(&facts).machine.unwrap().shim, kind);
        }
    }

    #[test]
    fn a_confidential_guest_is_known_by_the_monitors_arguments() {
        let of = |arguments: &str| {
            recognise(&kata(process(11, "qemu-system-x86_64", arguments)))
                .machine
                .unwrap()
                .confidential
        };
        assert_eq!(
            of("-object tdx-guest,id=tdx -machine q35,confidential-guest-support=tdx").as_deref(),
            Some("tdx")
        );
        assert_eq!(
            of("-object sev-snp-guest,id=snp,cbitpos=51").as_deref(),
            Some("sev-snp")
        );
        assert_eq!(of("-object memory-backend-memfd,id=m"), None);
        let clh = process(11, "cloud-hypervisor", "--api-socket /a --platform tdx=on");
        assert_eq!(
            recognise(&kata(clh)).machine.unwrap().confidential.as_deref(),
            Some("tdx")
        );
    }

    #[test]
    fn gvisor_is_known_by_its_shim_its_binary_or_its_kernel() {
        let by_shim = Facts {
            runtime_type: Some("io.containerd.runsc.v1".into()),
            ..Facts::default()
        };
        let by_binary = Facts {
            runtime_type: Some("io.containerd.runc.v2".into()),
            binary: Some("/usr/bin/runsc".into()),
            ..Facts::default()
        };
        let by_kernel = Facts {
            named: vec![7],
            processes: vec![
                process(7, "exe", "x"),
                process(8, "runsc", "--root=/r boot --bundle=/b"),
            ],
            ..Facts::default()
        };
        for facts in [by_shim, by_binary, by_kernel] {
            assert_eq!(recognise(&facts).kind, SandboxKind::Gvisor);
        }
    }

    #[test]
    fn of_several_that_call_themselves_gvisors_kernel_the_runtimes_one_counts() {
        let facts = Facts {
            runtime_type: Some("io.containerd.runsc.v1".into()),
            named: vec![9],
            processes: vec![
                process(8, "runsc", "runsc-sandbox --root=/evil boot other"),
                process(9, "runsc", "runsc-sandbox --root=/run/r boot s1"),
            ],
            ..Facts::default()
        };
        assert_eq!(recognise(&facts).sentry.map(|sentry| sentry.pid), Some(9));
    }

    #[test]
    fn gvisors_kernel_says_where_its_books_are_and_which_sandbox_it_is() {
        let facts = Facts {
            runtime_type: Some("io.containerd.runsc.v1".into()),
            processes: vec![process(
                8,
                "runsc",
                "runsc-sandbox --root=/run/r --network=none boot --bundle=/b --spec-fd=12 s1",
            )],
            ..Facts::default()
        };
        let expected = Sentry {
            pid: 8,
            started: 1,
            root: "/run/r".into(),
            sandbox: "s1".into(),
            overlay: true,
        };
        assert_eq!(recognise(&facts).sentry, Some(expected.clone()));
        let mut without = facts;
        for process in &mut without.processes {
            process.arguments.insert(1, "--overlay2=none".into());
        }
        let expected = Sentry {
            overlay: false,
            ..expected
        };
        assert_eq!(recognise(&without).sentry, Some(expected));
    }

    #[test]
    fn a_containers_process_that_looks_like_gvisors_kernel_is_never_run() {
        let looks = process(8, "runsc", "runsc-sandbox --root=/x boot id");
        let ordinary = Facts {
            runtime_type: Some("io.containerd.runc.v2".into()),
            binary: Some("/usr/bin/runc".into()),
            processes: vec![looks.clone()],
            ..Facts::default()
        };
        assert_eq!(recognise(&ordinary).kind, SandboxKind::Container);
        let unsaid = Facts {
            processes: vec![looks],
            ..Facts::default()
        };
        assert_eq!(recognise(&unsaid).sentry, None);
    }

    fn libvirts_qemu(on_node: bool) -> Process {
        let arguments = "-name guest=shop_vm,debug-threads=on -chardev socket,id=charmonitor,path=/l/monitor.sock -mon chardev=charmonitor,id=monitor,mode=control";
        Process {
            on_node,
            ..process(8, "qemu-kvm", arguments)
        }
    }

    #[test]
    fn a_libvirt_domain_is_one_only_where_virsh_is_the_nodes_own() {
        let domain = |on_node| {
            let machine = recognise(&kata(libvirts_qemu(on_node))).machine;
            machine.unwrap().domain
        };
        assert_eq!(domain(true).as_deref(), Some("shop_vm"));
        assert_eq!(domain(false), None);
    }

    /// An ordinary pod with two containers, of which the first runs a machine that can be controlled.
    fn machine_in_a_pod() -> Facts {
        let inside = |process: Process, container| Process {
            container: Some(container),
            ..process
        };
        let qemu = process(8, "qemu-system-x86_64", "-qmp unix:/run/q.sock,server=on");
        Facts {
            runtime_type: Some("io.containerd.runc.v2".into()),
            named: vec![7],
            shim: Some(process(6, "containerd-shim-runc-v2", "-id s")),
            processes: vec![inside(process(7, "sh", "x"), 7), inside(qemu, 7)],
            ..Facts::default()
        }
    }

    #[test]
    fn a_machine_that_a_pod_runs_for_itself_leaves_it_a_container() {
        for (runtime_type, shim, handler) in [
            (Some("io.containerd.runc.v2"), true, ""),
            (None, true, "x"),
            (None, false, ""),
            (None, false, "crun"),
        ] {
            let mut facts = machine_in_a_pod();
            facts.processes.push(libvirts_qemu(false));
            facts.runtime_type = runtime_type.map(str::to_owned);
            facts.shim = facts.shim.filter(|_| shim);
            facts.handler = handler.into();
            let found = recognise(&facts);
            assert_eq!((found.kind, found.machine), (SandboxKind::Container, None));
        }
    }

    #[test]
    fn what_has_a_shims_name_in_a_pod_of_runc_makes_no_kata_of_it() {
        let mut facts = machine_in_a_pod();
        facts.shim = Some(process(9, "containerd-shim-kata-v2", "-id s"));
        assert_eq!(recognise(&facts).kind, SandboxKind::Container);
    }

    #[test]
    fn a_monitor_below_nobody_knows_what_is_not_called_a_container() {
        let facts = Facts {
            runtime_type: None,
            shim: None,
            handler: "special".into(),
            ..machine_in_a_pod()
        };
        let found = recognise(&facts);
        assert_eq!((found.kind, found.evidence.len()), (SandboxKind::Unknown, 1));
    }

    #[test]
    fn where_it_is_allowed_the_one_machine_of_the_one_container_is_the_pods() {
        let allowed = |facts: Facts| {
            recognise(&Facts {
                machines_in_pods: true,
                ..facts
            })
        };
        let found = allowed(machine_in_a_pod());
        assert_eq!(found.kind, SandboxKind::VirtualMachine);
        assert_eq!(found.machine.unwrap().pid, 8);

        let mut two = machine_in_a_pod();
        two.processes.push(Process {
            pid: 9,
            ..two.processes[1].clone()
        });
        let found = allowed(two);
        assert_eq!((found.kind, found.machine), (SandboxKind::VirtualMachine, None));
        assert!(found.evidence.last().unwrap().contains("processes 8, 9"));

        let mut beside = machine_in_a_pod();
        beside.named.push(5);
        let found = allowed(beside);
        assert_eq!((found.kind, found.machine), (SandboxKind::VirtualMachine, None));
        assert!(found.evidence.last().unwrap().contains("spec.containers"));

        let mut elsewhere = machine_in_a_pod();
        elsewhere.processes[1].container = None;
        assert_eq!(allowed(elsewhere).kind, SandboxKind::Container);
    }

    #[test]
    fn a_program_that_runs_a_small_machine_for_itself_is_still_a_container() {
        let mut facts = machine_in_a_pod();
        facts.machines_in_pods = true;
        facts.processes[1].arguments = vec!["qemu-system-arm".into(), "-kernel".into(), "k".into()];
        assert_eq!(recognise(&facts).kind, SandboxKind::Container);
    }

    #[test]
    fn kata_whose_monitor_is_gone_is_never_called_a_container() {
        let facts = Facts {
            runtime_type: Some("io.containerd.kata.v2".into()),
            ..Facts::default()
        };
        let found = recognise(&facts);
        assert_eq!((found.kind, found.machine.is_none()), (SandboxKind::Kata, true));
    }
}
