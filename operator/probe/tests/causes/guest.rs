//! A virtual machine for what the kernel of this one does not let happen: a Linux kernel, and nothing in it but the
//! fixture and the probe.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Answer, FIXTURE, PROBE, can, parts, record, test_name};

const QEMU: &str = "qemu-system-x86_64";

/// An SELinux policy, and what compiles it.
const POLICY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../e2e/node/selinux.cil");
const COMPILER: &str = "secilc";

/// Runs the probe there under each state of SELinux, as the fixture's `run_probe` has them. `None` as with [`probe`].
pub fn probe_under_selinux(states: &[&str]) -> Result<Option<Vec<Answer>>> {
    if !can(COMPILER, Command::new(COMPILER).arg("--help").output().is_ok()) {
        return Ok(None);
    }
    let folder = tempfile::tempdir()?;
    let policy = folder.path().join("policy");
    let (policy, contexts) = (policy.to_string_lossy(), folder.path().join("file_contexts"));
    let compiled = Command::new(COMPILER)
        .args(["-o", &policy, POLICY, "-f"])
        .arg(contexts)
        .output()?;
    ensure!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    run(
        &states
            .iter()
            .map(|state| format!("selinux:{state}"))
            .collect::<Vec<_>>()
            .join(","),
        "landlock,lockdown,selinux",
        &[("policy", &policy)],
    )
}

/// Runs the probe there, in a context of the fixture, on a target that has to go on. `None` where there is no such
/// machine; then it has been said what is missing.
pub fn probe(context: &str) -> Result<Option<Answer>> {
    let answers = run(context, "landlock,lockdown,bpf", &[])?;
    let answer = answers.and_then(|answers| answers.into_iter().next());
    if let Some(answer) = &answer {
        record(&test_name(), &answer.report);
    }
    Ok(answer)
}

/// Once in each of the contexts, with these security modules and these files besides the programs.
fn run(contexts: &str, modules: &str, more: &[(&str, &str)]) -> Result<Option<Vec<Answer>>> {
    let version = Command::new(QEMU).arg("--version").output();
    let Some(kernel) = kernel() else {
        can("a kernel for a guest in PROBE_GUEST_KERNEL", false);
        return Ok(None);
    };
    if !can(QEMU, version.is_ok()) {
        return Ok(None);
    }
    let folder = tempfile::tempdir()?;
    let files = folder.path().join("files");
    let programs = [("init", FIXTURE), ("probe", PROBE)];
    fs::write(&files, archive(&[&programs, more].concat())?)?;
    let output = Command::new("timeout")
        .args([
            "300",
            QEMU,
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "768",
            "-no-reboot",
        ])
        .args(["-display", "none", "-monitor", "none", "-serial", "stdio"])
        .args([
            "-append",
            &format!("console=ttyS0 quiet panic=-1 lsm={modules} contexts={contexts}"),
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(files)
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = |start: &'static str| text.lines().filter(move |line| line.starts_with(start));
    let wanted = contexts.split(',').count();
    for word in ["{\"event\":\"report\"", "untraced true", "goes on true"] {
        ensure!(
            lines(word).count() == wanted,
            "not {wanted} times {word:?}: {text}"
        );
    }
    lines("{\"event\":\"report\"")
        .map(answer)
        .collect::<Result<_>>()
        .map(Some)
}

fn answer(line: &str) -> Result<Answer> {
    let report: serde_json::Value = serde_json::from_str(line)?;
    let micros = report["observations"]["micros"].as_u64().context("no time")?;
    Ok(Answer {
        report,
        took: Duration::from_micros(micros),
    })
}

/// The one that is named, or that of the second node in `e2e/cluster`.
fn kernel() -> Option<PathBuf> {
    let named = std::env::var_os("PROBE_GUEST_KERNEL").map(PathBuf::from);
    let kernels = || parts().into_iter().map(|part| part.join("vmlinuz"));
    let cached = || kernels().find(|kernel| kernel.is_file());
    named.or_else(cached)
}

/// An initial file system in the format `newc` of cpio(5): files, and the folders for what the kernel shows.
fn archive(files: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, data: &[u8]| {
        let number = archive.len();
        let (size, length) = (data.len(), name.len() + 1);
        let header = format!(
            "070701{number:08X}{mode:08X}{:024X}{:08X}{size:08X}{:032X}{length:08X}{:08X}",
            1, 0, 0, 0
        );
        for part in [[header.as_bytes(), name.as_bytes(), &[0]].concat(), data.to_vec()] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    };
    for folder in ["proc", "sys", "dev"] {
        add(folder, 0o40755, &[]);
    }
    for (name, file) in files {
        add(name, 0o100_755, &fs::read(file)?);
    }
    add("TRAILER!!!", 0, &[]);
    Ok(archive)
}
