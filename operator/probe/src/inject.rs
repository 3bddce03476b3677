//! The last rung, taken only when asked for: system calls are executed in a thread of the target, as CRIU's own code is,
//! and everything is put back. It tells what the target's security module, its limits and its Landlock domain let CRIU's
//! code do there, which nothing outside can know.
//!
//! It is the only rung that changes something: for well below a millisecond the thread has other registers and other
//! words at its code's first address. So this child is ended by nobody, outlives the probe, and once it has changed
//! something it waits for as long as it takes until it can put it back. Only a process with one thread is taken: another
//! thread might run into the code.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use crate::observation::{Step, Subject};
use crate::proc;
use crate::sys::{self, Errno, Registers, Waited};
use crate::wire::Teller;

/// What is told when a call could not be executed, which says nothing about the target.
pub const NOT_EXECUTED: Errno = libc::ECANCELED;
/// How long a call in the target, or its first stop, may take before it is given up.
const CALL: Duration = Duration::from_millis(200);
/// Signals that the kernel forces upon a thread: were they blocked, it would take the thread's handler away.
const FORCED: [libc::c_int; 6] = [
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
];
/// `MFD_CLOEXEC`, memfd_create(2).
const MFD_CLOEXEC: u64 = 1;
/// `syscall; int3` of x86-64.
const CODE: [u8; 8] = [0x0f, 0x05, 0xcc, 0x90, 0x90, 0x90, 0x90, 0x90];
/// Name of the file in memory, behind the code.
const NAME: [u8; 8] = *b"criu\0\0\0\0";
const PAGE: u64 = 4096;

/// Executes in the first thread of a process what CRIU's code needs first: any call at all, a file in memory, that file
/// mapped as code, and a connection to CRIU's socket.
pub fn inject(out: &mut File, pid: i32, code: usize) {
    sys::outlive_parent();
    let mut teller = Teller::new(out, Subject::Target, pid);
    // CRIU's socket is made in the target's network namespace; without the right to enter it, that part is left out.
    let name = format!("podcheckpoint-probe-{}", std::process::id());
    let listener = listener(pid, &name);
    let mut hijack = None;
    let begun = teller.step(Step::Inject, || {
        let taken = hijack.insert(Hijack::begin(pid, code).map_err(|_| NOT_EXECUTED)?);
        taken.call(libc::SYS_getpid, [0; 6])
    });
    let Some(mut hijack) = hijack else { return };
    if begun.is_ok() {
        as_criu_does(&mut teller, &mut hijack, listener.as_ref().map(|_| name.as_str()));
    }
    let _ = teller.step(Step::Restore, || hijack.end());
}

fn as_criu_does(teller: &mut Teller<'_>, hijack: &mut Hijack, socket: Option<&str>) {
    let name = hijack.code as u64 + CODE.len() as u64;
    let made = teller.step(Step::MemFile, || {
        hijack.call(libc::SYS_memfd_create, [name, MFD_CLOEXEC, 0, 0, 0, 0])
    });
    let Ok(file) = made.map(i64::cast_unsigned) else {
        return;
    };
    let mapped = teller.step(Step::MapCode, || {
        fill(hijack.tid, file, socket.unwrap_or_default())?;
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let address = hijack.call(
            libc::SYS_mmap,
            [0, PAGE, protection, libc::MAP_SHARED as u64, file, 0],
        )?;
        hijack.mapped = Some(address.cast_unsigned());
        Ok(0)
    });
    if let (Ok(_), Some(socket), Some(address)) = (mapped, socket, hijack.mapped) {
        let _ = teller.step(Step::Connect, || connect(hijack, socket, address));
    }
    if let Some(address) = hijack.mapped {
        let _ = hijack.call(libc::SYS_munmap, [address, PAGE, 0, 0, 0, 0]);
    }
    let _ = hijack.call(libc::SYS_close, [file, 0, 0, 0, 0, 0]);
}

