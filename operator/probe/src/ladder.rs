//! The ladder, from what is safe to what is dangerous. A rung is taken only when everything cheaper has shown that it
//! will not hang; each is taken in a disposable child, under a deadline, and a child that falls silent is looked at
//! from outside, ended, and the target verified.

use std::fs;
use std::time::{Duration, Instant};

use crate::child::{self, Child, ChildError, Ending, Limits};
use crate::criu;
use crate::facts;
use crate::inject;
use crate::observation::{End, Observations, Process, Record, Sample, Stall, Step, Subject, Thread};
use crate::proc;
use crate::rungs::{self, Quarry};
use crate::selinux::Selinux;
use crate::wire::{Decoder, Message};

/// What the probe is asked for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Processes; each with everything below it. None: only the machine is looked at.
    pub targets: Vec<i32>,
    /// System calls are executed in the first thread of each of them.
    pub inject: bool,
    /// CRIU is looked at too.
    pub criu: Option<criu::Place>,
}

/// A step that takes longer hangs: on an idle machine the slowest takes a millisecond.
const SILENCE: Duration = Duration::from_millis(400);
/// What needs no target, each part of it.
const MACHINE: Duration = Duration::from_millis(600);
/// All threads of all processes together; with the deadlines below, a verdict comes within two seconds.
const TARGETS: Duration = Duration::from_millis(800);
/// How long looking at a task that hangs may take.
const LOOK: Duration = Duration::from_millis(100);
/// How long looking through the descriptors of every process may take.
const SEARCH: Duration = Duration::from_millis(300);

/// What is told while the probe goes on.
pub enum Event<'a> {
    /// A step is about to be taken, or has ended.
    Step(&'a Message),
    /// A step did not end.
    Stalled(&'a Record),
}

/// Climbs as far as is safe.
///
/// # Errors
/// When no child process can be started, without which nothing may be tried.
pub fn climb(request: &Request, tell: &mut dyn FnMut(Event<'_>)) -> Result<Observations, ChildError> {
    let started = Instant::now();
    let log = KernelLog::open();
    let criu = request.criu.as_ref().map(criu::start);
    // What needs no target is tried while the target is looked at.
    let machine = Machine {
        controls: child::start(rungs::controls)?,
        own: child::start(rungs::own_child)?,
    };
    let selinux = Selinux::open();
    let tracer = facts::tracer(selinux.as_ref());
    let mut climber = Climber {
        seen: Observations {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: facts::kernel(selinux.as_ref()),
            processes: facts::processes(&request.targets, &tracer, selinux.as_ref()),
            tracer,
            targets: request.targets.clone(),
            hidden: facts::hidden(&request.targets),
            namesakes: facts::namesakes(&request.targets),
            ..Observations::default()
        },
        tell,
    };
    climber.run(request, machine)?;
    let mut seen = climber.seen;
    seen.denials = log.denials();
    if let Some(running) = criu {
        seen.criu = running.finish();
        if seen.criu.is_none() {
            seen.gaps.push("CRIU's own check could not be started".into());
        }
    }
    seen.micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(seen)
}

/// The rungs that need no target.
struct Machine {
    controls: Child,
    own: Child,
}

struct Climber<'a> {
    seen: Observations,
    tell: &'a mut dyn FnMut(Event<'_>),
}

