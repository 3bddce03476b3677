//! What can be known without touching the target: the kernel, the probe itself, and every process of the target.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use crate::btf;
use crate::child;
use crate::freezer::Freezer;
use crate::observation::{Kernel, LsmProgram, Namesake, Process, Thread, Tracer, UserNamespace};
use crate::proc::{self, Status};
use crate::selinux::Selinux;
use crate::sys;

/// Bit of CAP_SYS_PTRACE, capabilities(7).
pub const CAP_SYS_PTRACE: u64 = 1 << 19;
/// `PROC_PID_INIT_INO`, include/linux/proc_ns.h: it is the same on every kernel.
const INITIAL_PROCESS_NAMESPACE: u64 = 0xefff_fffc;
/// How long a read that may block gets.
const READ: Duration = Duration::from_millis(100);
/// A thread that is uninterruptible for all of this time is called so; shorter waits for a disk are ordinary.
const UNINTERRUPTIBLE_SAMPLES: [Duration; 3] = [
    Duration::from_millis(10),
    Duration::from_millis(30),
    Duration::from_millis(60),
];
/// Of how many uninterruptible threads it is told where they wait.
const DESCRIBED: usize = 4;
/// How many threads of a process are described one by one.
const NOTABLE: usize = 64;

fn text(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim_end_matches(['\n', '\0']).trim().to_owned())
}

fn number(path: &str) -> Option<i32> {
    text(path)?.parse().ok()
}

/// The kernel's facts.
pub fn kernel(selinux: Option<&Selinux>) -> Kernel {
    let name = nix::sys::utsname::uname().ok();
    let of =
        |field: &dyn Fn(&nix::sys::utsname::UtsName) -> String| name.as_ref().map(field).unwrap_or_default();
    Kernel {
        release: of(&|n| n.release().to_string_lossy().into_owned()),
        machine: of(&|n| n.machine().to_string_lossy().into_owned()),
        lsm: security_modules(),
        yama: number("/proc/sys/kernel/yama/ptrace_scope"),
        lockdown: text("/sys/kernel/security/lockdown").and_then(|modes| selected(&modes)),
        selinux_enforcing: selinux.and_then(Selinux::enforces),
        selinux_deny_ptrace: selinux.and_then(Selinux::deny_ptrace),
        landlock_abi: sys::landlock_abi(),
        bpf_lsm: bpf_lsm(),
        features: features(),
    }
}

fn security_modules() -> Option<Vec<String>> {
    let listed = || {
        Some(
            text("/sys/kernel/security/lsm")?
                .split(',')
                .map(str::to_owned)
                .collect(),
        )
    };
    sys::security_modules().ok().or_else(listed)
}

/// The BPF programs on security hooks, with the name of the hook where both the kernel and its BTF tell it.
fn bpf_lsm() -> Option<Vec<LsmProgram>> {
    let programs = sys::bpf_lsm_programs().ok()?;
    let btf = if programs.is_empty() {
        Vec::new()
    } else {
        fs::read(btf::KERNEL).unwrap_or_default()
    };
    let named = |program: sys::LsmProgram| LsmProgram {
        hook: btf::name(&btf, program.hook).map(str::to_owned),
        id: program.id,
        name: program.name,
    };
    Some(programs.into_iter().map(named).collect())
}

