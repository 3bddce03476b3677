//! What the tests and the demo share: kubectl, commands on a node, and restoring an archive outside Kubernetes.

#![forbid(unsafe_code)]

pub mod golden;
pub mod gvisor;
pub mod restore;
pub mod scenario;
pub mod security;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Runs kubectl; its standard output.
///
/// # Errors
/// When it fails, with its standard error.
pub fn kubectl(arguments: &[&str]) -> Result<String> {
    finish(Command::new("kubectl").args(arguments).output(), arguments)
}

/// Runs kubectl and gives both outputs, for what is expected to be refused.
///
/// # Errors
/// When it succeeds.
pub fn kubectl_refused(arguments: &[&str], manifest: &str) -> Result<String> {
    match with_input(Command::new("kubectl").args(arguments), manifest.as_bytes()) {
        Ok(output) if output.status.success() => bail!("kubectl {arguments:?} was not refused"),
        Ok(output) => Ok(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(error),
    }
}

/// Applies a manifest.
///
/// # Errors
/// When the API server refuses it.
pub fn apply(manifest: &str) -> Result<()> {
    apply_with(&["apply", "-f", "-"], manifest)
}

/// Runs kubectl with a manifest as its standard input.
///
/// # Errors
/// When it fails.
pub fn apply_with(arguments: &[&str], manifest: &str) -> Result<()> {
    let output = with_input(Command::new("kubectl").args(arguments), manifest.as_bytes())?;
    finish(Ok(output), arguments).map(drop)
}

/// An object as JSON.
///
/// # Errors
/// When it does not exist.
pub fn get(namespace: &str, kind: &str, name: &str) -> Result<Value> {
    let text = kubectl(&["-n", namespace, "get", kind, name, "-o", "json"])?;
    serde_json::from_str(&text).context("reading an object")
}

/// UID of an object.
///
/// # Errors
/// When it does not exist.
pub fn uid(namespace: &str, kind: &str, name: &str) -> Result<String> {
    let object = get(namespace, kind, name)?;
    object
        .pointer("/metadata/uid")
        .and_then(Value::as_str)
        .map(str::to_owned)
        .context("no UID")
}

/// Runs a shell script as root on a node of the local cluster.
///
/// # Errors
/// When it fails.
pub fn on_node(node: &str, script: &str) -> Result<String> {
    let cluster = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster");
    finish(
        Command::new(cluster)
            .args(["run", node, "sh", "-c", script])
            .output(),
        &[node, script],
    )
}

/// Sends bytes to a shell script's standard input on a node.
///
/// # Errors
/// When it fails.
pub fn on_node_with(node: &str, script: &str, input: &[u8]) -> Result<String> {
    let cluster = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster");
    let output = with_input(
        Command::new(cluster).args(["run", node, "sh", "-c", script]),
        input,
    )?;
    finish(Ok(output), &[node, script])
}

/// Ends a node as a power failure would, and starts it again; only node2 is a machine of its own.
///
/// # Errors
/// When it does not come back.
pub fn cut_power(node: &str) -> Result<()> {
    let cluster = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster");
    let output = Command::new(cluster).args(["reboot", node]).output();
    finish(output, &["reboot", node]).map(drop)
}

/// Copies a program of this build to a folder on a node.
///
/// # Errors
/// When it has not been built, or cannot be written.
pub fn put_program(node: &str, name: &str, folder: &str) -> Result<()> {
    // Programs are in target/TRIPLE/PROFILE, tests one below.
    let own = std::env::current_exe()?;
    let built = own.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    let built = built.into_iter().find(|path| path.exists());
    let built = built.with_context(|| format!("{name} has not been built"))?;
    // Symbols are half of a debug build, and node2 is slow. strip wants an output that it can seek in.
    let stripped = built.with_extension("stripped");
    let status = Command::new("strip")
        .arg("-o")
        .arg(&stripped)
        .arg(&built)
        .status()?;
    ensure!(
        status.success(),
        "strip of {} ended with {status}",
        built.display()
    );
    let bytes = std::fs::read(&stripped)?;
    let script = format!(
        "mkdir -p {folder} && cat > {folder}/{name}.new && chmod 755 {folder}/{name}.new && mv {folder}/{name}.new {folder}/{name}"
    );
    on_node_with(node, &script, &bytes)
        .with_context(|| built.display().to_string())
        .map(drop)
}

/// Asks again and again until the answer is there.
///
/// # Errors
/// When it does not come in time, with the last thing that was seen.
pub fn eventually<T>(limit: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if started.elapsed() > limit => {
                return Err(error.context(format!("not within {limit:?}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn with_input(command: &mut Command, input: &[u8]) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input)?;
    }
    child.wait_with_output().context("waiting for a command")
}

fn finish(output: std::io::Result<Output>, arguments: &[&str]) -> Result<String> {
    let output = output.with_context(|| format!("running {arguments:?}"))?;
    if !output.status.success() {
        bail!(
            "{arguments:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
