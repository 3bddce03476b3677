//! A process that cannot (or can) be traced for one real reason, for the tests. Never part of an image.
//!
//! `probe-fixture target PROGRESS MODE...` is a target: it computes, waits in epoll for a timer, and writes to the file
//! PROGRESS how far it is; it prints `ready` once the cause is there. `probe-fixture under FILTER PROGRAM ARG...` runs
//! a program (the probe) in a context that is the cause. Without an argument it is the first process of a guest and does
//! both there.
#![allow(
    unsafe_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "only numbers and own buffers are passed to the kernel"
)]

use std::ffi::{CStr, CString};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

static COUNT: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some(mode) = words.get(1) else {
        return first_process();
    };
    match *mode {
        "target" => target(words[2], words[3], &words[4..]),
        "under" => under(words[2], &words[3..]),
        "trace" => trace(words[2].parse().unwrap()),
        "criu-cache" => criu_cache(words[2], words[3].parse().ok()),
        other => panic!("no mode {other}"),
    }
}

// --- targets -------------------------------------------------------------------------------------------------------

fn target(progress: &str, mode: &str, rest: &[&str]) {
    let number = || rest.first().and_then(|n| n.parse::<usize>().ok()).unwrap_or(1);
    match mode {
        "plain" => {}
        "threads" => (1..number()).for_each(|_| sleeper()),
        "memory" => memory(progress, number()),
        "churn" => drop(std::thread::spawn(|| {
            while !STOP.load(Ordering::Relaxed) {
                let thread = std::thread::spawn(|| std::thread::sleep(Duration::from_micros(300)));
                let _ = thread.join();
            }
        })),
        "tree" => (1..number()).for_each(|_| let_be(child(loop_forever))),
        "forks" => drop(std::thread::spawn(|| {
            loop {
                let pid = child(|| std::thread::sleep(Duration::from_millis(1)));
                unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            }
        })),
        "zombie-child" => {
            child(|| {});
        }
        "not-dumpable" => {
            become_user(4242);
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
        }
        "other-user" => {
            become_user(4243);
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) };
        }
        "user-namespace" => assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWUSER) }, 0),
        "pending-trap" => pending_trap(),
        "filtered" => let_be(filter(libc::SYS_acct, libc::SECCOMP_RET_ERRNO | 1, false)),
        "listener" => let_be(filter(libc::SYS_acct, libc::SECCOMP_RET_USER_NOTIF, true)),
        "signals" => signals(),
        "no-memory" => limit(libc::RLIMIT_AS, 1),
        "no-files" => limit(libc::RLIMIT_NOFILE, 0),
        "scoped" => scoped(),
        "strange-name" => {
            let name = b"\xff) Z \xfe\nState:\0";
            unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
            child(loop_forever);
        }
        "mdwe" => assert_eq!(unsafe { libc::prctl(65, 1, 0, 0, 0) }, 0),
        "selinux-type" => std::fs::write("/proc/self/attr/current", selinux_context(rest[0])).unwrap(),
        "vfork" => vfork_parent(progress),
        "process-namespace" => process_namespace(progress),
        "zombie-leader" => zombie_leader(progress),
        "exec" => blocked_exec(),
        other => panic!("no target {other}"),
    }
    if !matches!(mode, "no-memory" | "no-files") {
        say_ready(&std::process::id().to_string());
    }
    compute(progress);
}

/// Fills so many MiB, then looks at the clock every millisecond and notes, in microseconds, whenever it stood still.
fn memory(progress: &str, mebibytes: usize) -> ! {
    let mut memory = vec![0u8; mebibytes << 20];
    for (number, page) in memory.chunks_mut(4096).enumerate() {
        page[..8].copy_from_slice(&(number as u64 * 0x9e37_79b9_7f4a_7c15 + 1).to_le_bytes());
    }
    let mut notes = std::fs::File::create(progress).unwrap();
    say_ready(&std::process::id().to_string());
    let mut last = std::time::Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(1));
        let gap = last.elapsed();
        if gap > Duration::from_millis(4) {
            writeln!(notes, "{}", gap.as_micros()).unwrap();
        }
        last = std::time::Instant::now();
        std::hint::black_box(&memory);
    }
}

/// A descriptor that stays open for as long as the process lives.
fn let_be(_descriptor: i32) {}

fn say_ready(word: &str) {
    println!("ready {word}");
    std::io::stdout().flush().unwrap();
}

