//! Runs the probe, and holds a deadline of its own over it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use podcheckpoint_probe::observation::Observations;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// Where the probe is in the agent's image, unless PODCHECKPOINT_PROBE says otherwise.
const PROGRAM: &str = "/podcheckpoint-probe";
/// The probe answers within two seconds, with CRIU's own two checks within twelve; after this it is not believed to
/// answer at all.
const LIMIT: Duration = Duration::from_secs(14);

/// The probe gave no observations.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It could not be started.
    #[error("the probe cannot be started")]
    Start(#[source] std::io::Error),
    /// It did not answer in time.
    #[error("the probe did not answer within {} s; its last words: {last}", LIMIT.as_secs())]
    Silent {
        /// The last step that it announced.
        last: String,
    },
    /// It ended without a report.
    #[error("the probe ended without a report; its last words: {last}")]
    NoReport {
        /// The last step that it announced.
        last: String,
    },
}

/// What is to be looked at.
#[derive(Clone, Debug)]
pub enum Question<'a> {
    /// Processes, each with everything below it.
    Targets(&'a [i32]),
    /// This node: its kernel, and CRIU as the container runtime with this process finds it.
    Node {
        /// The container runtime.
        runtime: i32,
        /// Where it looks for programs.
        search: Option<String>,
    },
}

impl Question<'_> {
    fn arguments(&self) -> Vec<String> {
        match self {
            Self::Targets(pids) => pids
                .iter()
                .flat_map(|pid| ["--pid".to_owned(), pid.to_string()])
                .collect(),
            Self::Node { runtime, search } => {
                let mut arguments = vec!["--node".to_owned(), format!("--criu-namespaces-of={runtime}")];
                arguments.extend(search.as_ref().map(|search| format!("--criu-search={search}")));
                arguments
            }
        }
    }
}

/// Asks the probe.
///
/// # Errors
/// When it cannot be started, or gives no report in time; it is then ended, and its children with it.
pub async fn ask(question: &Question<'_>) -> Result<Observations, ProbeError> {
    let mut child = Command::new(program())
        .arg("--json")
        .args(question.arguments())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(ProbeError::Start)?;
    let mut last = String::from("none");
    let lines = child.stdout.take().map(|out| BufReader::new(out).lines());
    let report = tokio::time::timeout(LIMIT, async {
        let mut lines = lines?;
        while let Ok(Some(line)) = lines.next_line().await {
            match parse(&line) {
                Line::Report(seen) => return Some(seen),
                Line::Step(step) => last = step,
                Line::Other => {}
            }
        }
        None
    })
    .await;
    match report {
        Ok(Some(seen)) => {
            // It has said all; its end only has to be noticed.
            let _ = tokio::time::timeout(LIMIT, child.wait()).await;
            Ok(*seen)
        }
        Ok(None) => Err(ProbeError::NoReport { last }),
        Err(_) => Err(ProbeError::Silent { last }),
    }
}

/// The program.
pub fn program() -> PathBuf {
    std::env::var_os("PODCHECKPOINT_PROBE").map_or_else(|| Path::new(PROGRAM).to_owned(), PathBuf::from)
}

/// The report in what a probe elsewhere has printed, among other lines; else the last step that it announced.
///
/// # Errors
/// [`ProbeError::NoReport`].
pub fn report_in(text: &str) -> Result<Observations, ProbeError> {
    let mut last = String::from("none");
    for line in text.lines() {
        // A prompt may stand before it.
        let line = line.get(line.find('{').unwrap_or_default()..).unwrap_or_default();
        match parse(line) {
            Line::Report(seen) => return Ok(*seen),
            Line::Step(step) => last = step,
            Line::Other => {}
        }
    }
    Err(ProbeError::NoReport { last })
}

enum Line {
    Step(String),
    Report(Box<Observations>),
    Other,
}

fn parse(line: &str) -> Line {
    let Ok(mut value) = serde_json::from_str::<Value>(line) else {
        return Line::Other;
    };
    let word = |value: &Value, key: &str| value.get(key).map(ToString::to_string).unwrap_or_default();
    match value.get("event").and_then(Value::as_str) {
        Some("report") => {
            let seen = value.get_mut("observations").map(Value::take).unwrap_or_default();
            serde_json::from_value(seen).map_or(Line::Other, |seen| Line::Report(Box::new(seen)))
        }
        Some(_) => Line::Step(format!(
            "{} {} of thread {}",
            word(&value, "event"),
            word(&value, "step"),
            word(&value, "tid")
        )),
        None => Line::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_own_search_path_is_handed_on() {
        let question = Question::Node {
            runtime: 7,
            search: Some("/opt/bin:/usr/bin".into()),
        };
        assert_eq!(
            question.arguments(),
            [
                "--node",
                "--criu-namespaces-of=7",
                "--criu-search=/opt/bin:/usr/bin"
            ]
        );
    }

    #[test]
    fn a_report_is_told_from_a_step_and_from_noise() {
        assert!(matches!(
            parse(r#"{"event":"report","observations":{}}"#),
            Line::Report(_)
        ));
        assert!(
            matches!(parse(r#"{"event":"begin","step":"Seize","tid":7}"#), Line::Step(step) if step.contains("Seize") && step.contains('7'))
        );
        assert!(matches!(parse("thread panicked"), Line::Other));
    }
}
