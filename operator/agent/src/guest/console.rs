//! Kata's debug console: a shell of the guest's root, on vsock port 1026, or on a socket of the monitor that is a serial
//! port of the guest.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::program;
use super::shell::{Shell, ShellError};
use super::{Seen, Step, Way};
use crate::node::probe::{ProbeError, report_in};
use crate::sandbox::{Machine, SocketPath, Vsock};

/// The port of the console, as Kata's configuration sets it (agent.debug_console_vport).
pub const PORT: u32 = 1026;
/// How long the vsock may take to connect.
const CONNECT: Duration = Duration::from_millis(1000);
/// Where the probe is put while it is unpacked; it is gone before it runs.
const FILE: &str = "/tmp/.podcheckpoint-probe";

/// The console is not open, or was of no use.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The machine has no door to one.
    #[error("the machine has neither a vsock nor a serial port for a console")]
    NoDoor,
    /// Its socket does not connect.
    #[error("{door} does not connect")]
    Connect {
        /// Which.
        door: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The vsock connects, but the guest does not listen on the console's port.
    #[error("nothing in the guest listens on vsock port {PORT} ({door})")]
    Refused {
        /// The vsock.
        door: String,
    },
    /// It answers something else than the protocol has.
    #[error("{door} answers {said:?} and not OK")]
    Garbage {
        /// The vsock.
        door: String,
        /// The answer.
        said: String,
    },
    /// It does not answer.
    #[error("{door} does not answer within {} ms", CONNECT.as_millis())]
    Silent {
        /// The vsock.
        door: String,
    },
    /// The shell.
    #[error("the console's shell is of no use")]
    Shell(#[from] ShellError),
    /// A broken transfer must end with the connection, or the rest of it would be taken for commands.
    #[error(
        "the console is a serial port, which does not notice a broken transfer, and the guest's image carries no podcheckpoint-probe"
    )]
    SerialPort,
    /// The container is not in the guest.
    #[error("no process in the guest is in a cgroup of container {0}")]
    NoProcess(String),
    /// The probe.
    #[error("the probe does not run in the guest")]
    Probe(#[from] ProbeError),
    /// The agent's own copy.
    #[error("the probe cannot be read")]
    Program(#[source] io::Error),
}

/// A console with a shell behind it.
#[derive(Debug)]
pub struct Console {
    /// The shell.
    pub shell: Shell<UnixStream>,
    /// The shell ends with the connection, which is not so on a serial port.
    pub ends: bool,
}

/// Connects to the console and makes sure that a shell answers.
///
/// # Errors
/// When it is closed, silent, or answers something else.
pub async fn open(machine: Option<&Machine>) -> Result<Console, ConsoleError> {
    let mut last = ConsoleError::NoDoor;
    let Some(machine) = machine else {
        return Err(last);
    };
    if let Some(vsock) = &machine.vsock {
        match by_vsock(vsock).await {
            Ok(shell) => return Ok(Console { shell, ends: true }),
            Err(error @ ConsoleError::Shell(_)) => return Err(error),
            Err(error) => last = error,
        }
    }
    let Some(port) = serial_port(machine) else {
        return Err(last);
    };
    let connected = port.connect().await;
    let stream = connected.map_err(|source| ConsoleError::Connect {
        door: port.to_string(),
        source,
    })?;
    let shell = Shell::greet(stream).await?;
    Ok(Console { shell, ends: false })
}

/// Connects to the console on vsock, whose shell ends with the connection.
///
/// # Errors
/// When it is closed, silent, or answers something else.
pub async fn by_vsock(vsock: &Vsock) -> Result<Shell<UnixStream>, ConsoleError> {
    Ok(Shell::greet(dial(vsock).await?).await?)
}

async fn dial(vsock: &Vsock) -> Result<UnixStream, ConsoleError> {
    let door = match vsock {
        Vsock::Hybrid(socket) => format!("the vsock at {socket}"),
        Vsock::Cid(cid) => format!("the vsock of context {cid}"),
    };
    let connecting = async {
        match vsock {
            Vsock::Hybrid(socket) => hybrid(socket, &door).await,
            Vsock::Cid(cid) => kernel(*cid).await.map_err(|source| ConsoleError::Connect {
                door: door.clone(),
                source,
            }),
        }
    };
    let connected = tokio::time::timeout(CONNECT, connecting).await;
    connected.unwrap_or_else(|_| Err(ConsoleError::Silent { door: door.clone() }))
}

/// The protocol that Firecracker, Cloud Hypervisor and vhost-device-vsock have for vsock over a unix socket.
async fn hybrid(socket: &SocketPath, door: &str) -> Result<UnixStream, ConsoleError> {
    let connected = socket.connect().await;
    let mut stream = connected.map_err(|source| ConsoleError::Connect {
        door: door.to_owned(),
        source,
    })?;
    let refused = || ConsoleError::Refused {
        door: door.to_owned(),
    };
    let asked = stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await;
    asked.map_err(|_| refused())?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is the shell's.
    while !answer.ends_with(b"\n") && answer.len() < 64 {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            // Closed without a word: nobody listens.
            Err(_) if answer.is_empty() => return Err(refused()),
            Err(_) => break,
        }
    }
    if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
        return Ok(stream);
    }
    Err(ConsoleError::Garbage {
        door: door.to_owned(),
        said: String::from_utf8_lossy(&answer).trim().to_owned(),
    })
}

