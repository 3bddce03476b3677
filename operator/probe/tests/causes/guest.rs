//! A virtual machine for what the kernel of this one does not let happen: a Linux kernel, and nothing in it but the
//! fixture and the probe.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Answer, FIXTURE, PROBE, can, parts, record};

const QEMU: &str = "qemu-system-x86_64";

/// Runs the probe there, in a context of the fixture, on a target that has to go on. `None` where there is no such
/// machine; then it has been said what is missing.
pub fn probe(context: &str) -> Result<Option<Answer>> {
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
    fs::write(&files, archive(&[("init", FIXTURE), ("probe", PROBE)])?)?;
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
            &format!("console=ttyS0 quiet panic=-1 lsm=landlock,lockdown,bpf context={context}"),
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(files)
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text
        .lines()
        .find(|line| line.starts_with("{\"event\":\"report\""));
    let report = serde_json::from_str(report.with_context(|| format!("no report: {text}"))?)?;
    ensure!(
        text.contains("untraced true") && text.contains("goes on true"),
        "{text}"
    );
    record(&report);
    let micros = report["observations"]["micros"].as_u64().context("no time")?;
    Ok(Some(Answer {
        report,
        took: Duration::from_micros(micros),
    }))
}

/// The one that is named, or that of the second node in `e2e/cluster`.
fn kernel() -> Option<PathBuf> {
    let named = std::env::var_os("PROBE_GUEST_KERNEL").map(PathBuf::from);
    let kernels = || parts().into_iter().map(|part| part.join("vmlinuz"));
    let cached = || kernels().find(|kernel| kernel.is_file());
    named.or_else(cached)
}

/// An initial file system in the format `newc` of cpio(5): programs, and the folders for what the kernel shows.
fn archive(programs: &[(&str, &str)]) -> Result<Vec<u8>> {
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
    for (name, program) in programs {
        add(name, 0o100_755, &fs::read(program)?);
    }
    add("TRAILER!!!", 0, &[]);
    Ok(archive)
}
