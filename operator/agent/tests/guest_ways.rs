//! Consoles that misbehave, each a real unix socket: every one gives its reason, and none holds the agent up.
#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]
#![allow(
    clippy::zombie_processes,
    reason = "a shell ends with its socket, and with it the test's process"
)]

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use podcheckpoint_agent::guest::console::{self, ConsoleError};
use podcheckpoint_agent::guest::shell::{Shell, ShellError};
use podcheckpoint_agent::sandbox::{Machine, ShimKind, SocketPath, VmmKind, Vsock};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

fn machine(vsock: Option<Vsock>) -> Machine {
    Machine {
        vmm: VmmKind::Qemu,
        pid: i32::try_from(std::process::id()).unwrap(),
        started: 1,
        arguments: Vec::new(),
        monitor: None,
        vsock,
        memory: None,
        confidential: None,
        domain: None,
        shim: ShimKind::Other,
    }
}

/// A machine whose vsock takes one connection and does with it what it is told.
fn answering<F, W>(serve: F) -> (TempDir, Machine)
where
    F: FnOnce(UnixStream) -> W + Send + 'static,
    W: Future<Output = ()> + Send,
{
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("kata.hvsock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(stream).await;
    });
    let vsock = Vsock::Hybrid(SocketPath::own(path));
    (folder, machine(Some(vsock)))
}

async fn refusal(machine: &Machine) -> (ConsoleError, Duration) {
    let begun = Instant::now();
    let error = console::open(Some(machine)).await.unwrap_err();
    (error, begun.elapsed())
}

async fn take_line(stream: &mut UnixStream) {
    while stream.read_u8().await.is_ok_and(|byte| byte != b'\n') {}
}

const SOON: Duration = Duration::from_secs(4);

#[tokio::test]
async fn a_machine_without_a_vsock_has_no_door() {
    let (error, _) = refusal(&machine(None)).await;
    assert!(matches!(error, ConsoleError::NoDoor), "{error}");
}

#[tokio::test]
async fn a_socket_that_nobody_serves_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kata.hvsock");
    drop(UnixListener::bind(&path).unwrap());
    let (error, _) = refusal(&machine(Some(Vsock::Hybrid(SocketPath::own(path))))).await;
    assert!(matches!(error, ConsoleError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn a_guest_that_does_not_listen_on_the_port_is_a_closed_console() {
    let (_folder, machine) = answering(|mut stream| async move { take_line(&mut stream).await });
    let (error, _) = refusal(&machine).await;
    assert!(matches!(error, ConsoleError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn a_console_that_answers_garbage_is_quoted() {
    let (_folder, machine) = answering(|mut stream| async move {
        take_line(&mut stream).await;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n").await.unwrap();
        stream.read_u8().await.ok();
    });
    let (error, _) = refusal(&machine).await;
    assert!(
        matches!(&error, ConsoleError::Garbage { said, .. } if said.starts_with("HTTP/1.1 400")),
        "{error}"
    );
}

#[tokio::test]
async fn a_vsock_that_never_answers_is_given_up() {
    let (_folder, machine) = answering(|stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    });
    let (error, took) = refusal(&machine).await;
    assert!(matches!(error, ConsoleError::Silent { .. }), "{error}");
    assert!(took < SOON, "{took:?}");
}

#[tokio::test]
async fn a_guest_that_hangs_behind_an_open_port_is_given_up() {
    let (_folder, machine) = answering(|mut stream| async move {
        take_line(&mut stream).await;
        stream.write_all(b"OK 1026\n").await.unwrap();
        std::future::pending::<()>().await;
    });
    let (error, took) = refusal(&machine).await;
    assert!(
        matches!(error, ConsoleError::Shell(ShellError::NoShell { .. })),
        "{error}"
    );
    assert!(took < SOON, "{took:?}");
}

#[tokio::test]
async fn a_console_that_echoes_what_it_is_sent_is_no_shell() {
    let (_folder, machine) = answering(|mut stream| async move {
        take_line(&mut stream).await;
        stream.write_all(b"OK 1026\n").await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.ok();
    });
    let (error, took) = refusal(&machine).await;
    assert!(
        matches!(error, ConsoleError::Shell(ShellError::NoShell { .. })),
        "{error}"
    );
    assert!(took < SOON, "{took:?}");
}

/// A real shell behind a socket.
fn shell_on(stream: UnixStream) {
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let pipe = |stream: &std::os::unix::net::UnixStream| {
        Stdio::from(std::os::fd::OwnedFd::from(stream.try_clone().unwrap()))
    };
    Command::new("sh")
        .stdin(pipe(&stream))
        .stdout(pipe(&stream))
        .stderr(pipe(&stream))
        .spawn()
        .unwrap();
}

#[tokio::test]
async fn a_file_arrives_whole_and_a_command_has_its_status() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sent").display().to_string();
    let (ours, theirs) = UnixStream::pair().unwrap();
    shell_on(theirs);
    let mut shell = Shell::greet(ours).await.unwrap();
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let sum: String = Sha256::digest(&bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    shell.send(&bytes, &sum, &path).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(
        shell
            .run("echo said; exit_status() { return 7; }; exit_status")
            .await
            .unwrap()
            .status,
        7
    );
}

#[tokio::test]
async fn a_byte_that_changes_on_the_way_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sent").display().to_string();
    let (ours, middle) = UnixStream::pair().unwrap();
    let (further, theirs) = UnixStream::pair().unwrap();
    shell_on(theirs);
    tokio::spawn(async move {
        let ((mut from, mut back), (mut reply, mut on)) = (middle.into_split(), further.into_split());
        tokio::spawn(async move { tokio::io::copy(&mut reply, &mut back).await.ok() });
        let mut buffer = vec![0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let changed: Vec<u8> = buffer
                .iter()
                .take(count)
                .map(|b| if *b == 0xAA { 0xAB } else { *b })
                .collect();
            on.write_all(&changed).await.unwrap();
        }
    });
    let mut shell = Shell::greet(ours).await.unwrap();
    let error = shell.send(&[0xAA; 64], &"0".repeat(64), &path).await.unwrap_err();
    assert!(matches!(error, ShellError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn a_file_comes_out_whole_with_its_hash_and_one_that_has_grown_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image").display().to_string();
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    std::fs::write(&path, &bytes).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    shell_on(theirs);
    let mut shell = Shell::greet(ours).await.unwrap();
    let mut arrived = Vec::new();
    let sum = shell.receive(&path, 300_000, &mut arrived).await.unwrap();
    assert_eq!(arrived, bytes);
    let expected: String = Sha256::digest(&bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(sum, expected);
    assert_eq!(shell.run("echo on").await.unwrap().text, "on\n");

    // What stands there instead of the file, such as an error, is longer than nothing.
    std::fs::remove_file(&path).unwrap();
    let error = shell.receive(&path, 0, &mut Vec::new()).await.unwrap_err();
    assert!(matches!(error, ShellError::Length { size: 0, .. }), "{error}");
}
