//! The rungs of the ladder that touch something. Everything here runs in a disposable child: any call may never return,
//! and the child may be killed at any point without harm to the target, since nothing in the target is ever changed.

use std::fs::File;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::observation::{Step, Subject};
use crate::proc;
use crate::sys::{self, Errno, Fork, Waited};
use crate::wire::Teller;

/// Added to the number of filters when one of them asks a listener.
pub const LISTENER: i64 = 1 << 16;
/// How long a child of the probe's own may take to do what it was made for.
const OWN_CHILD: Duration = Duration::from_millis(100);
/// How often a breakpoint must not have trapped: an emulator was seen to miss one once on a busy machine.
const BREAKPOINT_TRIES: usize = 3;

/// Controls: what must work before anything is blamed on ptrace.
pub fn controls(out: &mut File) {
    let mut teller = Teller::new(out, Subject::Control, 0);
    let _ = teller.step(Step::Clock, || {
        let slept = sys::sleep(Duration::from_micros(50));
        Ok(i64::try_from(slept.as_micros()).unwrap_or(i64::MAX))
    });
    let _ = teller.step(Step::ForkAndWait, || match sys::fork()? {
        Fork::Child => sys::exit(7),
        Fork::Parent(pid) => match sys::wait(pid, true)? {
            Waited::Exited(status) => Ok(i64::from(status)),
            _ => Err(libc::EPROTO),
        },
    });
    let _ = teller.step(Step::StopWithoutPtrace, || match sys::fork()? {
        Fork::Child => {
            sys::stop_self();
            sys::exit(0)
        }
        Fork::Parent(pid) => {
            let stopped = sys::wait(pid, true)?;
            sys::kill(pid, libc::SIGKILL);
            sys::wait(pid, true)?;
            if matches!(stopped, Waited::Stopped(libc::SIGSTOP, 0)) {
                Ok(0)
            } else {
                Err(libc::EPROTO)
            }
        }
    });
    let _ = teller.step(Step::Reach, reach);
}

/// Whether the call ptrace reaches the kernel at all. ESRCH is success: there is no such process.
fn reach() -> Result<i64, Errno> {
    match sys::interrupt(sys::NOBODY) {
        Err(libc::ESRCH) => Ok(0),
        Err(error) => Err(error),
        // Something answers for the kernel.
        Ok(_) => Err(0),
    }
}

/// The whole mechanism on a child of the probe's own.
pub fn own_child(out: &mut File) {
    let Ok(fork) = sys::fork() else { return };
    match fork {
        Fork::Child => loop {
            marker();
            PASSES.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(100));
        },
        Fork::Parent(pid) => {
            let mut teller = Teller::new(out, Subject::Own, pid);
            let _ = trace_own(&mut teller, pid);
            sys::kill(pid, libc::SIGKILL);
            let _ = sys::wait(pid, true);
        }
    }
}

/// How often the child has come past [`marker`].
static PASSES: AtomicUsize = AtomicUsize::new(0);

/// What the hardware breakpoint is set on.
#[inline(never)]
extern "C" fn marker() {
    black_box(0);
}

fn trace_own(teller: &mut Teller<'_>, pid: i32) -> Result<(), Errno> {
    teller.step(Step::Seize, || sys::seize(pid))?;
    teller.step(Step::Interrupt, || sys::interrupt(pid))?;
    stop(teller, pid)?;
    let word = std::ptr::from_ref(&LISTENER) as usize;
    inspect(teller, pid, Some(word), true);
    if cfg!(target_arch = "x86_64") {
        let _ = teller.step(Step::Breakpoint, || breakpoint(pid));
    }
    // A breakpoint leaves it stopped anew, by another signal; nobody sees what becomes of this child.
    teller.step(Step::Detach, || sys::detach(pid, 0)).map(drop)
}

/// Sets an execution breakpoint in register 0 and waits for the trap. Value 1: it trapped; 0: it did not.
fn breakpoint(pid: i32) -> Result<i64, Errno> {
    for _ in 0..BREAKPOINT_TRIES {
        if traps(pid)? {
            return Ok(1);
        }
    }
    Ok(0)
}

