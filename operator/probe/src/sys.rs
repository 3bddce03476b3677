//! The raw system calls, each with the least that makes it safe to call. The only module with `unsafe`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libc::{c_int, c_long};

/// An error number, as errno(3) has it.
pub type Errno = i32;

/// `PTRACE_O_SUSPEND_SECCOMP`, ptrace(2).
pub const OPTION_SUSPEND_SECCOMP: usize = 1 << 21;
/// `PTRACE_O_TRACESYSGOOD`, ptrace(2).
pub const OPTION_TRACE_SYS_GOOD: usize = 1;
/// `PTRACE_EVENT_STOP`, ptrace(2).
pub const EVENT_STOP: c_int = 128;
/// A process number that cannot exist: PID_MAX_LIMIT is 4194304, proc(5).
pub const NOBODY: i32 = 0x7fff_fff0;

const GET_RSEQ_CONFIGURATION: c_long = 0x420f;
const SECCOMP_GET_FILTER: c_long = 0x420c;
const NT_PRSTATUS: usize = 1;
/// `SECCOMP_RET_USER_NOTIF`, seccomp(2).
const RET_USER_NOTIFICATION: u32 = 0x7fc0_0000;

fn last() -> Errno {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn checked(value: c_long) -> Result<i64, Errno> {
    if value == -1 { Err(last()) } else { Ok(value) }
}

fn ptrace(request: c_long, tid: i32, address: usize, data: usize) -> Result<i64, Errno> {
    // SAFETY: the callers below pass as address and data what the request asks for: numbers, or pointers to memory that
    // outlives the call. The raw call is used since the C library's one changes the result of PEEK.
    checked(unsafe { libc::syscall(libc::SYS_ptrace, request, c_long::from(tid), address, data) })
}

/// `PTRACE_SEIZE`. May block: see ptrace(2) and the freezer.
pub fn seize(tid: i32) -> Result<i64, Errno> {
    ptrace(c_long::from(libc::PTRACE_SEIZE), tid, 0, 0)
}

/// `PTRACE_INTERRUPT`.
pub fn interrupt(tid: i32) -> Result<i64, Errno> {
    ptrace(c_long::from(libc::PTRACE_INTERRUPT), tid, 0, 0)
}

/// `PTRACE_CONT` without a signal.
pub fn resume(tid: i32) -> Result<i64, Errno> {
    ptrace(c_long::from(libc::PTRACE_CONT), tid, 0, 0)
}

/// `PTRACE_DETACH`, delivering `signal` unless it is 0.
pub fn detach(tid: i32, signal: i32) -> Result<i64, Errno> {
    ptrace(
        c_long::from(libc::PTRACE_DETACH),
        tid,
        0,
        usize::try_from(signal).unwrap_or(0),
    )
}

/// `PTRACE_SETOPTIONS`.
pub fn set_options(tid: i32, options: usize) -> Result<i64, Errno> {
    ptrace(c_long::from(libc::PTRACE_SETOPTIONS), tid, 0, options)
}

/// `PTRACE_GETREGSET` of the general registers; how many bytes there are.
pub fn registers(tid: i32) -> Result<i64, Errno> {
    let mut buffer = [0u8; 1024];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    ptrace(
        c_long::from(libc::PTRACE_GETREGSET),
        tid,
        NT_PRSTATUS,
        (&raw mut iov) as usize,
    )?;
    Ok(i64::try_from(iov.iov_len).unwrap_or(0))
}

/// The general registers of a stopped thread, as user_regs_struct has them.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Registers(libc::user_regs_struct);

#[cfg(target_arch = "x86_64")]
impl Registers {
    /// These, but for a system call by the code at `code`. -1 in orig_rax: the call that was interrupted is not begun anew.
    pub fn for_call(self, number: u64, arguments: [u64; 6], code: u64) -> Self {
        let mut registers = self.0;
        registers.rip = code;
        registers.rax = number;
        registers.orig_rax = u64::MAX;
        [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = arguments;
        Self(registers)
    }

    /// What a system call gave.
    pub fn result(self) -> i64 {
        self.0.rax.cast_signed()
    }
}

/// Other machines' registers are not known here, so that nothing can be executed in a target.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy)]
pub struct Registers(std::convert::Infallible);

#[cfg(not(target_arch = "x86_64"))]
impl Registers {
    /// These, but for a system call.
    pub fn for_call(self, _number: u64, _arguments: [u64; 6], _code: u64) -> Self {
        match self.0 {}
    }

    /// What a system call gave.
    pub fn result(self) -> i64 {
        match self.0 {}
    }
}

/// `PTRACE_GETREGSET` of the general registers, to be put back.
#[cfg(target_arch = "x86_64")]
pub fn get_registers(tid: i32) -> Result<Registers, Errno> {
    // SAFETY: the structure is made of numbers, for which zero is a value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let mut iov = registers_in(&mut registers);
    let request = c_long::from(libc::PTRACE_GETREGSET);
    ptrace(request, tid, NT_PRSTATUS, (&raw mut iov) as usize)?;
    Ok(Registers(registers))
}

/// `PTRACE_SETREGSET` of the general registers.
#[cfg(target_arch = "x86_64")]
pub fn set_registers(tid: i32, registers: &Registers) -> Result<i64, Errno> {
    let mut registers = registers.0;
    let mut iov = registers_in(&mut registers);
    let request = c_long::from(libc::PTRACE_SETREGSET);
    ptrace(request, tid, NT_PRSTATUS, (&raw mut iov) as usize)
}

#[cfg(target_arch = "x86_64")]
fn registers_in(registers: &mut libc::user_regs_struct) -> libc::iovec {
    libc::iovec {
        iov_base: std::ptr::from_mut(registers).cast(),
        iov_len: size_of::<libc::user_regs_struct>(),
    }
}

/// As on x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub fn get_registers(_tid: i32) -> Result<Registers, Errno> {
    Err(libc::ENOSYS)
}

/// As on x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub fn set_registers(_tid: i32, registers: &Registers) -> Result<i64, Errno> {
    match registers.0 {}
}

