//! Reading /proc. What is read here never blocks, proc(5): status, stat, comm, cgroup, task/, attr/current. Everything
//! else of /proc/PID may wait for a lock that a hung task holds, and is read only in a disposable child.

use std::fs;
use std::io;
use std::path::Path;

/// A file of /proc. Names of processes, folders and files may be any bytes there: what is no UTF-8 is replaced.
///
/// # Errors
/// When it cannot be read.
pub fn text(path: impl AsRef<Path>) -> io::Result<String> {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// What /proc/PID/status says, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Name, at most 15 bytes.
    pub comm: String,
    /// State, one letter.
    pub state: char,
    /// Thread group.
    pub tgid: i32,
    /// Tracer, 0 for none.
    pub tracer: i32,
    /// Effective user.
    pub uid: u32,
    /// Seccomp mode.
    pub seccomp: u8,
    /// Effective capabilities.
    pub capabilities: u64,
    /// SIGTRAP is pending, for the thread or its process.
    pub trap_pending: bool,
    /// Session in the process's own namespace; 0 when it was begun outside.
    pub session: Option<i32>,
    /// It lives in a process namespace below the reader's.
    pub nested: bool,
    /// Its number in that namespace.
    pub nested_pid: Option<i32>,
}

/// SIGTRAP's bit in a signal set.
const TRAP: u64 = 1 << (libc::SIGTRAP - 1);

impl Status {
    /// Parses /proc/PID/status; `None` when the state or the tracer is missing, without which nothing can be said.
    pub fn parse(text: &str) -> Option<Self> {
        let field = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim))
        };
        let hex = |key: &str| field(key).and_then(|value| u64::from_str_radix(value, 16).ok());
        let all = |key: &str| -> Vec<&str> { field(key).unwrap_or_default().split_whitespace().collect() };
        let (sessions, numbers) = (all("NSsid"), all("NSpid"));
        Some(Self {
            comm: field("Name").unwrap_or_default().to_owned(),
            state: field("State")?.chars().next()?,
            tgid: field("Tgid").and_then(|v| v.parse().ok()).unwrap_or(0),
            tracer: field("TracerPid")?.parse().ok()?,
            uid: field("Uid")
                .and_then(|v| v.split_whitespace().nth(1)?.parse().ok())
                .unwrap_or(0),
            seccomp: field("Seccomp").and_then(|v| v.parse().ok()).unwrap_or(0),
            capabilities: hex("CapEff").unwrap_or(0),
            trap_pending: (hex("SigPnd").unwrap_or(0) | hex("ShdPnd").unwrap_or(0)) & TRAP != 0,
            session: sessions.last().and_then(|v| v.parse().ok()),
            nested: sessions.len() > 1,
            nested_pid: numbers.get(1..).and_then(|nested| nested.last()?.parse().ok()),
        })
    }
}

/// /proc/PID/status of a process or a thread; `None` when it is gone.
pub fn status(tid: i32) -> Option<Status> {
    Status::parse(&text(format!("/proc/{tid}/status")).ok()?)
}

/// What /proc/PID/stat says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Parent.
    pub parent: i32,
    /// PF_ flags of the kernel.
    pub flags: u64,
    /// Clock ticks since boot at its start.
    pub start_time: u64,
}

/// `PF_KTHREAD`, include/linux/sched.h.
const KERNEL_THREAD: u64 = 0x0020_0000;

impl Stat {
    /// Parses /proc/PID/stat. The name in brackets may hold anything, also brackets.
    pub fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // proc_pid_stat(5) counts from 1, and the rest begins with field 3.
        let number = |field: usize| -> Option<u64> { fields.get(field - 3)?.parse().ok() };
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            flags: number(9)?,
            start_time: number(22)?,
        })
    }

    /// Whether it is a thread of the kernel, which nobody can trace.
    pub fn is_kernel_thread(self) -> bool {
        self.flags & KERNEL_THREAD != 0
    }
}

/// /proc/PID/stat; `None` when it is gone.
pub fn stat(pid: i32) -> Option<Stat> {
    Stat::parse(&text(format!("/proc/{pid}/stat")).ok()?)
}

/// Threads of a process, its leader first.
pub fn threads(pid: i32) -> Vec<i32> {
    let mut tids = numbers(&format!("/proc/{pid}/task"));
    tids.sort_unstable();
    tids
}

fn numbers(folder: &str) -> Vec<i32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Every process.
pub fn all() -> Vec<i32> {
    numbers("/proc")
}

/// A process and everything below it, parents first, without this process and what it has started.
pub fn tree(root: i32) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        for tid in threads(pid) {
            // Absent without CONFIG_PROC_CHILDREN.
            let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
            found.extend(
                text.split_whitespace()
                    .filter_map(|child| child.parse::<i32>().ok())
                    .filter(|child| *child != own),
            );
        }
    }
    if found.len() == 1 && fs::metadata(format!("/proc/{root}/task/{root}/children")).is_err() {
        return tree_by_parents(root);
    }
    found
}

