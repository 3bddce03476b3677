//! What the arguments of a virtual machine monitor say. Pure.

use super::facts::Process;
use super::{SocketPath, VmmKind};

/// The monitor that a program is.
pub(super) fn kind(program: &str) -> Option<VmmKind> {
    // qemu-system-x86_64, qemu-system-x86_64-tdx-experimental, qemu-kvm, kvm.
    let qemu = program.starts_with("qemu-system-") || program == "qemu-kvm" || program == "kvm";
    match program {
        _ if qemu => Some(VmmKind::Qemu),
        _ if program.starts_with("cloud-hypervisor") || program.starts_with("clh") => {
            Some(VmmKind::CloudHypervisor)
        }
        _ if program.starts_with("firecracker") => Some(VmmKind::Firecracker),
        _ if program.starts_with("stratovirt") => Some(VmmKind::StratoVirt),
        _ => None,
    }
}

/// Values of an option that may come more than once: `-name VALUE`, `--name VALUE` or `--name=VALUE`.
pub(super) fn values<'a>(arguments: &'a [String], option: &'a str) -> impl Iterator<Item = &'a str> {
    let following = arguments.iter().zip(arguments.iter().skip(1));
    let separate = following.filter(move |(name, _)| is_option(name, option));
    let joined = arguments
        .iter()
        .filter_map(move |a| a.strip_prefix("--")?.strip_prefix(option)?.strip_prefix('='));
    separate.map(|(_, value)| value.as_str()).chain(joined)
}

fn is_option(argument: &str, option: &str) -> bool {
    argument
        .strip_prefix('-')
        .map(|a| a.strip_prefix('-').unwrap_or(a))
        == Some(option)
}

/// The value of a key in `word,key=value,...`; a doubled comma is a comma. QEMU takes JSON in the same place.
pub(super) fn key(value: &str, wanted: &str) -> Option<String> {
    if value.starts_with('{') {
        let json: serde_json::Value = serde_json::from_str(value).ok()?;
        let found = json.get(wanted)?;
        return Some(found.as_str().map_or_else(|| found.to_string(), str::to_owned));
    }
    let parts = value.replace(",,", "\u{0}");
    let found = parts
        .split(',')
        .find_map(|part| part.strip_prefix(wanted)?.strip_prefix('='));
    found.map(|text| text.replace('\u{0}', ","))
}

fn word(value: &str) -> &str {
    value.split(',').next().unwrap_or(value)
}

/// The socket by which a monitor is controlled.
pub(super) fn monitor(kind: VmmKind, process: &Process, shim: Option<i32>) -> Option<SocketPath> {
    match kind {
        VmmKind::Qemu | VmmKind::StratoVirt => qmp(process, shim),
        VmmKind::CloudHypervisor => http(process, "api-socket", shim),
        VmmKind::Firecracker => http(process, "api-sock", shim),
        VmmKind::Dragonball => None,
    }
}

fn owned(path: impl Into<std::path::PathBuf>, process: &Process, shim: Option<i32>) -> SocketPath {
    SocketPath {
        path: path.into(),
        owners: std::iter::once(process.pid).chain(shim).collect(),
    }
}

/// QMP is wherever a monitor in mode control is. With several, the last one counts: a second one is made for others
/// than the one who started QEMU.
fn qmp(process: &Process, shim: Option<i32>) -> Option<SocketPath> {
    let arguments = &process.arguments;
    let direct = values(arguments, "qmp").filter_map(|value| chardev_path(process, value));
    let controls = values(arguments, "mon").filter(|value| key(value, "mode").as_deref() == Some("control"));
    let named = controls.filter_map(|value| {
        let id = key(value, "chardev").unwrap_or_else(|| word(value).to_owned());
        let chardev = values(arguments, "chardev").find(|c| key(c, "id").as_deref() == Some(id.as_str()))?;
        chardev_path(process, chardev)
    });
    let last = direct.chain(named).last()?;
    Some(owned(last, process, shim))
}

/// `unix:PATH,server` or `socket,id=X,path=PATH` or `socket,id=X,fd=N`.
fn chardev_path(process: &Process, value: &str) -> Option<std::path::PathBuf> {
    if let Some(rest) = value.strip_prefix("unix:") {
        return key(&format!("path={rest}"), "path").map(Into::into);
    }
    if let Some(path) = key(value, "path") {
        return Some(path.into());
    }
    let fd: i32 = key(value, "fd")?.parse().ok()?;
    process
        .sockets
        .iter()
        .find(|s| s.fd == fd)
        .map(|s| s.path.clone())
}

/// The socket of an HTTP interface, by its argument or by the descriptor that the argument names.
fn http(process: &Process, option: &str, shim: Option<i32>) -> Option<SocketPath> {
    let value = values(&process.arguments, option).last()?;
    let fd = key(value, "fd").and_then(|fd| fd.parse::<i32>().ok());
    if let Some(fd) = fd {
        let socket = process.sockets.iter().find(|s| s.fd == fd)?;
        return Some(owned(socket.path.clone(), process, shim));
    }
    let path = key(value, "path").unwrap_or_else(|| value.to_owned());
    Some(owned(path, process, shim))
}

/// The guest's memory in bytes.
pub(super) fn memory(kind: VmmKind, arguments: &[String]) -> Option<u64> {
    match kind {
        VmmKind::Qemu | VmmKind::StratoVirt => {
            let value = values(arguments, "m").last()?;
            size(
                &key(value, "size").unwrap_or_else(|| word(value).to_owned()),
                1 << 20,
            )
        }
        VmmKind::CloudHypervisor => size(&key(values(arguments, "memory").last()?, "size")?, 1),
        VmmKind::Firecracker | VmmKind::Dragonball => None,
    }
}