/// `PTRACE_GETSIGMASK`, to be put back.
pub fn get_signal_mask(tid: i32) -> Result<u64, Errno> {
    let mut mask = 0u64;
    let request = c_long::from(libc::PTRACE_GETSIGMASK);
    ptrace(request, tid, size_of::<u64>(), (&raw mut mask) as usize)?;
    Ok(mask)
}

/// `PTRACE_SETSIGMASK`.
pub fn set_signal_mask(tid: i32, mask: u64) -> Result<i64, Errno> {
    let request = c_long::from(libc::PTRACE_SETSIGMASK);
    ptrace(request, tid, size_of::<u64>(), (&raw const mask) as usize)
}

/// `PTRACE_PEEKDATA`.
pub fn peek(tid: i32, address: usize) -> Result<i64, Errno> {
    let mut word: c_long = 0;
    ptrace(
        c_long::from(libc::PTRACE_PEEKDATA),
        tid,
        address,
        (&raw mut word) as usize,
    )?;
    Ok(word)
}

/// `PTRACE_POKEDATA`.
pub fn poke(tid: i32, address: usize, word: i64) -> Result<i64, Errno> {
    // The word's bits are what counts, not its sign.
    ptrace(
        c_long::from(libc::PTRACE_POKEDATA),
        tid,
        address,
        usize::from_ne_bytes(word.to_ne_bytes()),
    )
}

/// `PTRACE_PEEKSIGINFO` of one pending signal; how many there were: 0 or 1.
pub fn signal_info(tid: i32) -> Result<i64, Errno> {
    #[repr(C)]
    struct Arguments {
        offset: u64,
        flags: u32,
        count: i32,
    }
    let arguments = Arguments {
        offset: 0,
        flags: 0,
        count: 1,
    };
    let mut buffer = [0u8; 256];
    ptrace(
        c_long::from(libc::PTRACE_PEEKSIGINFO),
        tid,
        (&raw const arguments) as usize,
        buffer.as_mut_ptr() as usize,
    )
}

/// `PTRACE_GET_RSEQ_CONFIGURATION`; how many bytes there are.
pub fn rseq(tid: i32) -> Result<i64, Errno> {
    let mut buffer = [0u8; 64];
    ptrace(
        GET_RSEQ_CONFIGURATION,
        tid,
        buffer.len(),
        buffer.as_mut_ptr() as usize,
    )
}

