//! The program of the sandbox's own kernel, run as a command on the node.

use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;
use tokio::time::timeout;

use super::GvisorError;
use crate::node::process::Facts;
use crate::sandbox::Sentry;
use crate::vm::agent_program;

/// What runsc says of a container, as OCI has it.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    /// created, running, paused or stopped.
    pub status: String,
    /// Its bundle on the node.
    pub bundle: String,
}

/// Runs runsc and gives what it printed. The program is that of the kernel that runs, which another one on the node, a
/// newer one perhaps, need not understand; the files are the node's, since that is where runsc keeps its books. When
/// this is dropped runsc is ended.
pub(super) async fn run(sentry: &Sentry, arguments: &[&str], limit: Duration) -> Result<String, GvisorError> {
    let words = arguments.first().copied().unwrap_or_default();
    if !sentry.alive() {
        return Err(GvisorError::Gone(sentry.pid));
    }
    let mut command = Command::new(agent_program());
    command
        .args(["in-mounts-of", "1", &format!("/proc/{}/exe", sentry.pid)])
        .arg("--root")
        .arg(&sentry.root)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let Ok(output) = timeout(limit, command.output()).await else {
        return Err(silent(sentry, words, limit));
    };
    let output = output.map_err(|error| GvisorError::Unusable {
        what: "runsc cannot be run".to_owned(),
        why: error.to_string(),
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(GvisorError::Refused {
        command: words.to_owned(),
        answer: text(&output.stderr),
    })
}

pub(super) fn silent(sentry: &Sentry, command: &str, limit: Duration) -> GvisorError {
    match Facts::of(sentry.pid).filter(|_| sentry.alive()) {
        Some(facts) => GvisorError::Silent {
            command: command.to_owned(),
            pid: sentry.pid,
            state: facts.state,
            limit,
        },
        None => GvisorError::Gone(sentry.pid),
    }
}

/// The state of a container of the sandbox, or of the sandbox itself.
pub(super) async fn state(sentry: &Sentry, id: &str, limit: Duration) -> Result<State, GvisorError> {
    let text = run(sentry, &["state", id], limit).await?;
    serde_json::from_str(&text).map_err(|error| GvisorError::Unusable {
        what: format!("runsc state {id}"),
        why: error.to_string(),
    })
}