/// Counts, checks what it has counted, and waits in epoll for a timer, for as long as it lives.
fn compute(progress: &str) {
    let (epoll, timer) = unsafe {
        (
            libc::epoll_create1(0),
            libc::timerfd_create(libc::CLOCK_MONOTONIC, 0),
        )
    };
    let every = libc::timespec {
        tv_sec: 0,
        tv_nsec: 500_000,
    };
    let spec = libc::itimerspec {
        it_interval: every,
        it_value: every,
    };
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 1,
    };
    unsafe {
        libc::timerfd_settime(timer, 0, &raw const spec, std::ptr::null_mut());
        libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, timer, &raw mut event);
    }
    let notes = std::fs::File::create(progress).unwrap();
    let (mut sum, mut number) = (0u64, 0u64);
    loop {
        let mut fired = libc::epoll_event { events: 0, u64: 0 };
        // EINTR is what a stop does to epoll_wait, ptrace(2) BUGS.
        if unsafe { libc::epoll_wait(epoll, &raw mut fired, 1, 1000) } == 1 {
            let mut expirations = 0u64;
            unsafe { libc::read(timer, (&raw mut expirations).cast(), 8) };
        }
        for _ in 0..1000 {
            number += 1;
            sum = sum.wrapping_add(number.wrapping_mul(number));
        }
        // n(n+1)(2n+1)/6, in 128 bits
        let n = u128::from(number);
        let expected = (n * (n + 1) * (2 * n + 1) / 6) as u64;
        let correct = sum == expected;
        // Of one length, so that whoever reads never sees half of it.
        let line = format!("{number:020} {correct:<5}\n");
        notes.write_all_at(line.as_bytes(), 0).unwrap();
        COUNT.store(number, Ordering::Relaxed);
    }
}

fn loop_forever() {
    loop {
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn sleeper() {
    std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(loop_forever)
        .unwrap();
}

fn child(work: impl FnOnce()) -> i32 {
    match unsafe { libc::fork() } {
        0 => {
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            work();
            unsafe { libc::_exit(0) }
        }
        pid => pid,
    }
}

fn become_user(uid: u32) {
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setgid(uid), 0);
        assert_eq!(libc::setuid(uid), 0);
    }
}

fn pending_trap() {
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGTRAP);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::raise(libc::SIGTRAP);
    }
}

/// A signal every 100 us, handled.
fn signals() {
    extern "C" fn count(_signal: i32) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: 100,
    };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    unsafe {
        libc::signal(libc::SIGALRM, count as *const () as usize);
        libc::syscall(
            libc::SYS_setitimer,
            libc::ITIMER_REAL,
            &raw const timer,
            std::ptr::null_mut::<libc::itimerval>(),
        );
    }
}

/// A limit for the time after everything that the target itself needs has been made.
fn limit(resource: libc::__rlimit_resource_t, value: u64) {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let limits = libc::rlimit {
            rlim_cur: value,
            rlim_max: value,
        };
        assert_eq!(unsafe { libc::setrlimit(resource, &raw const limits) }, 0);
        say_ready(&std::process::id().to_string());
        loop_forever();
    });
}

/// A Landlock domain out of which no abstract socket can be reached, Landlock ABI 6.
fn scoped() {
    #[repr(C)]
    struct Attributes {
        files: u64,
        network: u64,
        scoped: u64,
    }
    let attributes = Attributes {
        files: 0,
        network: 0,
        scoped: 1,
    };
    restrict((&raw const attributes).cast(), size_of::<Attributes>());
}

/// A parent that waits in vfork for a child which neither ends nor calls exec. The child is the one that computes.
fn vfork_parent(progress: &str) -> ! {
    let parent = std::process::id();
    // SYS_vfork by hand: the C library's wrapper is not for a child that goes on for long.
    if unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0) } == 0 {
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        say_ready(&parent.to_string());
        compute(progress);
    }
    loop_forever();
    unreachable!()
}

/// A process in a namespace of its own, where it has a number that nobody has outside: the greatest.
fn process_namespace(progress: &str) -> ! {
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWPID) }, 0);
    child(|| {
        let greatest: i32 = std::fs::read_to_string("/proc/sys/kernel/pid_max")
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        // Of the namespace of whoever writes it; the next one is greater by one.
        std::fs::write("/proc/sys/kernel/ns_last_pid", (greatest - 2).to_string()).unwrap();
        child(|| {
            // As runtimes do; a session from outside would be another cause.
            unsafe { libc::setsid() };
            // /proc is still that of the outer namespace.
            say_ready(std::fs::read_link("/proc/self").unwrap().to_str().unwrap());
            compute(progress);
        });
        loop_forever();
    });
    loop_forever();
    unreachable!()
}