fn connect(hijack: &Hijack, name: &str, address: u64) -> Result<i64, Errno> {
    let family = libc::AF_UNIX as u64;
    let made = hijack.call(
        libc::SYS_socket,
        [
            family,
            (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64,
            0,
            0,
            0,
            0,
        ],
    )?;
    let socket = made.cast_unsigned();
    let length = address_of(name).len() as u64;
    let connected = hijack.call(libc::SYS_connect, [socket, address, length, 0, 0, 0]);
    let _ = hijack.call(libc::SYS_close, [socket, 0, 0, 0, 0, 0]);
    connected
}

/// struct sockaddr_un of an abstract name, unix(7).
fn address_of(name: &str) -> Vec<u8> {
    let family = (libc::AF_UNIX as u16).to_ne_bytes();
    [&family[..], &[0], name.as_bytes()].concat()
}

/// Writes what the target will read into its file in memory, by the way that CRIU takes too.
fn fill(pid: i32, descriptor: u64, socket: &str) -> Result<(), Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    // Pinned first: it must be the file that has just been made, and no other one that is there now.
    let pinned = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(format!("/proc/{pid}/fd/{descriptor}"));
    let pinned = format!(
        "/proc/self/fd/{}",
        pinned.as_ref().map_err(|_| libc::EBADF)?.as_raw_fd()
    );
    let name = fs::read_link(&pinned).map_err(errno)?;
    if !name.to_string_lossy().starts_with("/memfd:criu") {
        return Err(NOT_EXECUTED);
    }
    let file = File::options()
        .read(true)
        .write(true)
        .open(pinned)
        .map_err(errno)?;
    file.set_len(PAGE).map_err(errno)?;
    file.write_all_at(&address_of(socket), 0).map_err(errno)
}

fn listener(pid: i32, name: &str) -> Option<OwnedFd> {
    setns(
        File::open(format!("/proc/{pid}/ns/net")).ok()?,
        CloneFlags::CLONE_NEWNET,
    )
    .ok()?;
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).ok()?;
    bind(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).ok()?).ok()?;
    listen(&fd, Backlog::new(1).ok()?).ok()?;
    Some(fd)
}

/// A stopped thread whose registers and code are not its own.
struct Hijack {
    tid: i32,
    code: usize,
    mapped: Option<u64>,
    begun: Instant,
    registers: Registers,
    mask: u64,
    words: [i64; 2],
}

impl Hijack {
    /// Stops the thread and puts the code there. When it fails, the thread runs on as it was.
    fn begin(tid: i32, code: usize) -> Result<Self, Errno> {
        let begun = stop(tid)?;
        let taken = Self::take(tid, code, begun);
        if taken.is_err() {
            let _ = sys::detach(tid, 0);
        }
        taken
    }

    fn take(tid: i32, code: usize, begun: Instant) -> Result<Self, Errno> {
        // Suspended for CRIU's code as well. EINVAL and EPERM are told by the rung before; a filter then answers here.
        let _ = sys::set_options(tid, sys::OPTION_SUSPEND_SECCOMP);
        let behind = code + CODE.len();
        let hijack = Self {
            tid,
            code,
            mapped: None,
            begun,
            registers: sys::get_registers(tid)?,
            mask: sys::get_signal_mask(tid)?,
            words: [sys::peek(tid, code)?, sys::peek(tid, behind)?],
        };
        let put = || {
            let forced = FORCED.iter().fold(0u64, |set, signal| set | 1 << (signal - 1));
            sys::set_signal_mask(tid, !forced)?;
            sys::poke(tid, code, i64::from_ne_bytes(CODE))?;
            sys::poke(tid, behind, i64::from_ne_bytes(NAME))
        };
        if let Err(error) = put() {
            let _ = hijack.put_back();
            return Err(error);
        }
        Ok(hijack)
    }