/// The kernel's vsock. A connected one is a byte stream like any other, so tokio's type for unix sockets serves it.
async fn kernel(cid: u32) -> io::Result<UnixStream> {
    let connected = tokio::task::spawn_blocking(move || {
        let made = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        connect(made.as_raw_fd(), &VsockAddr::new(cid, PORT))?;
        Ok::<_, nix::Error>(std::os::unix::net::UnixStream::from(made))
    });
    let stream = connected.await.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// The socket of a serial port that is a console, going by the monitor's arguments: Kata calls it console.sock.
fn serial_port(machine: &Machine) -> Option<SocketPath> {
    let devices = machine.arguments.iter().filter(|a| a.starts_with("socket,"));
    let paths = devices.flat_map(|device| device.split(',').filter_map(|field| field.strip_prefix("path=")));
    let path = paths
        .into_iter()
        .find(|path| path.rsplit('/').next() == Some("console.sock"))?;
    Some(SocketPath {
        path: path.into(),
        owners: vec![machine.pid],
    })
}

/// Sends the probe through the console, unless the guest has it, and asks it about the containers.
///
/// # Errors
/// When there is no console, or the probe does not report.
pub async fn look(
    machine: Option<&Machine>,
    containers: &[String],
    step: &Step,
) -> Result<Seen, ConsoleError> {
    step.at("connecting to the console");
    let mut console = open(machine).await?;
    let found = probe(&mut console, containers, step).await;
    // Also after a failure: a shell on a serial port stays for the next one.
    console.shell.leave().await;
    found
}

async fn probe(console: &mut Console, containers: &[String], step: &Step) -> Result<Seen, ConsoleError> {
    let Console { shell, ends } = console;
    step.at("looking for the container's processes");
    let mut pids = Vec::new();
    for container in containers {
        pids.push(main_process(shell, container).await?);
    }
    let criu = which(shell, "criu").await?;
    let program = match which(shell, "podcheckpoint-probe").await? {
        Some(carried) => carried,
        None if !*ends => return Err(ConsoleError::SerialPort),
        None => {
            step.at("sending the probe");
            send_probe(shell).await?
        }
    };
    step.at("running the probe");
    let targets: Vec<String> = pids.iter().map(|pid| format!("--pid {pid}")).collect();
    let said = shell
        .run(&format!("{program} --json {}", targets.join(" ")))
        .await?;
    Ok(Seen {
        way: Way::Console,
        observations: report_in(&said.text)?,
        pids,
        criu,
        closed: Vec::new(),
    })
}

async fn which(shell: &mut Shell<UnixStream>, program: &str) -> Result<Option<String>, ShellError> {
    let output = shell.run(&format!("command -v {program}")).await?;
    let path = output
        .text
        .lines()
        .rev()
        .find_map(|line| line.find('/').and_then(|at| line.get(at..)));
    Ok(path
        .filter(|_| output.status == 0)
        .map(|path| path.trim().to_owned()))
}

/// What is left in the guest when the connection breaks is at most a part of a file, which the shell's end removes, or
/// the next look where a console kills its shell.
async fn send_probe(shell: &mut Shell<UnixStream>) -> Result<String, ConsoleError> {
    let packed = program::packed().map_err(ConsoleError::Program)?;
    let trap = format!("umask 077; trap 'rm -f {FILE}*' EXIT; trap exit HUP");
    shell.must("preparing", &trap).await?;
    shell
        .send(&packed.bytes, &packed.sha256, &format!("{FILE}.gz"))
        .await?;
    let unpack = format!("gzip -dc {FILE}.gz > {FILE} && chmod 700 {FILE} && exec 3< {FILE}; rm -f {FILE}*");
    shell.must("unpacking the probe", &unpack).await?;
    Ok("/proc/$$/fd/3".to_owned())
}

/// The container's first process in the guest: the one that is 1 in its own namespace, else the oldest.
async fn main_process(shell: &mut Shell<UnixStream>, container: &str) -> Result<i32, ConsoleError> {
    let none = || ConsoleError::NoProcess(container.to_owned());
    let output = shell
        .run(&format!("grep -l {container} /proc/[0-9]*/cgroup"))
        .await?;
    let files = output.text.split_whitespace();
    let mut pids: Vec<i32> = files
        .filter_map(|file| {
            let (_, rest) = file.split_once("/proc/")?;
            rest.strip_suffix("/cgroup")?.parse().ok()
        })
        .collect();
    pids.sort_unstable();
    pids.truncate(16);
    let first = *pids.first().ok_or_else(none)?;
    let files: Vec<String> = pids.iter().map(|pid| format!("/proc/{pid}/status")).collect();
    let output = shell
        .run(&format!("grep -H NSpid /dev/null {}", files.join(" ")))
        .await?;
    let main = output.text.lines().find_map(|line| {
        let (_, rest) = line.split_once("/proc/")?;
        let (pid, rest) = rest.split_once("/status:NSpid:")?;
        (rest.split_whitespace().last()? == "1").then(|| pid.parse().ok())?
    });
    Ok(main.unwrap_or(first))
}
