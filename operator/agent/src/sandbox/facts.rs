//! Reads what there is to know about a sandbox: its shim, the processes below it, and their open unix sockets.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::vmm;
use crate::node::cgroup::Freezer;

/// How many generations above a process its shim is looked for.
const GENERATIONS: usize = 16;

/// What the runtime says of a sandbox.
#[derive(Clone, Debug, Default)]
pub struct Named<'a> {
    /// Its identifier.
    pub sandbox: &'a str,
    /// Its runtime handler.
    pub handler: &'a str,
    /// The shim's type, for example io.containerd.kata.v2.
    pub runtime_type: Option<&'a str>,
    /// The OCI runtime below the shim, where the configuration names one.
    pub binary: Option<&'a str>,
    /// Main processes of its containers.
    pub pids: &'a [i32],
    /// Whether a machine in an ordinary pod is taken for the pod.
    pub machines_in_pods: bool,
}

/// Facts about a sandbox.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Its runtime handler.
    pub handler: String,
    /// The shim's type.
    pub runtime_type: Option<String>,
    /// The OCI runtime below the shim, where the configuration names one.
    pub binary: Option<String>,
    /// The main processes that the runtime names.
    pub named: Vec<i32>,
    /// Whether a machine in an ordinary pod is taken for the pod: a tenant can start what looks like one.
    pub machines_in_pods: bool,
    /// The shim.
    pub shim: Option<Process>,
    /// The named processes, what runs below the shim, and what is in the containers' cgroups.
    pub processes: Vec<Process>,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Its number on the node.
    pub pid: i32,
    /// When it started, in clock ticks after boot.
    pub started: u64,
    /// File name of its program.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its unix sockets that have a name, when it is a monitor, a shim or a back end of a monitor.
    pub sockets: Vec<UnixSocket>,
    /// Whether it sees the files that the node's first process sees: a container never does.
    pub on_node: bool,
    /// Main process of the container in whose cgroup it is.
    pub container: Option<i32>,
}

/// A unix socket of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// Descriptor.
    pub fd: i32,
    /// Name, as it was bound.
    pub path: PathBuf,
    /// Whether it listens.
    pub listens: bool,
}

/// Reads the facts. Everything that is read here is answered by the kernel at once, also for a stopped process, apart
/// from arguments, which wait for a process that changes its memory map: so they are read of few.
pub fn read(named: &Named<'_>) -> Facts {
    let table = Table::read();
    let shim = named
        .pids
        .iter()
        .find_map(|pid| table.shim_above(*pid, named.sandbox))
        .or_else(|| table.shim(named.sandbox));
    let mut pids: Vec<i32> = named.pids.to_vec();
    pids.extend(shim.iter().flat_map(|shim| table.below(*shim)));
    let members = |pid: &i32| Some((*pid, Freezer::of_process(*pid).ok()?.processes()));
    let members: Vec<(i32, Vec<i32>)> = named.pids.iter().filter_map(members).collect();
    pids.extend(members.iter().flat_map(|(_, inside)| inside));
    let container = |pid: i32| {
        let holder = members.iter().find(|(_, inside)| inside.contains(&pid));
        holder.map(|(main, _)| *main)
    };
    pids.sort_unstable();
    pids.dedup();
    Facts {
        handler: named.handler.to_owned(),
        runtime_type: named.runtime_type.map(str::to_owned),
        binary: named.binary.map(str::to_owned),
        named: named.pids.to_vec(),
        machines_in_pods: named.machines_in_pods,
        shim: shim.and_then(process),
        processes: pids
            .into_iter()
            .filter_map(|pid| look(pid, named.pids.contains(&pid)))
            .map(|process| Process {
                container: container(process.pid),
                ..process
            })
            .collect(),
    }
}

/// Who is whose child.
struct Table(HashMap<i32, i32>);

impl Table {
    fn read() -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        Self(pids.filter_map(|pid| Some((pid, stat(pid)?.parent))).collect())
    }

    /// The shim of a sandbox above a process. Shims are started as `containerd-shim-X -namespace N -id SANDBOX`, by
    /// containerd and by CRI-O.
    fn shim_above(&self, pid: i32, sandbox: &str) -> Option<i32> {
        let mut next = pid;
        for _ in 0..GENERATIONS {
            if is_shim_of(next, sandbox) {
                return Some(next);
            }
            next = *self.0.get(&next)?;
        }
        None
    }

    fn shim(&self, sandbox: &str) -> Option<i32> {
        self.0.keys().copied().find(|pid| is_shim_of(*pid, sandbox))
    }

    /// Every process below another one.
    fn below(&self, pid: i32) -> Vec<i32> {
        let mut found = Vec::new();
        let mut next = vec![pid];
        while let Some(parent) = next.pop() {
            let children = self
                .0
                .iter()
                .filter(|(_, p)| **p == parent)
                .map(|(child, _)| *child);
            let children: Vec<i32> = children.filter(|child| !found.contains(child)).collect();
            found.extend(&children);
            next.extend(children);
        }
        found
    }
}