fn tree_by_parents(root: i32) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    let parents: Vec<(i32, i32)> = all()
        .into_iter()
        .filter_map(|pid| Some((pid, stat(pid)?.parent)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        found.extend(
            parents
                .iter()
                .filter(|(child, parent)| *parent == pid && *child != own)
                .map(|(child, _)| *child),
        );
    }
    found
}

/// The first address of code that is mapped from a file, from /proc/PID/maps: such as CRIU puts its first instruction at.
/// Only private mappings: a shared one takes no words from a tracer, and a CRIU that failed leaves one behind.
pub fn code_address(maps: &str) -> Option<usize> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (range, permissions) = (fields.next()?, fields.next()?);
        let path = fields.nth(3)?;
        let (start, _) = range.split_once('-')?;
        (permissions.contains('x') && permissions.ends_with('p') && path.starts_with('/'))
            .then(|| usize::from_str_radix(start, 16).ok())
            .flatten()
    })
}

/// The functions in /proc/PID/stack, innermost first, without offsets.
pub fn stack_functions(stack: &str) -> Vec<String> {
    let name = |line: &str| {
        let function = line.split_whitespace().nth(1)?;
        Some(function.split('+').next().unwrap_or(function).to_owned())
    };
    stack.lines().filter_map(name).take(16).collect()
}

/// Number of the system call in /proc/PID/syscall; `None` while it runs or is not in one.
pub fn syscall_number(text: &str) -> Option<i64> {
    text.split_whitespace()
        .next()?
        .parse()
        .ok()
        .filter(|number| *number >= 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damaged::damaged;

    const STAT: &str = "7 (a) b (c) S 3 7 7 0 -1 2129984 0 0 0 0 1 2 3 4 20 0 1 0 4242 0 0";
    const MAPS: &str = "55d0-55d1 r--p 0 08:01 12 /bin/sh\n55d1-55e0 r-xp 1000 08:01 12 /bin/sh\n7f-80 r-xp 0 00:00 0 [vdso]\n";
    const STACK: &str = "[<0>] do_wait+0x52/0x120\n[<0>] kernel_wait4+0x9/0x1\n";
    const STATUS: &str = "Name:\tsh\nState:\tS (sleeping)\nTgid:\t7\nTracerPid:\t12\nUid:\t1000\t1001\t1000\t1000\nNSpid:\t77\t7\nNSsid:\t900\t0\nSigPnd:\t0000000000000010\nShdPnd:\t0000000000000000\nCapEff:\t0000000000080000\nSeccomp:\t2\n";

    #[test]
    fn a_status_is_read_field_by_field() {
        let status = Status::parse(STATUS).unwrap();
        assert_eq!(
            (status.state, status.tracer, status.uid, status.seccomp),
            ('S', 12, 1001, 2)
        );
        assert!(status.trap_pending && status.nested);
        assert_eq!((status.session, status.capabilities), (Some(0), 1 << 19));
        assert_eq!(status.nested_pid, Some(7));
    }

    #[test]
    fn a_name_that_imitates_a_field_is_not_taken_for_it() {
        let text = STATUS.replace("Name:\tsh", "Name:\tTracerPid:\\n0");
        assert_eq!(Status::parse(&text).unwrap().tracer, 12);
    }

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields_of_stat() {
        let stat = Stat::parse(STAT).unwrap();
        assert_eq!((stat.parent, stat.start_time), (3, 4242));
        assert!(stat.is_kernel_thread());
    }

    #[test]
    fn code_is_found_in_the_first_mapping_of_a_file_that_may_be_executed() {
        assert_eq!(code_address(MAPS), Some(0x55d1));
        let left = format!("55a0-55b0 r-xs 0 00:01 9 /memfd:CRIUMFD (deleted)\n{MAPS}");
        assert_eq!(code_address(&left), Some(0x55d1));
        assert_eq!(code_address("7f-80 r-xp 0 00:00 0\n"), None);
    }

    #[test]
    fn a_running_task_is_in_no_system_call() {
        assert_eq!(syscall_number("running\n"), None);
        assert_eq!(syscall_number("-1 0x7 0x0\n"), None);
        assert_eq!(syscall_number("101 0x4206 0x1\n"), Some(101));
    }

    #[test]
    fn stacks_are_read_as_names() {
        assert_eq!(stack_functions(STACK), ["do_wait", "kernel_wait4"]);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(
            status in damaged(STATUS),
            stat in damaged(STAT),
            maps in damaged(MAPS),
            stack in damaged(STACK),
            syscall in damaged("101 0x4206 0x1\n"),
        ) {
            let _ = (Status::parse(&status), Stat::parse(&stat), code_address(&maps));
            let _ = (stack_functions(&stack), syscall_number(&syscall));
        }

        #[test]
        fn a_status_with_a_strange_name_is_still_read(name in "[^\n]{0,15}") {
            let status = Status::parse(&STATUS.replace("Name:\tsh", &format!("Name:\t{name}"))).unwrap();
            proptest::prop_assert_eq!((status.state, status.tracer), ('S', 12));
        }
    }

    #[test]
    fn the_tree_of_this_process_begins_with_it() {
        let own = std::process::id().cast_signed();
        assert_eq!(tree(own).first(), Some(&own));
        assert!(threads(own).contains(&own));
    }
}