impl Climber<'_> {
    fn run(&mut self, request: &Request, machine: Machine) -> Result<(), ChildError> {
        if let Some(why) = self.machine(machine) {
            self.skip_targets(why);
            return Ok(());
        }
        if request.targets.is_empty() {
            return Ok(());
        }
        self.canaries()?;
        let quarries: Vec<Quarry> = self.seen.processes.iter().map(quarry).collect();
        for process in &self.seen.processes {
            if let Some(why) = obstacle(process) {
                self.seen.steps.push(skipped(process.pid, why));
            }
        }
        self.rung(TARGETS, |out| rungs::target(out, &quarries))?;
        if request.inject {
            self.inject()?;
        }
        self.verify();
        Ok(())
    }

    /// Why no target may be touched, if so.
    fn machine(&mut self, machine: Machine) -> Option<&'static str> {
        self.attend(MACHINE, machine.controls);
        if self.failed(Subject::Control) {
            // What does not even work without ptrace says nothing about it.
            machine.own.abandon();
            let unreached = |r: &Record| r.step == Step::Reach && !matches!(r.end, End::Done(_));
            return Some(if self.seen.steps.iter().any(unreached) {
                "ptrace does not reach the kernel"
            } else {
                "the machine's own controls failed"
            });
        }
        self.attend(MACHINE, machine.own);
        let stalled = |record: &Record| matches!(record.end, End::Stalled(_));
        let hangs = self.seen.steps.iter().any(stalled);
        hangs.then_some("ptrace hangs even on a child of the probe's own")
    }

    /// The one rung that changes something, and only where every other one was taken without a failure.
    fn inject(&mut self) -> Result<(), ChildError> {
        let roots = self.seen.processes.iter().filter(|process| process.root);
        let pids: Vec<i32> = roots.map(|process| process.pid).collect();
        for pid in pids {
            let own = |record: &&Record| record.subject == Subject::Target && record.pid == pid;
            let mut records = self.seen.steps.iter().filter(own).peekable();
            let clean = records.peek().is_some() && records.all(|record| matches!(record.end, End::Done(_)));
            let code = clean.then(|| code_of(pid)).flatten();
            match code {
                Some(code) => self.rung(TARGETS, |out| inject::inject(out, pid, code))?,
                None => self.seen.gaps.push(format!(
                    "nothing was executed in process {pid}, which was not proved before"
                )),
            }
        }
        Ok(())
    }

    /// CRIU's code in the target is under the target's profile. A child of the probe's own goes under it first, once for
    /// each profile.
    fn canaries(&mut self) -> Result<(), ChildError> {
        let mut profiles: Vec<(String, i32)> = Vec::new();
        for process in &self.seen.processes {
            if let Some(name) = process.profile()
                && !profiles.iter().any(|(known, _)| known == name)
            {
                profiles.push((name.to_owned(), process.pid));
            }
        }
        for (name, pid) in profiles {
            self.rung(SILENCE, |out| rungs::canary(out, pid, &name))?;
        }
        Ok(())
    }

    /// Runs one rung in a child and records what it told.
    fn rung(&mut self, total: Duration, work: impl FnOnce(&mut fs::File)) -> Result<(), ChildError> {
        self.attend(total, child::start(work)?);
        Ok(())
    }

    /// Records what a child tells.
    fn attend(&mut self, total: Duration, child: Child) {
        let limits = Limits {
            silence: SILENCE.min(total),
            total,
        };
        let (mut decoder, mut pending, mut stall) = (Decoder::default(), None, None);
        let pending_at_silence = std::cell::Cell::new(None::<Message>);
        let ending = {
            let heard = |bytes: &[u8]| {
                for message in decoder.feed(bytes) {
                    pending = message.result.is_none().then_some(message);
                    pending_at_silence.set(pending);
                    (self.tell)(Event::Step(&message));
                    record(&mut self.seen, &message);
                }
            };
            child.attend(limits, heard, |tracer| {
                let tid = pending_at_silence.get().map_or(0, |message| message.tid);
                stall = Some(look(tracer, tid));
            })
        };
        self.conclude(ending, pending, stall, total);
    }

    /// What the end of a child says about the step that it had announced and not finished.
    fn conclude(&mut self, ending: Ending, pending: Option<Message>, stall: Option<Stall>, total: Duration) {
        let end = match ending {
            Ending::Exited(_) => return,
            Ending::Killed(signal) => End::Killed(signal),
            Ending::Silent(killed) => End::Stalled(Box::new(Stall {
                tracer_killed: killed,
                ..stall.unwrap_or_default()
            })),
            Ending::Late => {
                self.seen.gaps.push(format!(
                    "not every step was taken within {} ms",
                    total.as_millis()
                ));
                return;
            }
        };
        let Some(message) = pending else {
            self.seen
                .gaps
                .push("a child of the probe ended without saying what it did".into());
            return;
        };
        let mut record = as_record(&message, end);
        if let End::Stalled(stall) = &mut record.end {
            stall.target_untraced = untraced(record.tid);
        }
        (self.tell)(Event::Stalled(&record));
        self.seen.steps.push(record);
    }

    fn failed(&self, subject: Subject) -> bool {
        let bad = |end: &End| !matches!(end, End::Done(_));
        self.seen
            .steps
            .iter()
            .any(|record| record.subject == subject && bad(&record.end))
    }

    fn skip_targets(&mut self, why: &str) {
        let records: Vec<_> = self
            .seen
            .processes
            .iter()
            .map(|p| skipped(p.pid, why.to_owned()))
            .collect();
        self.seen.steps.extend(records);
    }

    /// Whatever happened, nothing may be left traced by a child of the probe.
    fn verify(&mut self) {
        let own = std::process::id().cast_signed();
        for process in &self.seen.processes {
            for tid in proc::threads(process.pid) {
                let tracer = proc::status(tid).map_or(0, |status| status.tracer);
                let ours = tracer != 0 && proc::stat(tracer).is_some_and(|stat| stat.parent == own);
                if ours {
                    self.seen.gaps.push(format!(
                        "thread {tid} is still traced by the probe's child {tracer}"
                    ));
                }
            }
        }
    }
}