/// `PTRACE_SECCOMP_GET_FILTER` of every filter: how many there are, and whether one of them asks a listener.
pub fn filters(tid: i32) -> Result<(i64, bool), Errno> {
    let (mut count, mut listener) = (0, false);
    loop {
        let index = usize::try_from(count).unwrap_or(usize::MAX);
        let length = match ptrace(SECCOMP_GET_FILTER, tid, index, 0) {
            Ok(length) => usize::try_from(length).unwrap_or(0),
            // ENOENT: past the last one.
            Err(libc::ENOENT) => return Ok((count, listener)),
            Err(error) => return Err(error),
        };
        let mut program = vec![0u64; length];
        ptrace(SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
        listener |= program.iter().copied().any(asks_listener);
        count += 1;
    }
}

/// Whether a classic BPF instruction (struct sock_filter: u16 code, u8 jt, u8 jf, u32 k) returns USER_NOTIF.
fn asks_listener(instruction: u64) -> bool {
    let [c0, c1, _, _, k @ ..] = instruction.to_ne_bytes();
    // BPF_RET | BPF_K
    u16::from_ne_bytes([c0, c1]) == 0x06 && u32::from_ne_bytes(k) & 0xffff_0000 == RET_USER_NOTIFICATION
}

/// Writes one debug register of a stopped thread; only x86 has them here.
pub fn set_debug_register(tid: i32, number: usize, value: usize) -> Result<i64, Errno> {
    #[cfg(target_arch = "x86_64")]
    {
        let offset = std::mem::offset_of!(libc::user, u_debugreg) + number * size_of::<u64>();
        ptrace(c_long::from(libc::PTRACE_POKEUSER), tid, offset, value)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (tid, number, value);
        Err(libc::ENOSYS)
    }
}

/// kcmp(2) of the address spaces of this process and another.
pub fn kcmp(pid: i32) -> Result<i64, Errno> {
    const KCMP_VM: c_int = 1;
    let own = c_long::from(std::process::id().cast_signed());
    // SAFETY: only numbers are passed.
    checked(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            own,
            c_long::from(pid),
            c_long::from(KCMP_VM),
            0,
            0,
        )
    })
}

/// process_vm_readv(2) of one word; how many bytes were read.
pub fn read_memory(pid: i32, address: usize) -> Result<i64, Errno> {
    let mut word = [0u8; 8];
    let local = libc::iovec {
        iov_base: word.as_mut_ptr().cast(),
        iov_len: word.len(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: word.len(),
    };
    // SAFETY: `local` is a buffer of this function's; the kernel checks `remote`, which is in another process.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if read == -1 {
        Err(last())
    } else {
        Ok(i64::try_from(read).unwrap_or(0))
    }
}

/// pidfd_getfd(2) of descriptor 0, closed at once. EBADF is success: the kernel looks for the descriptor only after it
/// has allowed it.
pub fn get_fd(pid: i32) -> Result<i64, Errno> {
    // SAFETY: only numbers are passed, and the descriptor that comes back is owned by nobody else.
    let pidfd = checked(unsafe { libc::syscall(libc::SYS_pidfd_open, c_long::from(pid), 0) })?;
    let pidfd = owned(pidfd)?;
    // SAFETY: as above.
    let taken = checked(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 0, 0) });
    match taken {
        Ok(fd) => owned(fd).map(|_| 0),
        Err(libc::EBADF) => Ok(0),
        Err(error) => Err(error),
    }
}

fn owned(fd: i64) -> Result<OwnedFd, Errno> {
    let fd = c_int::try_from(fd).map_err(|_| libc::EBADF)?;
    // SAFETY: the kernel has just returned it to the caller, who gives it away.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Who one is after a fork.
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, with the number of the new one.
    Parent(i32),
}

/// fork(2). The child dies with its parent.
///
/// # Errors
/// When the kernel refuses.
pub fn fork() -> Result<Fork, Errno> {
    let parent = std::process::id();
    // SAFETY: the probe has one thread, so that the child may do whatever the parent could.
    match unsafe { libc::fork() } {
        -1 => Err(last()),
        0 => {
            die_with_parent(parent);
            Ok(Fork::Child)
        }
        pid => Ok(Fork::Parent(pid)),
    }
}

fn die_with_parent(parent: u32) {
    // SAFETY: only numbers are passed.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // The parent may have died before the signal was asked for.
    if std::os::unix::process::parent_id() != parent {
        exit(1);
    }
}

/// Takes back what [`fork`] asked for: the child goes on when its parent dies.
pub fn outlive_parent() {
    // SAFETY: only numbers are passed.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
}

/// _exit(2): ends a forked child without what its parent would do at its end.
pub fn exit(status: i32) -> ! {
    // SAFETY: it does not return.
    unsafe { libc::_exit(status) }
}

/// What wait4(2) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Nothing yet.
    Nothing,
    /// It exited with this status.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
    /// It stopped: the signal, and ptrace's event, 0 for none.
    Stopped(i32, i32),
}