/// The first thread ends, another one goes on.
fn zombie_leader(progress: &str) -> ! {
    let progress = progress.to_owned();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        say_ready(&std::process::id().to_string());
        compute(&progress);
    });
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!()
}

/// Calls execve while another of its threads, traced and ended, is not reaped by its tracer: de_thread waits for ever.
fn blocked_exec() {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        sender
            .send(unsafe { libc::syscall(libc::SYS_gettid) } as i32)
            .unwrap();
        loop_forever();
    });
    let tid = receiver.recv().unwrap();
    let parent = std::process::id();
    let mut ends = [0; 2];
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // The tracer seizes the thread and never reaps it.
    child(move || {
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) }, 0);
        assert_eq!(unsafe { libc::write(ends[1], [0u8].as_ptr().cast(), 1) }, 1);
        // execve has begun once it has ended the thread: WNOWAIT does not reap it.
        let ended = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
        let mut how: libc::siginfo_t = unsafe { std::mem::zeroed() };
        assert_eq!(
            unsafe { libc::waitid(libc::P_PID, tid as u32, &raw mut how, ended) },
            0
        );
        say_ready(&parent.to_string());
        loop_forever();
    });
    // An execve before that would find nobody in its way, however busy the machine is.
    assert_eq!(unsafe { libc::read(ends[0], [0u8].as_mut_ptr().cast(), 1) }, 1);
    let program = CString::new("/bin/sleep").unwrap();
    let argument = CString::new("60").unwrap();
    unsafe {
        libc::execv(
            program.as_ptr(),
            [program.as_ptr(), argument.as_ptr(), std::ptr::null()].as_ptr(),
        )
    };
}

/// A tracer: seizes a thread, says so, and stays.
fn trace(tid: i32) {
    assert_eq!(
        unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) },
        0,
        "{}",
        std::io::Error::last_os_error()
    );
    say_ready(&tid.to_string());
    loop_forever();
}

/// Runs the probe on targets in a guest, tells about both on the console, and ends the guest. The contexts are a word of
/// the kernel's command line, which becomes its environment.
fn first_process() {
    for (kind, place) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        mount_at(kind, place);
    }
    for context in std::env::var("contexts").unwrap().split(',') {
        run_probe(context);
    }
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
}

fn mount_at(kind: &CStr, place: &CStr) {
    let result = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    assert_eq!(result, 0, "{place:?}");
}

