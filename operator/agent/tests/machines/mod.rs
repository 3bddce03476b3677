//! Real machines for the tests: QEMU without hardware help, a Linux kernel, and one program that counts.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Waits for a fact.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            started.elapsed() < PATIENCE,
            "waited {} s for: {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The QEMU of the tests, if there is one. Says aloud what a test is skipped for.
pub fn qemu() -> Option<String> {
    let program = std::env::var("PODCHECKPOINT_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let works = Command::new(&program)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !works {
        skipped("there is no qemu-system-x86_64 (package qemu-system-x86)");
    }
    works.then_some(program)
}

/// A test that could not run is no test that passed: this is seen with --nocapture and in the output of a failure.
pub fn skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("SKIPPED: {name}: {why}");
}

/// A kernel that boots in QEMU: the named one, one of the test cluster's parts, or the machine's own.
pub fn kernel() -> Option<PathBuf> {
    let named = std::env::var_os("PODCHECKPOINT_TEST_KERNEL").map(PathBuf::from);
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let parts = cache
        .map(|cache| cache.join("podcheckpoint/parts"))
        .unwrap_or_default();
    let cached = entries(&parts)
        .into_iter()
        .map(|part| part.join("vmlinuz"))
        .filter(|file| file.exists());
    let own = entries(Path::new("/boot"))
        .into_iter()
        .filter(|file| file.to_string_lossy().contains("vmlinuz-"));
    let found = named.into_iter().chain(cached).chain(own).next();
    if found.is_none() {
        skipped(
            "there is no kernel for a guest (package linux-image-cloud-amd64, or PODCHECKPOINT_TEST_KERNEL)",
        );
    }
    found
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    all.sort();
    all
}

/// An initial file system with nothing but the counter.
pub fn initrd(folder: &Path, mebibytes: u32) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machines/counter.c");
    let program = folder.join("counter");
    let built = Command::new("cc")
        .args([
            "-static",
            "-nostdlib",
            "-O1",
            "-fno-stack-protector",
            "-mcmodel=large",
        ])
        .arg(format!("-DMEBIBYTES={mebibytes}UL"))
        .arg("-o")
        .args([&program, &source])
        .status();
    assert!(
        built.unwrap().success(),
        "cc, which links every Rust program, does not build the counter"
    );
    let path = folder.join("initrd");
    let mut file = File::create(&path).unwrap();
    let init = fs::read(program).unwrap();
    for (number, (name, mode, device, content)) in [
        ("dev", 0o040_755, (0, 0), &b""[..]),
        ("dev/console", 0o020_600, (5, 1), b""),
        ("init", 0o100_755, (0, 0), &init),
        ("TRAILER!!!", 0, (0, 0), b""),
    ]
    .into_iter()
    .enumerate()
    {
        file.write_all(&cpio(name, number, mode, device, content))
            .unwrap();
    }
    path
}

