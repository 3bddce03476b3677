//! SELinux in the kernel's own words: whether it enforces, the boolean that forbids ptrace, and what the policy that is
//! loaded lets one process do to another.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// What looking at a process asks of the policy, selinux_ptrace_access_check() in the kernel.
const LOOK: &str = "file read";
/// What attaching to it asks.
const ATTACH: &str = "process ptrace";
/// What CAP_SYS_PTRACE asks, of the tracer's own context.
const CAPABILITY: &str = "capability sys_ptrace";

/// selinuxfs.
pub struct Selinux {
    folder: PathBuf,
    _mount: Option<OwnedFd>,
}

impl Selinux {
    /// `None` when the kernel runs without SELinux, or hides it.
    pub fn open() -> Option<Self> {
        let usual = PathBuf::from("/sys/fs/selinux");
        if usual.join("enforce").exists() {
            return Some(Self {
                folder: usual,
                _mount: None,
            });
        }
        // A container has a /sys of its own, without it. The kernel lists the type only when it was started with SELinux.
        let types = fs::read_to_string("/proc/filesystems").ok()?;
        types.contains("\tselinuxfs\n").then_some(())?;
        let mount = mount().ok()?;
        Some(Self {
            folder: format!("/proc/self/fd/{}", mount.as_raw_fd()).into(),
            _mount: Some(mount),
        })
    }

    /// Whether it enforces; otherwise it only logs.
    pub fn enforces(&self) -> Option<bool> {
        self.flag("enforce")
    }

    /// The boolean `deny_ptrace`; `None` when the policy has none. The file has the value and the one that is pending.
    pub fn deny_ptrace(&self) -> Option<bool> {
        self.flag("booleans/deny_ptrace")
    }

    /// What the policy does not let a tracer do to a target, each by its context; `None` when it could not be asked.
    pub fn denied(&self, tracer: &str, target: &str) -> Option<Vec<String>> {
        let mut denied = Vec::new();
        for (what, target) in [(LOOK, target), (ATTACH, target), (CAPABILITY, tracer)] {
            if !self.allows(tracer, target, what)? {
                denied.push(what.to_owned());
            }
        }
        Some(denied)
    }

    fn allows(&self, tracer: &str, target: &str, what: &str) -> Option<bool> {
        let (class, permission) = what.split_once(' ')?;
        let number = |path: String| self.text(&path)?.parse::<u32>().ok();
        let (Some(class_number), Some(bit)) = (
            number(format!("class/{class}/index")),
            number(format!("class/{class}/perms/{permission}")),
        ) else {
            // What a policy does not know it denies or allows as a whole.
            return self.flag("deny_unknown").map(|denies| !denies);
        };
        let question = format!("{tracer} {target} {class_number}");
        decision(&self.ask(&question).ok()?)?.allows(bit)
    }

    /// Writing the question and reading the answer is one transaction, on one descriptor.
    fn ask(&self, question: &str) -> io::Result<String> {
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.folder.join("access"))?;
        file.write_all(question.as_bytes())?;
        let mut answer = [0; 256];
        let count = file.read(&mut answer)?;
        Ok(String::from_utf8_lossy(answer.get(..count).unwrap_or_default()).into_owned())
    }

    fn flag(&self, path: &str) -> Option<bool> {
        self.text(path).map(|text| text.starts_with('1'))
    }

    fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.folder.join(path)).ok()?;
        Some(text.trim_end_matches('\0').trim().to_owned())
    }
}

/// For this process alone, and at no place in any tree.
fn mount() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("selinuxfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// What the policy has decided about one context, another one, and a class.
#[derive(Debug, PartialEq, Eq)]
struct Decision {
    allowed: u32,
    /// The tracer's domain is permissive: what is denied is only logged.
    permissive: bool,
}

impl Decision {
    /// Permissions are numbered from 1.
    fn allows(&self, bit: u32) -> Option<bool> {
        let mask = 1_u32.checked_shl(bit.checked_sub(1)?)?;
        Some(self.permissive || self.allowed & mask != 0)
    }
}

/// `ALLOWED DECIDED AUDITALLOW AUDITDENY SEQUENCE FLAGS`: hexadecimal, but for the decimal sequence number.
fn decision(answer: &str) -> Option<Decision> {
    const PERMISSIVE: u32 = 1;
    let mut words = answer.trim_end_matches('\0').split_whitespace();
    let mut hexadecimal = |skipped| u32::from_str_radix(words.nth(skipped)?, 16).ok();
    let allowed = hexadecimal(0)?;
    let flags = hexadecimal(4)?;
    Some(Decision {
        allowed,
        permissive: flags & PERMISSIVE != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damaged::damaged;

    #[test]
    fn a_decision_is_read_as_the_kernel_writes_it() {
        let found = decision("5 ffffffff 0 ffffffff 3 0").unwrap();
        assert_eq!(found.allows(1), Some(true));
        assert_eq!(found.allows(2), Some(false));
        assert_eq!(found.allows(3), Some(true));
        assert_eq!((found.allows(0), found.allows(33)), (None, None));
    }

    #[test]
    fn a_permissive_domain_is_denied_nothing() {
        let found = decision("0 ffffffff 0 ffffffff 3 1").unwrap();
        assert_eq!(found.allows(7), Some(true));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(answer in damaged("5 ffffffff 0 ffffffff 3 0")) {
            let _ = decision(&answer);
        }
    }
}
