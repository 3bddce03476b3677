//! libvirt through `virsh`, which is on every node that has libvirt: QEMU's own monitor belongs to the daemon alone.
//!
//! `virsh` runs as root, so it must be the node's own: it is run in the mount namespace of the node's first process, and
//! only for a QEMU that is in the same one. What looks like libvirt's QEMU in a pod has the pod's files around it.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::process::Command;
use tokio::time::timeout;

use super::qmp::nonsense;
use super::{ANSWER, Description, Disk, Driver, VmError, agent_program};
use crate::sandbox::facts;

/// The daemon of the node; one that belongs to a user is not asked.
const URI: &str = "qemu:///system";
/// The node's first process.
const NODE: i32 = 1;
/// Name of the state in an archive.
const STATE: &str = "vmstate";
/// How long a domain may take to stand still or to run.
const SETTLE: Duration = Duration::from_secs(10);
/// How long saving may take when nobody gives it up before.
const SAVE: Duration = Duration::from_secs(3600);

/// One domain.
pub(super) struct Libvirt {
    domain: String,
}

impl Libvirt {
    /// The domain of a QEMU on the node itself.
    pub(super) fn new(domain: &str, pid: i32) -> Result<Self, VmError> {
        if facts::shares_mounts(pid, NODE) {
            return Ok(Self {
                domain: domain.to_owned(),
            });
        }
        Err(VmError::Unreachable {
            socket: format!("domain {domain}"),
            why: format!(
                "process {pid} does not see the node's own files, and no program of a pod is run as root"
            ),
        })
    }

    async fn virsh(&self, arguments: &[&str], limit: Duration) -> Result<String, VmError> {
        let name = format!("virsh {}", arguments.first().unwrap_or(&""));
        let mut command = Command::new(agent_program());
        command
            .args([
                "in-mounts-of",
                &NODE.to_string(),
                "virsh",
                "--quiet",
                "--connect",
                URI,
            ])
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output: Output = match timeout(limit, command.output()).await {
            Err(_) => {
                return Err(nonsense(
                    &name,
                    &format!("no answer within {} s", limit.as_secs()),
                ));
            }
            Ok(output) => output.map_err(|error| nonsense(&name, &error.to_string()))?,
        };
        let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            return Ok(words(&output.stdout));
        }
        Err(VmError::Refused {
            request: name,
            answer: words(&output.stderr),
        })
    }

    async fn state(&self) -> Result<String, VmError> {
        self.virsh(&["domstate", &self.domain], ANSWER).await
    }

    async fn look(&self) -> Result<Description, VmError> {
        let state = self.state().await?;
        let version = self.virsh(&["version"], ANSWER).await?;
        let xml = self.virsh(&["dumpxml", &self.domain], ANSWER).await?;
        let disks = self
            .virsh(&["domblklist", &self.domain, "--details"], ANSWER)
            .await?;
        Ok(Description {
            version: version.lines().last().unwrap_or_default().to_owned(),
            running: state == "running",
            state,
            memory: memory(&xml),
            blockers: devices(&xml),
            disks: list(&disks),
            format: "libvirt save image".to_owned(),
        })
    }

    async fn write(&self, folder: &Path) -> Result<(), VmError> {
        let file = format!("file={},snapshot=external", folder.join(STATE).display());
        let disks = list(
            &self
                .virsh(&["domblklist", &self.domain, "--details"], ANSWER)
                .await?,
        );
        // The disks are copied beside it while the domain stands still: an overlay would change what it runs on.
        let none: Vec<String> = disks
            .iter()
            .map(|d| format!("{},snapshot=no", d.device))
            .collect();
        let mut arguments = vec![
            "snapshot-create-as",
            &self.domain,
            "podcheckpoint",
            "--no-metadata",
            "--memspec",
            &file,
        ];
        for disk in &none {
            arguments.extend(["--diskspec", disk]);
        }
        self.virsh(&arguments, SAVE).await.map(drop)
    }

    async fn run_again(&self) -> Result<(), VmError> {
        let mut state = self.state().await?;
        if state == "running" {
            return Ok(());
        }
        // Refused when there is nothing to give up.
        let _ = self.virsh(&["domjobabort", &self.domain], SETTLE).await;
        let told = self.virsh(&["resume", &self.domain], SETTLE).await;
        state = self.state().await?;
        if state == "running" {
            return Ok(());
        }
        told?;
        Err(nonsense(
            "virsh resume",
            &format!("the domain is still {state:?}"),
        ))
    }
}

impl Driver for Libvirt {
    fn describe(&mut self) -> BoxFuture<'_, Result<Description, VmError>> {
        self.look().boxed()
    }

    fn pause(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        async { self.virsh(&["suspend", &self.domain], SETTLE).await.map(drop) }.boxed()
    }

    fn save<'a>(&'a mut self, folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        self.write(folder).boxed()
    }

    fn resume(&mut self) -> BoxFuture<'_, Result<(), VmError>> {
        self.run_again().boxed()
    }

    fn restore_with(&self) -> &'static [&'static str] {
        &[
            "Put the disks where the domain has them, or change their paths: virsh save-image-edit /PATH/vmstate",
            "virsh restore /PATH/vmstate --running, with the source's domain ended or under another name",
        ]
    }
}

/// `<currentMemory unit='KiB'>`, which libvirt always writes in this unit.
fn memory(xml: &str) -> Option<u64> {
    let (_, rest) = xml.split_once("<currentMemory unit='KiB'>")?;
    let kibibytes: u64 = rest.split('<').next()?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Devices whose other half is outside of QEMU.
fn devices(xml: &str) -> Vec<String> {
    let outside = [
        ("type='virtiofs'", "virtiofs"),
        ("<hostdev ", "hostdev"),
        ("type='vhostuser'", "vhost-user"),
        ("type='vhostvdpa'", "vDPA"),
    ];
    let found = outside.iter().filter(|(mark, _)| xml.contains(mark));
    found
        .map(|(_, name)| format!("the domain has a {name} device, whose state is outside of QEMU"))
        .collect()
}

/// The table of `domblklist --details`: type, device, target, source. Empty drives have no source.
fn list(table: &str) -> Vec<Disk> {
    let row = |line: &str| {
        let mut fields = line.split_whitespace();
        let (kind, device, target) = (fields.next()?, fields.next()?, fields.next()?);
        let file = line.split_once(target)?.1.trim();
        (kind != "Type" && !kind.starts_with('-')).then(|| Disk {
            device: target.to_owned(),
            file: if file == "-" {
                String::new()
            } else {
                file.to_owned()
            },
            format: kind.to_owned(),
            read_only: device == "cdrom",
        })
    };
    table.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_and_the_xml_of_virsh_are_read() {
        let table = "Type   Device   Target   Source\n------\nfile   disk     vda      /images/a b.qcow2\nfile   cdrom    sda      -\n";
        let disks = list(table);
        assert_eq!(
            (disks[0].file.as_str(), disks[0].read_only),
            ("/images/a b.qcow2", false)
        );
        assert_eq!((disks[1].file.as_str(), disks[1].read_only), ("", true));
        assert_eq!(
            memory("<currentMemory unit='KiB'>262144</currentMemory>"),
            Some(256 << 20)
        );
        assert_eq!(
            devices("<filesystem type='mount'><driver type='virtiofs'/>").len(),
            1
        );
    }
}