/// wait4(2) for one thread or process, also one of another thread group (`__WALL`).
pub fn wait(pid: i32, block: bool) -> Result<Waited, Errno> {
    let mut status: c_int = 0;
    let options = libc::__WALL | libc::WUNTRACED | if block { 0 } else { libc::WNOHANG };
    // SAFETY: `status` outlives the call.
    let pid = checked(c_long::from(unsafe {
        libc::waitpid(pid, &raw mut status, options)
    }))?;
    Ok(match pid {
        0 => Waited::Nothing,
        _ if libc::WIFEXITED(status) => Waited::Exited(libc::WEXITSTATUS(status)),
        _ if libc::WIFSIGNALED(status) => Waited::Killed(libc::WTERMSIG(status)),
        _ => Waited::Stopped(libc::WSTOPSIG(status), status >> 16),
    })
}

/// Where a user namespace is: `NS_GET_PARENT` of ioctl_nsfs(2), up from `from`, until `wanted` (an inode) is found.
/// `Ok(false)` when it is not above.
pub fn is_below(from: OwnedFd, wanted: u64) -> Result<bool, Errno> {
    const NS_GET_PARENT: libc::Ioctl = 0xb702;
    let mut namespace = from;
    // The kernel allows 32 levels, user_namespaces(7).
    for _ in 0..33 {
        // SAFETY: the request takes no argument.
        let parent = checked(c_long::from(unsafe {
            libc::ioctl(namespace.as_raw_fd(), NS_GET_PARENT)
        }));
        namespace = match parent {
            Ok(fd) => owned(fd)?,
            // EPERM: the next one is not in the caller's view, so the caller's own is not above.
            Err(libc::EPERM) => return Ok(false),
            Err(error) => return Err(error),
        };
        let metadata = nix::sys::stat::fstat(&namespace).map_err(|error| error as i32)?;
        if metadata.st_ino == wanted {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Names of the active security modules by lsm_list_modules(2), kernel 6.8; it needs no file system.
pub fn security_modules() -> Result<Vec<String>, Errno> {
    const SYS_LSM_LIST_MODULES: c_long = 461;
    let (mut ids, mut size) = ([0u64; 64], 64u32 * 8);
    // SAFETY: the kernel writes at most `size` bytes to `ids`.
    let count = checked(unsafe { libc::syscall(SYS_LSM_LIST_MODULES, ids.as_mut_ptr(), &raw mut size, 0) })?;
    let count = usize::try_from(count).unwrap_or(0);
    Ok(ids
        .iter()
        .take(count)
        .map(|id| module_name(*id).to_owned())
        .collect())
}

/// include/uapi/linux/lsm.h
fn module_name(id: u64) -> &'static str {
    match id {
        100 => "capability",
        101 => "selinux",
        102 => "smack",
        103 => "tomoyo",
        104 => "apparmor",
        105 => "yama",
        106 => "loadpin",
        107 => "safesetid",
        108 => "lockdown",
        109 => "bpf",
        110 => "landlock",
        111 => "ima",
        112 => "evm",
        113 => "ipe",
        _ => "unknown",
    }
}

/// Version of Landlock's interface, landlock_create_ruleset(2); 0 without Landlock.
pub fn landlock_abi() -> i32 {
    const LANDLOCK_CREATE_RULESET_VERSION: c_long = 1;
    // SAFETY: with this flag the first two must be null and 0, and nothing is written.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            0,
            0,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    i32::try_from(abi).unwrap_or(0).max(0)
}

/// A loaded BPF program of the type LSM.
pub struct LsmProgram {
    /// Its number.
    pub id: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Number in the kernel's BTF of the function that it sits on; 0 before kernel 6.0, which does not tell.
    pub hook: u32,
}

/// The BPF programs of the type LSM that are loaded, bpf(2).
pub fn bpf_lsm_programs() -> Result<Vec<LsmProgram>, Errno> {
    const PROG_GET_NEXT_ID: c_long = 11;
    const PROG_GET_FD_BY_ID: c_long = 13;
    let mut found = Vec::new();
    let mut id = 0u32;
    loop {
        let mut attributes = [0u32; 32];
        attributes[0] = id;
        if let Err(error) = bpf(PROG_GET_NEXT_ID, &mut attributes) {
            return if error == libc::ENOENT {
                Ok(found)
            } else {
                Err(error)
            };
        }
        id = attributes[1];
        let mut attributes = [0u32; 32];
        attributes[0] = id;
        // It may have been unloaded in the meantime.
        let Ok(program) = bpf(PROG_GET_FD_BY_ID, &mut attributes).and_then(owned) else {
            continue;
        };
        found.extend(lsm_program(&program)?);
    }
}

/// `None` for a program of another type.
fn lsm_program(program: &OwnedFd) -> Result<Option<LsmProgram>, Errno> {
    const OBJ_GET_INFO_BY_FD: c_long = 15;
    const TYPE_LSM: u32 = 29;
    // struct bpf_prog_info, include/uapi/linux/bpf.h: the type, the number, ..., the name in words 16 to 19, ..., the
    // hook in word 56.
    let mut info = [0u32; 64];
    let mut attributes = [0u32; 32];
    attributes[0] = program.as_raw_fd().cast_unsigned();
    attributes[1] = 256;
    let address = (info.as_mut_ptr() as u64).to_ne_bytes();
    let [a, b, c, d, e, f, g, h] = address;
    attributes[2] = u32::from_ne_bytes([a, b, c, d]);
    attributes[3] = u32::from_ne_bytes([e, f, g, h]);
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let name = info.iter().skip(16).take(4).flat_map(|word| word.to_ne_bytes());
    let name: Vec<u8> = name.take_while(|byte| *byte != 0).collect();
    Ok((info[0] == TYPE_LSM).then(|| LsmProgram {
        id: info[1],
        name: String::from_utf8_lossy(&name).into_owned(),
        hook: info[56],
    }))
}

fn bpf(command: c_long, attributes: &mut [u32; 32]) -> Result<i64, Errno> {
    // SAFETY: the kernel reads and writes within the given size; a pointer in the attributes is the caller's buffer.
    checked(unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), 128) })
}