/// Where the target's code begins. Its maps can block, so a child reads them.
fn code_of(pid: i32) -> Option<usize> {
    let maps = child::ask(LOOK, || fs::read(format!("/proc/{pid}/maps")).unwrap_or_default())?;
    proc::code_address(&String::from_utf8_lossy(&maps))
}

fn quarry(process: &Process) -> Quarry {
    Quarry {
        pid: process.pid,
        attach: obstacle(process).is_none(),
        filtered: process
            .notable
            .iter()
            .filter(|t| t.seccomp != 0)
            .map(|t| t.tid)
            .collect(),
    }
}

/// Why a process must not be attached to: what is already known shows that it would hang, or cannot work. Pure.
pub fn obstacle(process: &Process) -> Option<String> {
    if process.kernel_thread {
        return Some("it is a thread of the kernel".into());
    }
    if let Some(freezer) = process.freezers.iter().find(|freezer| freezer.frozen) {
        return Some(format!("its cgroup {} is frozen", freezer.path));
    }
    if process.leader_ended() {
        return Some("its first thread has ended".into());
    }
    let telling = |thread: &&Thread| thread.tracer != 0 || thread.state == 'D';
    let thread = process.notable.iter().find(telling)?;
    Some(if thread.tracer != 0 {
        format!("thread {} is traced by {}", thread.tid, thread.tracer)
    } else {
        format!(
            "thread {} waits in the kernel and cannot be interrupted",
            thread.tid
        )
    })
}

fn skipped(pid: i32, why: String) -> Record {
    Record {
        subject: Subject::Target,
        step: Step::Seize,
        pid,
        tid: pid,
        end: End::Skipped(why),
        micros: 0,
    }
}

fn as_record(message: &Message, end: End) -> Record {
    Record {
        subject: message.subject,
        step: message.step,
        pid: message.pid,
        tid: message.tid,
        end,
        micros: message.micros,
    }
}

/// Keeps what matters: every failure, and every step on the leader of a process. A thousand threads that work are one
/// number.
fn record(seen: &mut Observations, message: &Message) {
    let Some(result) = message.result else { return };
    if message.subject == Subject::Target && message.step == Step::RunsAgain && result.is_ok() {
        seen.threads_proved += 1;
    }
    // A thread that ends while it is looked at is no failure.
    let ended = message.tid != message.pid && result == Err(libc::ESRCH);
    let telling = message.tid == message.pid
        || result.is_err()
        || matches!(result, Ok(value) if value >= rungs::LISTENER && message.step == Step::SeccompFilter);
    if telling && !ended {
        let end = result.map_or_else(End::Errno, End::Done);
        seen.steps.push(as_record(message, end));
    }
}

/// The tracer that hangs and the thread that it hangs on, before either is touched.
fn look(tracer: i32, tid: i32) -> Stall {
    Stall {
        tracer: sample(tracer),
        target: if tid > 0 { sample(tid) } else { Sample::default() },
        listeners: listeners(),
        ..Stall::default()
    }
}

/// What a task does. /proc/PID/{wchan,syscall,stack} can block themselves.
fn sample(tid: i32) -> Sample {
    let status = proc::status(tid).unwrap_or_default();
    let read = |name: &str| {
        let path = format!("/proc/{tid}/{name}");
        let bytes = child::ask(LOOK, || fs::read(path).unwrap_or_default())?;
        String::from_utf8(bytes).ok()
    };
    Sample {
        state: status.state,
        tracer: status.tracer,
        wchan: read("wchan").filter(|name| !name.is_empty() && name != "0"),
        syscall: read("syscall").and_then(|text| proc::syscall_number(&text)),
        stack: read("stack")
            .map(|text| proc::stack_functions(&text))
            .unwrap_or_default(),
    }
}

/// Who holds a seccomp listener: the one who does not answer. What has been found in time is kept.
fn listeners() -> Vec<String> {
    let find = |out: &mut fs::File| {
        use std::io::Write;
        for pid in proc::all() {
            let fds = fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten()
                .flatten();
            let mut links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
            if links.any(|link| link.to_string_lossy().contains("seccomp notify")) {
                let comm = proc::status(pid).map(|status| status.comm).unwrap_or_default();
                let _ = writeln!(out, "{pid} ({comm})");
            }
        }
    };
    let limits = Limits {
        silence: SEARCH,
        total: SEARCH,
    };
    let mut found = Vec::new();
    let _ = child::run(limits, find, |bytes| found.extend_from_slice(bytes), |_| {});
    String::from_utf8_lossy(&found)
        .lines()
        .map(str::to_owned)
        .collect()
}

