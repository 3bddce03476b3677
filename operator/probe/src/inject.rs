//! The last rung, taken only when asked for: system calls are executed in a thread of the target, as CRIU's own code is,
//! and everything is put back. It tells what the target's security module, its limits and its Landlock domain let CRIU's
//! code do there, which nothing outside can know.
//!
//! It is the only rung that changes something: for well below a millisecond the thread has other registers and other
//! words at its code's first address. So this child is not ended with the probe, and every wait in it has a limit after
//! which it puts back what it changed by itself.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use crate::observation::{Step, Subject};
use crate::sys::{self, Errno, Registers, Waited};
use crate::wire::Teller;

/// How long a call in the target may take. Below the silence after which the parent ends this child.
const CALL: Duration = Duration::from_millis(200);
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
        let taken = hijack.insert(Hijack::begin(pid, code)?);
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
        hijack.call(libc::SYS_memfd_create, [name, 0, 0, 0, 0, 0])
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
        [family, libc::SOCK_SEQPACKET as u64, 0, 0, 0, 0],
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
    let path = format!("/proc/{pid}/fd/{descriptor}");
    let file = File::options().read(true).write(true).open(path).map_err(errno)?;
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
    bind(
        std::os::fd::AsRawFd::as_raw_fd(&fd),
        &UnixAddr::new_abstract(name.as_bytes()).ok()?,
    )
    .ok()?;
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
            // Everything but SIGTRAP waits.
            sys::set_signal_mask(tid, !(1 << (libc::SIGTRAP - 1)))?;
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
        let registers = self
            .registers
            .for_call(number.cast_unsigned(), arguments, self.code as u64);
        sys::set_registers(self.tid, &registers)?;
        sys::resume(self.tid)?;
        match wait(self.tid)? {
            Some((libc::SIGTRAP, 0)) => {}
            Some(_) => return Err(libc::EINTR),
            None => {
                // It did not get so far: stopped again, what was changed can be put back.
                sys::interrupt(self.tid)?;
                wait(self.tid)?;
                return Err(libc::ETIMEDOUT);
            }
        }
        let result = sys::get_registers(self.tid)?.result();
        // -4095 to -1 are errors, include/linux/err.h.
        if (-4095..0).contains(&result) {
            Err(i32::try_from(-result).unwrap_or(libc::EIO))
        } else {
            Ok(result)
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

/// Stops a thread in which no signal is about to be delivered: its delivery could not be given back unchanged.
fn stop(tid: i32) -> Result<Instant, Errno> {
    for _ in 0..5 {
        let begun = Instant::now();
        sys::seize(tid)?;
        sys::interrupt(tid)?;
        match wait(tid)? {
            Some((_, sys::EVENT_STOP)) => return Ok(begun),
            Some((signal, _)) => sys::detach(tid, signal)?,
            // Without a stop there is no detaching; this child's end lets go.
            None => return Err(libc::ETIMEDOUT),
        };
    }
    Err(libc::EAGAIN)
}

/// The stop that comes, as signal and event; `None` when none comes in time.
fn wait(tid: i32) -> Result<Option<(i32, i32)>, Errno> {
    let started = Instant::now();
    loop {
        match sys::wait(tid, false)? {
            Waited::Stopped(signal, event) => return Ok(Some((signal, event))),
            Waited::Exited(_) | Waited::Killed(_) => return Err(libc::ESRCH),
            Waited::Nothing if started.elapsed() > CALL => return Ok(None),
            Waited::Nothing => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}