fn traps(pid: i32) -> Result<bool, Errno> {
    let passes = || sys::peek(pid, PASSES.as_ptr() as usize);
    sys::set_debug_register(pid, 0, marker as *const () as usize)?;
    // Bit 0 of register 7: register 0 is enabled, for execution, of one byte.
    sys::set_debug_register(pid, 7, 1)?;
    let before = passes()?;
    let trapped = loop {
        sys::resume(pid)?;
        match wait_for_stop(pid, OWN_CHILD)? {
            Some(libc::SIGTRAP) => break true,
            Some(_) => {}
            // A child that others keep from the processor has not come by yet, which says nothing of the breakpoint. The
            // first pass may have been over when the register was written, but for the count.
            None if passes()?.wrapping_sub(before) >= 2 => break false,
            None => {}
        }
    };
    sys::set_debug_register(pid, 7, 0)?;
    Ok(trapped)
}

fn wait_for_stop(pid: i32, limit: Duration) -> Result<Option<i32>, Errno> {
    let started = Instant::now();
    while started.elapsed() < limit {
        match sys::wait(pid, false)? {
            Waited::Nothing => std::thread::sleep(Duration::from_micros(50)),
            Waited::Stopped(signal, _) => return Ok(Some(signal)),
            Waited::Exited(_) | Waited::Killed(_) => return Err(libc::ESRCH),
        }
    }
    // Not trapped: it must be stopped before its registers can be written again.
    sys::interrupt(pid)?;
    sys::wait(pid, true)?;
    Ok(None)
}

/// What CRIU's code does inside a process of the target, done under the same AppArmor profile by this child, which ends
/// with it. The names are those that the kernel compares with the profile's rules.
pub fn canary(out: &mut File, pid: i32, profile: &str) {
    let mut teller = Teller::new(out, Subject::Canary, pid);
    let change = || {
        let order = format!("changeprofile {profile}");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/attr/current");
        let written = file.and_then(|mut file| std::io::Write::write(&mut file, order.as_bytes()));
        written.map_err(errno).map(|_| 0)
    };
    if teller.step(Step::Profile, change).is_err() {
        return;
    }
    let _ = teller.step(Step::UnixSocket, sys::carries_a_message);
    let open = |path: &str| File::open(path).map_err(errno).map(|_| 0);
    let _ = teller.step(Step::ProcFolder, || open("/proc/"));
    let _ = teller.step(Step::CgroupFile, || open("/proc/self/cgroup"));
}

/// A process of the target, as far as the child has to know it.
#[derive(Clone, Debug)]
pub struct Quarry {
    /// Number.
    pub pid: i32,
    /// It may be attached to: nothing cheaper has shown that this would hang or fail.
    pub attach: bool,
    /// Threads that have a seccomp filter.
    pub filtered: Vec<i32>,
}

/// Access without attaching, and then every thread, one after the other, each for the shortest time.
pub fn target(out: &mut File, quarries: &[Quarry]) {
    for quarry in quarries {
        let mut teller = Teller::new(out, Subject::Target, quarry.pid);
        let word = access(&mut teller, quarry.pid);
        if quarry.attach {
            threads(&mut teller, quarry, word);
        }
    }
}