fn untraced(tid: i32) -> bool {
    if tid <= 0 {
        return true;
    }
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(200) {
        if proc::status(tid).is_none_or(|status| status.tracer == 0) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// The kernel's log from the moment that the probe began.
struct KernelLog(Option<fs::File>);

impl KernelLog {
    fn open() -> Self {
        use std::io::Seek;
        use std::os::unix::fs::OpenOptionsExt;
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg");
        // At its end: what was denied to others before is no evidence.
        Self(file.ok().filter(|file| {
            let mut file = file;
            file.seek(std::io::SeekFrom::End(0)).is_ok()
        }))
    }

    /// Lines that say that something was denied to the probe or one of its children.
    fn denials(self) -> Vec<String> {
        use std::io::Read;
        let Some(mut file) = self.0 else { return Vec::new() };
        let own = proc::status(std::process::id().cast_signed())
            .unwrap_or_default()
            .comm;
        let mut found = Vec::new();
        let mut buffer = [0u8; 8192];
        // Each read gives one record; EAGAIN is the end.
        while let Ok(count) = file.read(&mut buffer) {
            let line = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
            let text = line.split_once(';').map_or(line.as_str(), |(_, text)| text);
            if count == 0 || found.len() >= 8 {
                break;
            }
            if is_denial(text, &own) {
                found.push(
                    text.lines()
                        .next()
                        .unwrap_or_default()
                        .chars()
                        .take(300)
                        .collect(),
                );
            }
        }
        found
    }
}

/// Yama, AppArmor, SELinux and seccomp, as they log what they deny. Only what names the probe.
fn is_denial(text: &str, comm: &str) -> bool {
    let ptrace = text.contains("ptrace attach of")
        || text.contains("apparmor=\"DENIED\"")
        || is_avc(text)
        || text.contains("type=1326");
    ptrace && !comm.is_empty() && text.contains(&format!("\"{comm}"))
}

/// Looking at a process is asked for as reading a file, which then has no name. What a permissive domain is logged for
/// was not denied.
fn is_avc(text: &str) -> bool {
    let file = [" path=", " name=", " ino="].iter().any(|key| text.contains(key));
    let asked = text.contains("{ ptrace }")
        || text.contains("{ sys_ptrace }")
        || (text.contains("{ read }") && text.contains("tclass=file") && !file);
    text.contains("avc:") && text.contains("denied") && asked && !text.contains("permissive=1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::FreezerState;

    fn process() -> Process {
        Process {
            pid: 7,
            threads: 1,
            ..Process::default()
        }
    }

    #[test]
    fn a_healthy_process_may_be_attached_to() {
        assert_eq!(obstacle(&process()), None);
    }

    #[test]
    fn what_would_hang_is_never_attached_to() {
        let mut frozen = process();
        frozen.freezers.push(FreezerState {
            frozen: true,
            ..FreezerState::default()
        });
        assert!(obstacle(&frozen).is_some());
        for (state, tracer) in [('D', 0), ('Z', 0), ('X', 0), ('t', 9), ('S', 9)] {
            let mut process = process();
            process.notable.push(Thread {
                tid: 7,
                state,
                tracer,
                ..Thread::default()
            });
            assert!(obstacle(&process).is_some(), "{state} {tracer}");
        }
    }

    #[test]
    fn a_thread_that_ends_beside_the_first_is_no_obstacle() {
        let mut process = process();
        process.notable.push(Thread {
            tid: 8,
            state: 'X',
            ..Thread::default()
        });
        assert_eq!(obstacle(&process), None);
    }

    #[test]
    fn only_denials_of_the_probe_are_evidence() {
        assert!(is_denial(
            "ptrace attach of \"sleep\"[12] was attempted by \"podcheckpoint-p\"[13]",
            "podcheckpoint-p"
        ));
        assert!(!is_denial(
            "ptrace attach of \"sleep\"[12] was attempted by \"gdb\"[13]",
            "podcheckpoint-p"
        ));
    }

    #[test]
    fn selinux_denials_are_told_from_what_it_only_logs_and_from_files() {
        let avc = |asked: &str, class: &str, permissive: u8| {
            is_avc(&format!(
                "audit: type=1400 audit(1.2:3): avc:  denied  {{ {asked} }} for  pid=7 comm=\"x\" scontext=a:b:c:s0 tcontext=a:b:d:s0 tclass={class} permissive={permissive}"
            ))
        };
        assert!(avc("ptrace", "process", 0) && avc("read", "file", 0) && avc("sys_ptrace", "capability", 0));
        assert!(!avc("ptrace", "process", 1) && !avc("read", "dir", 0) && !avc("signal", "process", 0));
        assert!(!is_avc(
            "avc:  denied  { read } for  pid=7 comm=\"x\" name=\"maps\" dev=\"proc\" ino=8 scontext=a:b:c:s0 tcontext=a:b:d:s0 tclass=file permissive=0"
        ));
    }
}