/// In a container anything can have a shim's name and arguments, but no process of it is among the node's own.
fn is_shim_of(pid: i32, sandbox: &str) -> bool {
    if !program(pid).contains("shim") || !shares_namespace("pid", pid, 1) {
        return false;
    }
    let arguments = arguments(pid);
    let id = arguments.iter().skip_while(|a| *a != "-id").nth(1);
    id.is_some_and(|id| id == sandbox)
}

/// One process with all there is to know of it; `None` when it has ended.
pub fn process(pid: i32) -> Option<Process> {
    look(pid, true)
}

/// One process. Of those that are no monitor, shim or back end only the name is known, unless `closely` is asked for: a
/// pod can have many processes with many descriptors each.
fn look(pid: i32, closely: bool) -> Option<Process> {
    let program = program(pid);
    let tells = vmm::kind(&program).is_some()
        || ["shim", "vhost", "runsc"]
            .iter()
            .any(|word| program.contains(word));
    Some(Process {
        pid,
        started: stat(pid)?.started,
        sockets: if tells { sockets(pid) } else { Vec::new() },
        on_node: tells && shares_mounts(pid, 1),
        container: None,
        arguments: if tells || closely {
            arguments(pid)
        } else {
            Vec::new()
        },
        program,
    })
}

/// Whether two processes are in one mount namespace, and so see the same programs under the same names. False when the
/// kernel does not tell.
pub fn shares_mounts(pid: i32, other: i32) -> bool {
    shares_namespace("mnt", pid, other)
}

fn shares_namespace(kind: &str, pid: i32, other: i32) -> bool {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    namespace(pid).is_some_and(|own| namespace(other) == Some(own))
}

struct Stat {
    parent: i32,
    started: u64,
}

/// When a process started, in clock ticks after boot; `None` when it has ended.
pub fn started(pid: i32) -> Option<u64> {
    stat(pid).map(|stat| stat.started)
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command is in brackets and may hold anything, brackets included.
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

fn arguments(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.split(|byte| *byte == 0);
    let mut words: Vec<String> = words.map(|w| String::from_utf8_lossy(w).into_owned()).collect();
    if words.last().is_some_and(String::is_empty) {
        words.pop();
    }
    words
}

fn program(pid: i32) -> String {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let name = exe.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let name = name.unwrap_or_else(|| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default());
    name.trim().trim_end_matches(" (deleted)").to_owned()
}

/// Descriptor to inode to name: the table of names is that of the process's own network namespace.
fn sockets(pid: i32) -> Vec<UnixSocket> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let open: Vec<(i32, u64)> = entries
        .filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, inode(&link)?))
        })
        .collect();
    if open.is_empty() {
        return Vec::new();
    }
    let names = names(&fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default());
    let named = open.into_iter().filter_map(|(fd, inode)| {
        let (path, listens) = names.get(&inode)?.clone();
        Some(UnixSocket { fd, path, listens })
    });
    let mut named: Vec<UnixSocket> = named.collect();
    named.sort_by_key(|socket| socket.fd);
    named
}

fn inode(link: &Path) -> Option<u64> {
    let name = link.to_str()?;
    name.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Inode to name and whether it listens, from /proc/net/unix (net/unix/af_unix.c, unix_seq_show). Abstract names are
/// left out: no other process's view is needed for them, and no monitor uses them.
fn names(table: &str) -> HashMap<u64, (PathBuf, bool)> {
    const ACCEPTS: u32 = 0x10000;
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?.parse().ok()?;
        let path = line.split_once(&format!(" {inode} "))?.1;
        (!path.starts_with('@')).then(|| (inode, (PathBuf::from(path), flags & ACCEPTS != 0)))
    };
    table.lines().skip(1).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_found_by_descriptor_and_inode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("with space.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(sockets(own).iter().any(|s| s.path == path && s.listens));
        assert!(process(own).unwrap().started > 0);
    }

    #[test]
    fn names_without_a_path_and_abstract_ones_are_left_out() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 17 /run/a b.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 18\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 19 @x\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 20 qmp.sock\n";
        let names = names(table);
        assert_eq!(names.len(), 2);
        assert_eq!(names[&17], (PathBuf::from("/run/a b.sock"), true));
        assert_eq!(names[&20], (PathBuf::from("qmp.sock"), false));
    }

    #[test]
    fn the_shim_is_above_the_process_and_what_is_below_it_is_found() {
        let table = Table(HashMap::from([(2, 1), (3, 2), (4, 3), (5, 1)]));
        let mut below = table.below(2);
        below.sort_unstable();
        assert_eq!(below, [3, 4]);
        assert_eq!(table.shim_above(4, "no-such-sandbox"), None);
    }
}