    /// Executes one system call; its result, or the error that it gave.
    fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<i64, Errno> {
        let result = self.execute(number, arguments).map_err(|_| NOT_EXECUTED)?;
        // -4095 to -1 are errors, include/linux/err.h.
        if (-4095..0).contains(&result) {
            Err(i32::try_from(-result).unwrap_or(libc::EIO))
        } else {
            Ok(result)
        }
    }

    fn execute(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<i64, Errno> {
        let registers = self
            .registers
            .for_call(number.cast_unsigned(), arguments, self.code as u64);
        sys::set_registers(self.tid, &registers)?;
        sys::resume(self.tid)?;
        match wait(self.tid, Some(CALL))? {
            Some((libc::SIGTRAP, 0)) => Ok(sys::get_registers(self.tid)?.result()),
            // Something catches the target's system calls (PR_SET_SYSCALL_USER_DISPATCH, a filter): for CRIU's too.
            Some((libc::SIGSYS, 0)) => Ok(-i64::from(libc::ENOSYS)),
            Some(_) => Err(libc::EINTR),
            None => {
                // It did not get so far. Nothing can be put back before it stops again, however long that takes.
                sys::interrupt(self.tid)?;
                wait(self.tid, None)?;
                Err(libc::ETIMEDOUT)
            }
        }
    }

    fn put_back(&self) -> Result<(), Errno> {
        let behind = self.code + CODE.len();
        let [first, second] = self.words;
        let outcomes = [
            sys::poke(self.tid, self.code, first),
            sys::poke(self.tid, behind, second),
            sys::set_registers(self.tid, &self.registers),
            sys::set_signal_mask(self.tid, self.mask),
        ];
        outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))
    }

    /// Puts everything back and lets the thread go; microseconds that it stood still.
    fn end(&self) -> Result<i64, Errno> {
        let restored = self.put_back();
        sys::detach(self.tid, 0)?;
        restored?;
        Ok(i64::try_from(self.begun.elapsed().as_micros()).unwrap_or(i64::MAX))
    }
}

/// Stops the only thread of a process at a place where no signal is about to be delivered, whose delivery could not be
/// given back unchanged, and which is in no restartable sequence, rseq(2), that it could not be put back into.
fn stop(tid: i32) -> Result<Instant, Errno> {
    for _ in 0..5 {
        let begun = Instant::now();
        sys::seize(tid)?;
        sys::interrupt(tid)?;
        let signal = match wait(tid, Some(CALL))? {
            Some((_, sys::EVENT_STOP)) if proc::threads(tid).len() != 1 => {
                sys::detach(tid, 0)?;
                return Err(libc::EBUSY);
            }
            Some((_, sys::EVENT_STOP)) if !in_sequence(tid) => return Ok(begun),
            Some((_, sys::EVENT_STOP)) => 0,
            Some((signal, _)) => signal,
            // Without a stop there is no detaching; this child's end lets go, and nothing has been changed.
            None => return Err(libc::ETIMEDOUT),
        };
        sys::detach(tid, signal)?;
    }
    Err(libc::EAGAIN)
}

/// The field rseq_cs of struct rseq (include/uapi/linux/rseq.h) is set while a restartable sequence runs.
fn in_sequence(tid: i32) -> bool {
    const RSEQ_CS: usize = 8;
    match sys::rseq_address(tid) {
        Ok(Some(address)) => sys::peek(tid, address + RSEQ_CS).is_ok_and(|sequence| sequence != 0),
        Ok(None) | Err(_) => false,
    }
}

/// The stop that comes, as signal and event; `None` when none comes within the limit.
fn wait(tid: i32, limit: Option<Duration>) -> Result<Option<(i32, i32)>, Errno> {
    let started = Instant::now();
    loop {
        match sys::wait(tid, false)? {
            Waited::Stopped(signal, event) => return Ok(Some((signal, event))),
            Waited::Exited(_) | Waited::Killed(_) => return Err(libc::ESRCH),
            Waited::Nothing if limit.is_some_and(|limit| started.elapsed() > limit) => return Ok(None),
            Waited::Nothing => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}