/// Whether the kernel lists sockets of a family and protocol, sock_diag(7): `Err(ENOENT)` when it lacks the module.
pub fn lists_sockets(family: u8, protocol: u8) -> Result<(), Errno> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    // SAFETY: only numbers are passed.
    let socket = checked(c_long::from(unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_SOCK_DIAG,
        )
    }))?;
    let socket = owned(socket)?;
    // struct nlmsghdr, then the request: family, protocol, and zeros for no filter; 56 bytes suit every family.
    let mut message = [0u8; 16 + 56];
    let length = 72u32.to_ne_bytes();
    message[..4].copy_from_slice(&length);
    message[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).unwrap_or(0);
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    message[16] = family;
    message[17] = protocol;
    // SAFETY: the buffer and its length belong together.
    let sent = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    checked(i64::try_from(sent).unwrap_or(-1))?;
    let mut answer = [0u8; 8192];
    // SAFETY: as above.
    let got = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    checked(i64::try_from(got).unwrap_or(-1))?;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    let is_error = i32::from(kind) == libc::NLMSG_ERROR;
    if is_error && error != 0 {
        Err(-error)
    } else {
        Ok(())
    }
}

/// Sends a message through a pair of unix sockets of the type SOCK_SEQPACKET and receives it.
pub fn carries_a_message() -> Result<i64, Errno> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    let mut ends: [c_int; 2] = [-1; 2];
    // SAFETY: the array has room for the two descriptors that the kernel writes.
    checked(c_long::from(unsafe {
        libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr())
    }))?;
    let [from, to] = ends.map(|fd| owned(i64::from(fd)));
    let (from, to) = (from?, to?);
    let mut byte = [1u8; 1];
    // SAFETY: the buffer and its length belong together.
    let sent = unsafe { libc::send(from.as_raw_fd(), byte.as_ptr().cast(), 1, 0) };
    checked(i64::try_from(sent).unwrap_or(-1))?;
    // SAFETY: as above.
    let got = unsafe { libc::recv(to.as_raw_fd(), byte.as_mut_ptr().cast(), 1, libc::MSG_DONTWAIT) };
    checked(i64::try_from(got).unwrap_or(-1))
}

/// Whether the kernel has userfaultfd(2).
pub fn has_userfaultfd() -> bool {
    // SAFETY: only numbers are passed; a descriptor that comes back is owned by nobody else.
    let fd = checked(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) });
    match fd {
        Ok(fd) => owned(fd).is_ok(),
        Err(error) => error != libc::ENOSYS,
    }
}

/// Stops this process by a signal.
pub fn stop_self() {
    // SAFETY: only a number is passed.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: only numbers are passed. There is no answer that a caller could act on: a process that is gone is what
    // was wanted.
    unsafe { libc::kill(pid, signal) };
}

/// Sleeps; std's sleep is the same call, this one says how long it took.
pub fn sleep(duration: Duration) -> Duration {
    let started = std::time::Instant::now();
    std::thread::sleep(duration);
    started.elapsed()
}