/// One entry of a cpio archive in the format newc (Documentation/driver-api/early-userspace/buffer-format.rst).
fn cpio(name: &str, number: usize, mode: u32, device: (u32, u32), content: &[u8]) -> Vec<u8> {
    let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut entry = b"070701".to_vec();
    let fields = [
        number as u32 + 1,
        mode,
        0,
        0,
        1,
        0,
        content.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    for field in fields {
        entry.extend(format!("{field:08X}").bytes());
    }
    entry.extend(name.bytes());
    entry.push(0);
    pad(&mut entry);
    entry.extend(content);
    pad(&mut entry);
    entry
}

/// A machine; it ends with this value.
pub struct Machine {
    child: Child,
    pub folder: tempfile::TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a machine is started with.
#[derive(Clone, Default)]
pub struct Wanted {
    /// Memory of the guest in MiB.
    pub memory: u32,
    /// How much of it the counter fills; without it there is no guest, only firmware.
    pub filled: Option<u32>,
    /// More arguments.
    pub more: Vec<String>,
    /// File of a state to come up from.
    pub incoming: Option<PathBuf>,
}

impl Machine {
    /// Starts a machine and waits for its monitor. `None` when something is missing here.
    pub fn start(wanted: &Wanted) -> Option<Self> {
        let program = qemu()?;
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-display",
            "none",
            "-nodefaults",
            "-no-reboot",
        ]);
        command.args(["-m", &wanted.memory.to_string()]);
        command
            .arg("-serial")
            .arg(format!("file:{}", folder.path().join("console").display()));
        if let Some(filled) = wanted.filled {
            command
                .arg("-kernel")
                .arg(kernel()?)
                .arg("-initrd")
                .arg(initrd(folder.path(), filled));
            command.args(["-append", "console=ttyS0 quiet panic=-1"]);
        }
        // The second monitor is the one for others than the one who started the machine.
        for socket in ["owner.sock", "monitor.sock"] {
            command.arg("-qmp").arg(format!(
                "unix:{},server=on,wait=off",
                folder.path().join(socket).display()
            ));
        }
        if wanted.incoming.is_some() {
            command.args(["-incoming", "defer"]);
        }
        command.args(&wanted.more).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let machine = Self { child, folder };
        wait_for("the monitor", || {
            UnixStream::connect(machine.path("monitor.sock")).ok()
        });
        if let Some(state) = &wanted.incoming {
            machine.come_up_from(state);
        }
        Some(machine)
    }

    /// As manifest.json says.
    fn come_up_from(&self, state: &Path) {
        let mut monitor = self.owner();
        let manifest = fs::read(state.with_file_name("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let mapped = manifest["format"].as_str().unwrap().contains("mapped-ram");
        if mapped {
            let on = |name| json!({"capability": name, "state": true});
            monitor.ask(
                "migrate-set-capabilities",
                json!({"capabilities": [on("mapped-ram")]}),
            );
        }
        let old = monitor.version < (8, 2);
        let uri = if old {
            format!("exec:cat {}", state.display())
        } else {
            format!("file:{}", state.display())
        };
        monitor.ask("migrate-incoming", json!({"uri": uri}));
        wait_for("the incoming state", || {
            (monitor.status() == "paused").then_some(())
        });
        monitor.ask("cont", json!({}));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The monitor of whoever started the machine.
    pub fn owner(&self) -> Monitor {
        Monitor::connect(&self.path("owner.sock"))
    }

    /// What the guest has counted so far.
    pub fn counted(&self) -> Vec<u64> {
        let text = fs::read_to_string(self.path("console")).unwrap_or_default();
        // The last line may not be whole.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .filter_map(|line| line.trim().strip_prefix("n=")?.parse().ok())
            .collect()
    }

    /// Waits until the guest has counted further than a number.
    pub fn wait_past(&self, number: u64) -> u64 {
        wait_for(&format!("a count above {number}"), || {
            self.counted().last().copied().filter(|n| *n > number)
        })
    }

    /// The program that takes snapshots, at work on this machine.
    pub fn snapshot(&self, to: &Path, timeout: u32) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podcheckpoint-agent"));
        command.args([
            "vm-snapshot",
            "--vmm-pid",
            &self.pid().to_string(),
            "--timeout",
            &timeout.to_string(),
        ]);
        command
            .arg("--to")
            .arg(to)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Takes a snapshot that must fail with a reason, in time, with the machine as it was and nothing left behind.
    pub fn refused(&self, reason: &str) -> String {
        let to = self.path("refused");
        let begun = Instant::now();
        let output = self.snapshot(&to, 30).output().unwrap();
        let took = begun.elapsed();
        let words = words(&output);
        assert!(
            !output.status.success() && words.contains(&format!("{reason}: ")),
            "{words}"
        );
        assert!(took < Duration::from_secs(20), "{took:?}: {words}");
        assert!(!to.exists() && !to.with_extension("partial").exists());
        words
    }
}

/// What a program said.
pub fn words(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A client of QMP that is not the one under test.
pub struct Monitor {
    stream: BufReader<UnixStream>,
    pub version: (u64, u64),
}

impl Monitor {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut monitor = Self {
            stream: BufReader::new(stream),
            version: (0, 0),
        };
        let greeting = monitor.line();
        let number = |name: &str| greeting["QMP"]["version"]["qemu"][name].as_u64().unwrap();
        monitor.version = (number("major"), number("minor"));
        monitor.ask("qmp_capabilities", json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let text = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let mut answer = self.line();
            if answer.get("event").is_none() {
                assert!(answer.get("error").is_none(), "{command}: {answer}");
                return answer["return"].take();
            }
        }
    }

    pub fn status(&mut self) -> String {
        self.ask("query-status", json!({}))["status"]
            .as_str()
            .unwrap()
            .to_owned()
    }
}

/// The snapshot of a guest is what it says it is.
pub fn check_archive(folder: &Path) -> Value {
    let sums = Command::new("sha256sum")
        .args(["--check", "--quiet", "SHA256SUMS"])
        .current_dir(folder)
        .status();
    assert!(sums.unwrap().success());
    let manifest = fs::read(folder.join("manifest.json")).unwrap();
    serde_json::from_slice(&manifest).unwrap()
}

/// Only one test at a time boots a guest: two would slow each other down on a small machine.
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: OnceLock<std::sync::Mutex<()>> = OnceLock::new();
    let one = ONE.get_or_init(Default::default);
    one.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