/// The context is one of the tracer, or `selinux:ENFORCE:DENY_PTRACE:TYPE`, the type being that of the target.
fn run_probe(context: &str) {
    let selinux = context.strip_prefix("selinux:").map(|words| {
        let words: Vec<&str> = words.split(':').collect();
        set_selinux(words[0], words[1]);
        words[2]
    });
    let mode = selinux.map_or(vec!["plain"], |kind| vec!["selinux-type", kind]);
    let mut target = Command::new("/init")
        .args(["target", "/progress"])
        .args(mode)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(target.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let pid = line.strip_prefix("ready ").unwrap().trim();
    let probe = ["/probe", "--json", "--pid", pid];
    let status = if selinux.is_some() {
        Command::new(probe[0]).args(&probe[1..]).status()
    } else {
        Command::new("/init")
            .args(["under", context])
            .args(probe)
            .status()
    };
    println!("{status:?}");
    if selinux.is_some() {
        // So that this process may look, too.
        set_selinux("0", "0");
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    println!("untraced {}", status.contains("TracerPid:\t0"));
    let progress = || std::fs::read_to_string("/progress").unwrap_or_default();
    let before = progress();
    let on = (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        let now = progress();
        now != before && now.contains("true")
    });
    println!("goes on {on}");
    target.kill().and_then(|()| target.wait()).unwrap();
}

/// A context of the policy in e2e/node/selinux.cil.
fn selinux_context(kind: &str) -> String {
    format!("system_u:system_r:{kind}:s0")
}

/// Loads the policy into the kernel, unless it is there, and sets what is to be set.
fn set_selinux(enforce: &str, deny_ptrace: &str) {
    let folder = std::path::Path::new("/sys/fs/selinux");
    let write = |file: &str, bytes: &[u8]| std::fs::write(folder.join(file), bytes).expect(file);
    if !folder.join("load").exists() {
        mount_at(c"selinuxfs", c"/sys/fs/selinux");
        write("load", &std::fs::read("/policy").unwrap());
    }
    write("booleans/deny_ptrace", deny_ptrace.as_bytes());
    write("commit_pending_bools", b"1");
    write("enforce", enforce.as_bytes());
}

// --- contexts of the tracer ----------------------------------------------------------------------------------------

fn under(context: &str, command: &[&str]) {
    let action = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    match context {
        "errno" => filter(libc::SYS_ptrace, action, false),
        "kill" => filter(libc::SYS_ptrace, libc::SECCOMP_RET_KILL_PROCESS, false),
        "trap" => filter(libc::SYS_ptrace, libc::SECCOMP_RET_TRAP, false),
        "silent-listener" => {
            // Somebody else must hold the listener: it would end with this process otherwise.
            let listener = filter(libc::SYS_ptrace, libc::SECCOMP_RET_USER_NOTIF, true);
            child(move || {
                let _held = listener;
                loop_forever();
            });
            let flags = unsafe { libc::fcntl(listener, libc::F_GETFD) };
            unsafe { libc::fcntl(listener, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
            listener
        }
        "listener-gone" => {
            let listener = filter(libc::SYS_ptrace, libc::SECCOMP_RET_USER_NOTIF, true);
            unsafe { libc::close(listener) }
        }
        "harmless-filter" => filter(libc::SYS_acct, action, false),
        "without-clone3" => filter(
            libc::SYS_clone3,
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
            false,
        ),
        "unprivileged" => {
            become_user(4242);
            0
        }
        "user-namespace" => {
            let result = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
            // Mapped, so that the capabilities survive execve: all of them, and none outside.
            std::fs::write("/proc/self/uid_map", "0 0 1").unwrap();
            result
        }
        "landlock" => landlock(),
        "bpf-lsm" => bpf_lsm(),
        "bpf-lsm-for-all" => bpf_lsm_for_all(),
        "process-namespace" => new_process_namespace(),
        other => panic!("no context {other}"),
    };
    let error = Command::new(command[0]).args(&command[1..]).exec();
    panic!("{error}");
}

/// Goes on as the first process of a new namespace, with a /proc of its own, and ends as that process does.
fn new_process_namespace() -> i32 {
    assert_eq!(
        unsafe { libc::unshare(libc::CLONE_NEWPID | libc::CLONE_NEWNS) },
        0
    );
    let pid = unsafe { libc::fork() };
    if pid > 0 {
        let mut status = 0;
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        std::process::exit(libc::WEXITSTATUS(status));
    }
    let none = std::ptr::null();
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::mount(
            none,
            c"/".as_ptr(),
            none,
            libc::MS_REC | libc::MS_PRIVATE,
            none.cast(),
        );
        libc::mount(
            c"proc".as_ptr(),
            c"/proc".as_ptr(),
            c"proc".as_ptr(),
            0,
            none.cast(),
        )
    }
}

/// Restricts itself with Landlock: nothing but removing files below / is denied, and ptrace out of the domain with it.
fn landlock() -> i32 {
    #[repr(C)]
    struct Attributes {
        handled: u64,
    }
    const REMOVE_DIR: u64 = 1 << 4;
    let attributes = Attributes { handled: REMOVE_DIR };
    restrict((&raw const attributes).cast(), size_of::<Attributes>());
    0
}

/// landlock_restrict_self(2) with an empty ruleset.
fn restrict(attributes: *const libc::c_void, size: usize) {
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let ruleset = libc::syscall(libc::SYS_landlock_create_ruleset, attributes, size, 0);
        assert!(ruleset >= 0, "no Landlock");
        assert_eq!(libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0), 0);
    }
}

/// Denies ptrace to itself and to what it starts by a BPF program on the kernel's hook for it. To nobody else: the
/// program denies to one group only, which nobody else is in.
fn bpf_lsm() -> i32 {
    const GROUP: u32 = 0x7072_6f62;
    deny_tracing(&[
        instruction(0x85, 0, 0, 15),                  // call bpf_get_current_uid_gid
        instruction(0x77, 0, 0, 32),                  // the group is the upper half
        instruction(0x15, 0, 2, GROUP.cast_signed()), // if it is the one, go to -EPERM
        instruction(0xb7, 0, 0, 0),                   // 0
        instruction(0x95, 0, 0, 0),                   // exit
        instruction(0xb7, 0, 0, -libc::EPERM),        // -EPERM
        instruction(0x95, 0, 0, 0),                   // exit
    ]);
    unsafe { libc::setgid(GROUP) }
}