/// The word in brackets: `none [integrity] confidentiality`.
fn selected(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

/// What CRIU needs, found out by using it, criu.org/Linux_kernel. The name is that of the configuration option.
fn features() -> std::collections::BTreeMap<String, bool> {
    let own = std::process::id().cast_signed();
    let inet = u8::try_from(libc::AF_INET).unwrap_or(0);
    let listed = |family: i32, protocol: u8| {
        sys::lists_sockets(u8::try_from(family).unwrap_or(0), protocol) != Err(libc::ENOENT)
    };
    let checkpoint_restore =
        Path::new("/proc/sys/kernel/ns_last_pid").exists() && Path::new("/proc/self/map_files").exists();
    [
        ("CHECKPOINT_RESTORE", checkpoint_restore),
        ("KCMP", sys::kcmp(own) != Err(libc::ENOSYS)),
        (
            "PROC_CHILDREN",
            Path::new(&format!("/proc/{own}/task/{own}/children")).exists(),
        ),
        ("UNIX_DIAG", listed(libc::AF_UNIX, 0)),
        ("INET_DIAG", sys::lists_sockets(inet, 6) != Err(libc::ENOENT)),
        ("INET_UDP_DIAG", sys::lists_sockets(inet, 17) != Err(libc::ENOENT)),
        ("PACKET_DIAG", listed(libc::AF_PACKET, 0)),
        ("NETLINK_DIAG", listed(libc::AF_NETLINK, 255)),
        ("USERFAULTFD", sys::has_userfaultfd()),
    ]
    .into_iter()
    .map(|(name, present)| (name.to_owned(), present))
    .collect()
}

/// The probe as a tracer.
pub fn tracer(selinux: Option<&Selinux>) -> Tracer {
    let status = proc::status(std::process::id().cast_signed()).unwrap_or_default();
    let label = label("self");
    Tracer {
        pid: std::process::id().cast_signed(),
        uid: status.uid,
        capabilities: status.capabilities,
        seccomp: status.seccomp,
        initial_user_namespace: is_initial(&text("/proc/self/uid_map").unwrap_or_default()),
        initial_process_namespace: fs::metadata("/proc/self/ns/pid")
            .ok()
            .map(|m| m.ino() == INITIAL_PROCESS_NAMESPACE),
        // A child has its parent's context.
        selinux_denies: denied(selinux, label.as_deref(), label.as_deref()),
        label,
    }
}

/// The initial user namespace maps every user to itself, user_namespaces(7).
fn is_initial(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Label of AppArmor, or of whatever security module has one.
fn label(pid: &str) -> Option<String> {
    let read = |name: &str| text(&format!("/proc/{pid}/attr/{name}"));
    read("apparmor/current")
        .or_else(|| read("current"))
        .filter(|label| !label.is_empty())
}

/// What SELinux' policy does not let a tracer do to a target.
fn denied(selinux: Option<&Selinux>, tracer: Option<&str>, target: Option<&str>) -> Option<Vec<String>> {
    selinux?.denied(tracer?, target?)
}

/// The processes of the targets: what was asked for, and everything below.
pub fn processes(roots: &[i32], tracer: &Tracer, selinux: Option<&Selinux>) -> Vec<Process> {
    let mut pids: Vec<(i32, bool)> = Vec::new();
    for root in roots {
        // What the kernel's own threads have started is not the target.
        let whole = proc::stat(*root).is_some_and(|stat| !stat.is_kernel_thread());
        for pid in if whole { proc::tree(*root) } else { vec![*root] } {
            if !pids.iter().any(|(seen, _)| *seen == pid) {
                pids.push((pid, pid == *root));
            }
        }
    }
    let described = |(pid, root)| {
        let process = process(pid, root)?;
        Some(Process {
            selinux_denies: denied(selinux, tracer.label.as_deref(), process.label.as_deref()),
            ..process
        })
    };
    let mut processes: Vec<Process> = pids.into_iter().filter_map(described).collect();
    settle(&mut processes);
    processes
}

/// An uninterruptible thread is called so only if it is at each of several looks, at all of them together: where storage is
/// dead there can be hundreds. Where some of them wait is told too.
fn settle(processes: &mut [Process]) {
    let waits = |thread: &&mut Thread| thread.state == 'D';
    for pause in UNINTERRUPTIBLE_SAMPLES {
        let mut threads = processes.iter_mut().flat_map(|process| &mut process.notable);
        if !threads.any(|thread| thread.state == 'D') {
            return;
        }
        std::thread::sleep(pause);
        for thread in processes
            .iter_mut()
            .flat_map(|process| &mut process.notable)
            .filter(waits)
        {
            thread.state = proc::status(thread.tid).map_or('X', |status| status.state);
        }
    }
    let threads = processes.iter_mut().flat_map(|process| &mut process.notable);
    for thread in threads.filter(waits).take(DESCRIBED) {
        thread.wchan = wchan(thread.tid);
    }
}

/// Targets about which root may not read: a security module hides them. Where only the kernel's own rights hide a process,
/// the error is another one (hidepid, proc(5)).
pub fn hidden(targets: &[i32]) -> Vec<i32> {
    let denied = |pid: &i32| {
        fs::File::open(format!("/proc/{pid}/status"))
            .is_err_and(|error| error.raw_os_error() == Some(libc::EACCES))
    };
    targets.iter().copied().filter(denied).collect()
}

/// Who has the number of a target that is not there in a namespace of its own: it may have been read in a container.
pub fn namesakes(targets: &[i32]) -> Vec<Namesake> {
    let missing: Vec<i32> = targets
        .iter()
        .copied()
        .filter(|pid| proc::status(*pid).is_none())
        .collect();
    let pids = if missing.is_empty() {
        Vec::new()
    } else {
        proc::all()
    };
    let namesake = |pid: i32| {
        let status = proc::status(pid)?;
        let own = status.nested_pid.filter(|own| missing.contains(own))?;
        let comm = status.comm;
        Some(Namesake { own, pid, comm })
    };
    pids.into_iter().filter_map(namesake).take(NOTABLE).collect()
}

/// `None` when it is gone or not visible.
fn process(pid: i32, root: bool) -> Option<Process> {
    let (status, stat) = (proc::status(pid)?, proc::stat(pid)?);
    let tids = proc::threads(pid);
    // Not the folder: that is the user's in any case.
    let owner = fs::metadata(format!("/proc/{pid}/maps")).map(|m| m.uid()).ok();
    Some(Process {
        pid,
        comm: status.comm.clone(),
        start_time: stat.start_time,
        kernel_thread: stat.is_kernel_thread(),
        root,
        uid: status.uid,
        capabilities: status.capabilities,
        not_dumpable: owner == Some(0) && status.uid != 0,
        user_namespace: user_namespace(pid),
        first_network: in_first_network(pid),
        label: label(&pid.to_string()),
        selinux_denies: None,
        // Below the reader's namespace a session of 0 is one that was begun outside, credentials(7).
        session_outside: status.nested && status.session == Some(0),
        threads: tids.len(),
        notable: notable(&tids),
        freezers: Freezer::all_of_process(pid)
            .unwrap_or_default()
            .iter()
            .map(Freezer::state)
            .collect(),
    })
}

fn notable(tids: &[i32]) -> Vec<Thread> {
    let mut notable: Vec<(i32, Status)> = tids
        .iter()
        .filter_map(|tid| proc::status(*tid).map(|status| (*tid, status)))
        .filter(|(_, status)| is_notable(status))
        .collect();
    // A filter is nothing special, and often every thread has one: it must not hide a tracer.
    notable.sort_by_key(|(_, status)| {
        let special = status.tracer != 0 || status.trap_pending || !matches!(status.state, 'R' | 'S' | 'I');
        !special
    });
    let described = notable.iter().take(NOTABLE);
    described.map(|(tid, status)| thread(*tid, status)).collect()
}

fn is_notable(status: &Status) -> bool {
    !matches!(status.state, 'R' | 'S' | 'I')
        || status.tracer != 0
        || status.seccomp != 0
        || status.trap_pending
}

fn thread(tid: i32, status: &Status) -> Thread {
    Thread {
        tid,
        state: status.state,
        tracer: status.tracer,
        tracer_comm: proc::status(status.tracer)
            .filter(|_| status.tracer != 0)
            .map(|tracer| tracer.comm),
        seccomp: status.seccomp,
        trap_pending: status.trap_pending,
        wchan: None,
    }
}

/// Where a task waits in the kernel; this read can block.
pub fn wchan(tid: i32) -> Option<String> {
    let read = move || fs::read(format!("/proc/{tid}/wchan")).unwrap_or_default();
    let name = String::from_utf8(child::ask(READ, read)?).ok()?;
    (!name.is_empty() && name != "0").then_some(name)
}

fn in_first_network(pid: i32) -> bool {
    let inode = |pid: i32| fs::metadata(format!("/proc/{pid}/ns/net")).map(|m| m.ino()).ok();
    inode(pid).is_some_and(|theirs| Some(theirs) == inode(1))
}

fn user_namespace(pid: i32) -> UserNamespace {
    let path = format!("/proc/{pid}/ns/user");
    let inode = |path: &str| fs::metadata(path).map(|m| m.ino());
    let (Ok(own), Ok(theirs)) = (inode("/proc/self/ns/user"), inode(&path)) else {
        return UserNamespace::Unknown;
    };
    if own == theirs {
        return UserNamespace::Same;
    }
    let below = fs::File::open(&path)
        .map_err(|_| libc::EIO)
        .and_then(|file| sys::is_below(file.into(), own));
    match below {
        Ok(true) => UserNamespace::Below,
        Ok(false) => UserNamespace::Outside,
        Err(_) => UserNamespace::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damaged::damaged;

    #[test]
    fn the_mode_in_brackets_is_the_one_that_holds() {
        assert_eq!(
            selected("none [integrity] confidentiality"),
            Some("integrity".into())
        );
        assert_eq!(selected(""), None);
    }

    #[test]
    fn only_the_full_identity_map_is_the_initial_namespace() {
        assert!(is_initial("         0          0 4294967295"));
        assert!(!is_initial("         0     100000      65536"));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(
            modes in damaged("none [integrity] confidentiality"),
            map in damaged("         0          0 4294967295"),
        ) {
            let _ = (selected(&modes), is_initial(&map));
        }
    }

    #[test]
    fn a_sleeping_thread_is_not_worth_a_line() {
        let mut status = Status {
            state: 'S',
            ..Status::default()
        };
        assert!(!is_notable(&status));
        status.tracer = 5;
        assert!(is_notable(&status));
    }
}