/// `2048M` in bytes; a bare number is in `unit`s.
fn size(text: &str, unit: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok()?;
    let unit = match text
        .get(digits.len()..)?
        .chars()
        .next()
        .map(|c| c.to_ascii_uppercase())
    {
        None => unit,
        Some('B') => 1,
        Some('K') => 1 << 10,
        Some('M') => 1 << 20,
        Some('G') => 1 << 30,
        Some('T') => 1 << 40,
        Some(_) => return None,
    };
    number.checked_mul(unit)
}

/// How the guest's memory is kept from the node.
pub(super) fn confidential(kind: VmmKind, arguments: &[String]) -> Option<String> {
    if kind == VmmKind::CloudHypervisor {
        let platform = values(arguments, "platform").last()?;
        let on = |name: &str| key(platform, name).as_deref() == Some("on");
        return match () {
            () if on("tdx") => Some("tdx".into()),
            () if on("sev_snp") => Some("sev-snp".into()),
            () => None,
        };
    }
    let objects = values(arguments, "object")
        .map(|value| key(value, "qom-type").unwrap_or_else(|| word(value).to_owned()));
    objects
        .filter_map(|object| match object.as_str() {
            "tdx-guest" => Some("tdx"),
            "sev-snp-guest" => Some("sev-snp"),
            "sev-guest" => Some("sev"),
            "s390-pv-guest" => Some("secure-execution"),
            "pef-guest" => Some("pef"),
            "arm-rme-guest" | "rme-guest" => Some("rme"),
            _ => None,
        })
        .map(str::to_owned)
        .next()
}

/// The context identifier of the kernel's vsock.
pub(super) fn cid(arguments: &[String]) -> Option<u32> {
    let devices = values(arguments, "device");
    let mut cids = devices
        .filter(|d| d.contains("vhost-vsock"))
        .filter_map(|d| key(d, "guest-cid"));
    cids.next()?.parse().ok()
}

/// Sockets of back ends that QEMU connects to for a vsock in user space.
pub(super) fn vsock_back_ends(arguments: &[String]) -> Vec<String> {
    let devices = values(arguments, "device").filter(|d| d.contains("vhost-user-vsock"));
    let chardevs = devices.filter_map(|device| key(device, "chardev"));
    let path = |id: String| {
        let chardev = values(arguments, "chardev").find(|c| key(c, "id").as_deref() == Some(id.as_str()))?;
        key(chardev, "path")
    };
    chardevs.filter_map(path).collect()
}

/// Name of the domain, when libvirt has started this QEMU: libvirt alone calls its monitor's socket charmonitor.
pub(super) fn domain(arguments: &[String]) -> Option<String> {
    let libvirt = values(arguments, "chardev").any(|c| key(c, "id").as_deref() == Some("charmonitor"));
    let name = libvirt.then(|| values(arguments, "name").last())??;
    Some(key(name, "guest").unwrap_or_else(|| word(name).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::facts::UnixSocket;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn sizes_are_read_as_the_monitors_write_them() {
        let of = |text: &str| memory(VmmKind::Qemu, &words(text));
        assert_eq!(of("q -m 2048M,slots=10,maxmem=4G"), Some(2 << 30));
        assert_eq!(of("q -m 512"), Some(512 << 20));
        assert_eq!(of("q -m size=2097152k"), Some(2 << 30));
        assert_eq!(of("q"), None);
        assert_eq!(
            memory(
                VmmKind::CloudHypervisor,
                &words("c --memory size=1073741824,shared=on")
            ),
            Some(1 << 30)
        );
    }

    #[test]
    fn a_monitor_that_was_handed_over_as_a_descriptor_is_found_by_it() {
        let process = Process {
            pid: 7,
            arguments: words(
                "q -chardev socket,id=qmp0,fd=3,server=on,wait=off -mon chardev=qmp0,mode=control",
            ),
            sockets: vec![UnixSocket {
                fd: 3,
                path: "/run/vc/vm/x/qmp.sock".into(),
                listens: true,
            }],
            ..Process::default()
        };
        let socket = monitor(VmmKind::Qemu, &process, Some(6)).unwrap();
        assert_eq!(
            (socket.to_string().as_str(), socket.owners.as_slice()),
            ("/run/vc/vm/x/qmp.sock", &[7, 6][..])
        );
    }

    #[test]
    fn the_extra_monitor_is_preferred_and_one_for_people_is_none() {
        let process = |text: &str| Process {
            pid: 7,
            arguments: words(text),
            ..Process::default()
        };
        let two =
            process("q -qmp unix:/a/qmp.sock,server=on -qmp unix:/a/extra-monitor.sock,server=on,wait=off");
        assert_eq!(
            monitor(VmmKind::Qemu, &two, None).unwrap().to_string(),
            "/a/extra-monitor.sock"
        );
        let people = process("q -monitor unix:/a/hmp.sock,server=on");
        assert_eq!(monitor(VmmKind::Qemu, &people, None), None);
    }

    #[test]
    fn a_comma_in_a_name_is_doubled() {
        assert_eq!(key("socket,path=/a,,b,id=x", "path").as_deref(), Some("/a,b"));
        assert_eq!(
            key(r#"{"qom-type":"tdx-guest","id":"tdx"}"#, "qom-type").as_deref(),
            Some("tdx-guest")
        );
    }
}