/// Denies every process of this kernel to attach to any, for as long as what it starts runs.
fn bpf_lsm_for_all() -> i32 {
    const PTRACE_MODE_ATTACH: i32 = 2;
    deny_tracing(&[
        instruction(0x79, 0x12, 8, 0), // register 2 is the mode, the hook's second argument
        instruction(0x57, 0x02, 0, PTRACE_MODE_ATTACH), // of it only this
        instruction(0x55, 0x02, 2, 0), // if it is there, go to -EPERM
        instruction(0xb7, 0, 0, 0),    // 0
        instruction(0x95, 0, 0, 0),    // exit
        instruction(0xb7, 0, 0, -libc::EPERM), // -EPERM
        instruction(0x95, 0, 0, 0),    // exit
    ]);
    0
}

/// struct bpf_insn: u8 code, u8 registers (source, then destination), i16 offset, i32 immediate.
fn instruction(code: u64, registers: u64, offset: u64, immediate: i32) -> u64 {
    code | registers << 8 | offset << 16 | u64::from(immediate.cast_unsigned()) << 32
}

/// The program goes with the last process that has its link, which what is started inherits.
fn deny_tracing(program: &[u64]) {
    const HOOK: &str = "bpf_lsm_ptrace_access_check";
    let (prog_load, link_create, type_lsm, lsm_mac) = (5, 28, 29, 27);
    let btf = std::fs::read(podcheckpoint_probe::btf::KERNEL).unwrap();
    let hook = podcheckpoint_probe::btf::number(&btf, HOOK).unwrap();
    // union bpf_attr, include/uapi/linux/bpf.h.
    let mut load = [0u8; 120];
    put(&mut load, 0, &[type_lsm, program.len() as u32]);
    put(&mut load, 8, &words(program.as_ptr() as u64));
    put(&mut load, 16, &words(c"GPL".as_ptr() as u64));
    load[48..60].copy_from_slice(b"deny_tracing");
    put(&mut load, 68, &[lsm_mac]);
    put(&mut load, 108, &[hook]);
    let loaded = bpf(prog_load, &load);
    let mut create = [0u8; 64];
    put(&mut create, 0, &[loaded, 0, lsm_mac]);
    let link = bpf(link_create, &create);
    assert_eq!(unsafe { libc::fcntl(link as i32, libc::F_SETFD, 0) }, 0);
}

fn bpf(command: i64, attributes: &[u8]) -> u32 {
    let size = attributes.len();
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) };
    assert!(result >= 0, "bpf {command}: {}", std::io::Error::last_os_error());
    result as u32
}

fn put(attributes: &mut [u8], at: usize, values: &[u32]) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    attributes[at..at + bytes.len()].copy_from_slice(&bytes);
}

fn words(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

/// Goes on in a folder as in a machine of its own, lets CRIU there write its cache while the kernel seems to lack a
/// system call, if one is given, and stays.
fn criu_cache(root: &str, missing: Option<i64>) {
    let mount = |what: &str, place: &str, kind: &str, flags| {
        let [what, place, kind] = [what, place, kind].map(|word| CString::new(word).unwrap());
        let result = unsafe {
            libc::mount(
                what.as_ptr(),
                place.as_ptr(),
                kind.as_ptr(),
                flags,
                std::ptr::null(),
            )
        };
        assert_eq!(result, 0, "{place:?}: {}", std::io::Error::last_os_error());
    };
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
    mount("none", "/", "none", libc::MS_REC | libc::MS_PRIVATE);
    mount(root, root, "none", libc::MS_BIND);
    std::env::set_current_dir(root).unwrap();
    mount("/dev", "dev", "none", libc::MS_BIND | libc::MS_REC);
    for (kind, place) in [
        ("proc", "proc"),
        ("sysfs", "sys"),
        ("tmpfs", "run"),
        ("tmpfs", "tmp"),
    ] {
        mount(kind, place, kind, 0);
    }
    // The old root is put over the new one, and taken away.
    let here = c".".as_ptr();
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_pivot_root, here, here), 0);
        assert_eq!(libc::umount2(here, libc::MNT_DETACH), 0);
    }
    let pid = child(|| {
        if let Some(number) = missing {
            filter(number, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, false);
        }
        let _error = Command::new("/usr/sbin/criu")
            .arg("check")
            .stdout(Stdio::null())
            .exec();
    });
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    assert!(std::fs::metadata("/run/criu.kdat").is_ok(), "CRIU wrote no cache");
    say_ready(&std::process::id().to_string());
    loop_forever();
}

/// A seccomp filter that does one thing about one system call, and lets everything else pass; the listener, if asked.
fn filter(syscall: i64, action: u32, listener: bool) -> i32 {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let program = [
        // The number of the system call is the first word of struct seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: syscall as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, action),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    let flags = if listener {
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
    } else {
        0
    };
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let result = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        );
        assert!(result >= 0, "{}", std::io::Error::last_os_error());
        result as i32
    }
}