/// What needs the right to attach, or to read, but does not attach. Gives an address in the target's code.
fn access(teller: &mut Teller<'_>, pid: i32) -> Option<usize> {
    let mut code = None;
    let _ = teller.step(Step::Maps, || {
        let maps = proc::text(format!("/proc/{pid}/maps")).map_err(errno)?;
        code = proc::code_address(&maps);
        Ok(i64::try_from(maps.lines().count()).unwrap_or(0))
    });
    let _ = teller.step(Step::Kcmp, || sys::kcmp(pid));
    if let Some(address) = code {
        let _ = teller.step(Step::ReadMemory, || sys::read_memory(pid, address));
    }
    let _ = teller.step(Step::GetFd, || sys::get_fd(pid));
    code
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Threads come and go while this looks, so it looks again, until nothing is new; a process that makes new ones faster
/// than this can look is left after some rounds, with every thread proved that lived long enough.
fn threads(teller: &mut Teller<'_>, quarry: &Quarry, word: Option<usize>) {
    let mut seen = std::collections::HashSet::new();
    for _ in 0..3 {
        let new: Vec<i32> = proc::threads(quarry.pid)
            .into_iter()
            .filter(|tid| seen.insert(*tid))
            .collect();
        if new.is_empty() {
            return;
        }
        for tid in new {
            teller.tid = tid;
            let filtered = quarry.filtered.contains(&tid);
            if trace(teller, tid, word.filter(|_| tid == quarry.pid), filtered)
                .is_err_and(|e| e != libc::ESRCH)
            {
                return;
            }
        }
    }
}

/// `PTRACE_SEIZE`. The kernel says EPERM also of a thread that has just ended: that is not a refusal.
fn seize(tid: i32) -> Result<i64, Errno> {
    let ended = || proc::status(tid).is_none_or(|status| matches!(status.state, 'Z' | 'X'));
    sys::seize(tid).map_err(|error| {
        if error == libc::EPERM && ended() {
            libc::ESRCH
        } else {
            error
        }
    })
}

/// One thread: seize, stop, look, let go.
fn trace(teller: &mut Teller<'_>, tid: i32, word: Option<usize>, filtered: bool) -> Result<(), Errno> {
    teller.step(Step::Seize, || seize(tid))?;
    teller.step(Step::Interrupt, || sys::interrupt(tid))?;
    let signal = stop(teller, tid)?;
    let stopped = Instant::now();
    inspect(teller, tid, word, filtered);
    teller.step(Step::Detach, || {
        sys::detach(tid, signal)?;
        Ok(i64::try_from(stopped.elapsed().as_micros()).unwrap_or(i64::MAX))
    })?;
    teller
        .step(Step::RunsAgain, || match proc::status(tid) {
            Some(status) if status.tracer == 0 => Ok(0),
            Some(_) => Err(libc::EBUSY),
            None => Err(libc::ESRCH),
        })
        .map(drop)
}

/// Waits until the thread has stopped; the signal that must be given back to it, 0 for none: a signal may have arrived
/// at the same moment, and the stop is then its delivery.
fn stop(teller: &mut Teller<'_>, tid: i32) -> Result<i32, Errno> {
    let mut signal = 0;
    teller.step(Step::Stop, || match sys::wait(tid, true)? {
        Waited::Stopped(_, sys::EVENT_STOP) => Ok(i64::from(sys::EVENT_STOP)),
        Waited::Stopped(delivered, event) => {
            signal = delivered;
            Ok(i64::from(event))
        }
        Waited::Exited(_) | Waited::Killed(_) | Waited::Nothing => Err(libc::ESRCH),
    })?;
    Ok(signal)
}

/// What CRIU does to a stopped thread, apart from what changes it. Each on its own: one that fails hides no other.
fn inspect(teller: &mut Teller<'_>, tid: i32, word: Option<usize>, filtered: bool) {
    let _ = teller.step(Step::Registers, || sys::registers(tid));
    if let Some(address) = word {
        let peeked = teller
            .step(Step::Peek, || sys::peek(tid, address).map(|_| 0))
            .is_ok();
        if peeked {
            let _ = teller.step(Step::Poke, || sys::poke(tid, address, sys::peek(tid, address)?));
        }
    }
    let _ = teller.step(Step::SignalInfo, || sys::signal_info(tid));
    let _ = teller.step(Step::SignalMask, || sys::get_signal_mask(tid).map(|_| 0));
    if filtered {
        let options = sys::OPTION_TRACE_SYS_GOOD | sys::OPTION_SUSPEND_SECCOMP;
        let _ = teller.step(Step::SuspendSeccomp, || sys::set_options(tid, options));
        let _ = teller.step(Step::SeccompFilter, || match sys::filters(tid) {
            Ok((count, listener)) => Ok(count + if listener { LISTENER } else { 0 }),
            // A thread without a filter: the probe's own child.
            Err(libc::EINVAL) => Ok(0),
            Err(error) => Err(error),
        });
    }
    let _ = teller.step(Step::Rseq, || sys::rseq(tid));
}
