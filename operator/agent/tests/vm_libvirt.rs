//! A snapshot of a machine that a real libvirtd keeps: QEMU's own monitor is the daemon's, so everything goes by virsh.
//!
//! The daemon is on a node of its own: in namespaces of mounts and processes, where the agent's program is run too.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is a failed test"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod machines;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use machines::{check_archive, initrd, kernel, skipped, wait_for, words};
use podcheckpoint_agent::vm::by_hand;
use serde_json::json;

/// A daemon with one domain, shop_vm.
struct Libvirt {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    folder: tempfile::TempDir,
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.child.wait();
    }
}

fn there(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

impl Libvirt {
    fn start() -> Option<Self> {
        if !there("libvirtd") || !there("virsh") || !rustix::process::geteuid().is_root() {
            skipped(
                "this needs root, libvirtd and virsh (packages libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients)",
            );
            return None;
        }
        machines::qemu()?;
        let folder = tempfile::tempdir().unwrap();
        let domain = domain(folder.path(), &kernel()?);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machines/libvirt.sh");
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(script)
            .arg(folder.path())
            .arg(domain)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut libvirt = Self {
            child,
            commands,
            answers,
            folder,
        };
        assert_eq!(libvirt.virsh("domstate shop_vm"), "running", "{}", libvirt.log());
        Some(libvirt)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("libvirtd.log")).unwrap_or_default()
    }

    fn virsh(&mut self, command: &str) -> String {
        writeln!(self.commands.as_mut().unwrap(), "{command}").unwrap();
        let mut answer = String::new();
        loop {
            let mut line = String::new();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "{}", self.log());
            if line == "done\n" {
                return answer.trim().to_owned();
            }
            answer.push_str(&line);
        }
    }

    fn pid(&self) -> i32 {
        let domain = b"guest=shop_vm,";
        let ours = |pid: &i32| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let folder = self.folder.path().to_str().unwrap().as_bytes();
            let has = |what: &[u8]| arguments.windows(what.len()).any(|part| part == what);
            has(domain) && has(folder)
        };
        let all = fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|e| e.file_name().to_str()?.parse().ok())
            .find(ours)
            .unwrap()
    }

    /// The node's first process, as it is seen from here.
    fn first(&self) -> i32 {
        let own = self.child.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    /// `podcheckpoint-agent vm-snapshot` on that node, where QEMU has another number.
    fn snapshot(&self, arguments: &[&str]) -> Output {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let numbers = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .unwrap();
        Command::new("nsenter")
            .args(["--target", &self.first().to_string(), "--mount", "--pid"])
            .arg(env!("CARGO_BIN_EXE_podcheckpoint-agent"))
            .args([
                "vm-snapshot",
                "--vmm-pid",
                numbers.split_whitespace().last().unwrap(),
            ])
            .args(arguments)
            .output()
            .unwrap()
    }

    fn counted(&self) -> Vec<u64> {
        let text = fs::read_to_string(self.folder.path().join("console")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .filter_map(|line| line.trim().strip_prefix("n=")?.parse().ok())
            .collect()
    }

    fn wait_past(&self, number: u64) -> u64 {
        wait_for(&format!("a count above {number}"), || {
            self.counted().last().copied().filter(|n| *n > number)
        })
    }
}

fn domain(folder: &Path, kernel: &Path) -> PathBuf {
    fs::write(folder.join("disk"), vec![7; 4 << 20]).unwrap();
    let initrd = initrd(folder, 16);
    let xml = format!(
        "<domain type='qemu'><name>shop_vm</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{}</kernel><initrd>{}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline></os>
        <cpu mode='maximum'/>
        <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
        <serial type='file'><source path='{f}/console'/><target port='0'/></serial><memballoon model='none'/>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{f}/disk'/><target dev='vda' bus='virtio'/></disk>
        </devices></domain>",
        kernel.display(),
        initrd.display(),
        f = folder.display()
    );
    let path = folder.join("domain.xml");
    fs::write(&path, xml).unwrap();
    path
}

#[test]
fn a_domain_is_saved_goes_on_and_is_restored() {
    let Some(mut libvirt) = Libvirt::start() else {
        return;
    };
    let before = libvirt.wait_past(3);
    let to = libvirt.folder.path().join("snapshot");
    let output = libvirt.snapshot(&["--to", to.to_str().unwrap()]);
    assert!(output.status.success(), "{}", words(&output));
    eprintln!("{}", words(&output).trim());
    assert_eq!(libvirt.virsh("domstate shop_vm"), "running");
    libvirt.wait_past(before + 3);
    let manifest = check_archive(&to);
    assert_eq!(manifest["disks"][0]["copy"], json!("disk0"), "{manifest}");
    assert_eq!(fs::read(to.join("disk0")).unwrap(), vec![7; 4 << 20]);

    libvirt.virsh("destroy shop_vm");
    let at_end = *libvirt.counted().last().unwrap();
    fs::write(libvirt.folder.path().join("console"), "").unwrap();
    let said = libvirt.virsh(&format!("restore {} --running", to.join("vmstate").display()));
    let first = wait_for("the restored count", || libvirt.counted().first().copied());
    assert!(
        first > before && first <= at_end,
        "{said}: {before} < {first} <= {at_end}"
    );
    libvirt.wait_past(first + 3);
}

#[test]
fn a_domain_that_is_paused_already_is_left_as_it_is() {
    let Some(mut libvirt) = Libvirt::start() else {
        return;
    };
    libvirt.virsh("suspend shop_vm");
    let output = libvirt.snapshot(&[]);
    assert!(words(&output).contains("VmAlreadyPaused: "), "{}", words(&output));
    assert_eq!(libvirt.virsh("domstate shop_vm"), "paused");
}

#[test]
fn what_looks_like_a_domain_and_has_other_files_than_the_node_is_none_and_its_virsh_is_not_run() {
    let Some(libvirt) = Libvirt::start() else {
        return;
    };
    // From here the domain is in a mount namespace of its own, as in a pod.
    assert_eq!(by_hand::machine(libvirt.pid()).unwrap().domain, None);
    let output = Command::new(env!("CARGO_BIN_EXE_podcheckpoint-agent"))
        .args(["vm-snapshot", "--vmm-pid", &libvirt.pid().to_string()])
        .output()
        .unwrap();
    assert!(words(&output).contains("VmMonitor"), "{}", words(&output));
}
