//! The runtime's exec into the container, which a stock Kata has open. It takes no input, so the probe goes in as
//! arguments; and what it sees is seen with the container's own rights, from inside its namespaces.

use std::time::Duration;

use super::program;
use super::{Seen, Step, Way};
use crate::node::cri::{Cri, CriError};
use crate::node::probe::{ProbeError, report_in};

/// An argument may be 128 KiB long (MAX_ARG_STRLEN), with its end.
const ARGUMENT: usize = 120 << 10;
/// All arguments may be a quarter of the stack's limit, usually 2 MiB.
const ARGUMENTS: usize = 12;
/// The runtime ends a command after this, if nobody waits for it any more.
const COMMAND: Duration = Duration::from_secs(5);

/// Exec was of no use.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The runtime refused it.
    #[error(transparent)]
    Runtime(#[from] CriError),
    /// The image lacks what is needed to take the probe in.
    #[error("the container of the pod cannot take the probe in: {0}")]
    Container(String),
    /// The probe.
    #[error("the probe does not run in the container")]
    Probe(#[from] ProbeError),
    /// The agent's own copy.
    #[error("the probe cannot be read")]
    Program(#[source] std::io::Error),
    /// Nothing to look at.
    #[error("no container was named")]
    Nothing,
}

/// Appends its arguments to a file in the first folder that can be written and executed from.
/// Not with printf, which writes byte by byte in busybox: seconds for a megabyte in a slow guest.
const APPEND: &str = r#"n=$1; shift
for d in /tmp /var/tmp /run /root .; do f=$d/.podcheckpoint-probe; [ -e $f.64 ] && break; done
[ -e $f.64 ] || for d in /tmp /var/tmp /run /root .; do f=$d/.podcheckpoint-probe; : > $f.64 && break; done 2> /dev/null
[ $n = 0 ] && { : > $f.64 || exit 70; }
for a; do echo "$a"; done >> $f.64 || exit 70"#;

/// Unpacks it and runs it from a descriptor, so that no file is left behind whatever happens from then on.
const RUN: &str = r#"
base64 -d < $f.64 | gzip -dc > $f; rm -f $f.64
chmod 700 $f && exec 3< $f; rm -f $f
exec /proc/self/fd/3 --json --pid 1"#;

/// Removes what may be left of it.
const CLEAN: &str = "rm -f /tmp/.podcheckpoint-probe* /var/tmp/.podcheckpoint-probe* /run/.podcheckpoint-probe* /root/.podcheckpoint-probe* ./.podcheckpoint-probe*";

/// Sends the probe into the first container and asks it about that container's processes.
///
/// # Errors
/// When exec is not possible, or the probe does not report.
pub async fn look(cri: &Cri, containers: &[String], step: &Step) -> Result<Seen, ExecError> {
    step.at("sending the probe as arguments of exec");
    let container = containers.first().ok_or(ExecError::Nothing)?;
    let mut rubbish = Rubbish {
        cri: cri.clone(),
        container: container.clone(),
        left: true,
    };
    let packed = program::packed().map_err(ExecError::Program)?;
    let calls = calls(&packed.bytes);
    let last = calls.len().saturating_sub(1);
    let mut said = String::new();
    for (number, arguments) in calls.into_iter().enumerate() {
        let run = if number == last { RUN } else { "" };
        if number == last {
            step.at("running the probe by exec");
        }
        let mut command = vec!["sh".into(), "-c".into(), format!("{APPEND}{run}"), "sh".into()];
        command.push(number.to_string());
        command.extend(arguments);
        let output = cri.exec(container, command, COMMAND).await?;
        // The probe's own statuses are 0 to 3.
        if output.code > 3 {
            let words: String = output.stderr.trim().chars().take(200).collect();
            return Err(ExecError::Container(format!(
                "{words} (exit status {})",
                output.code
            )));
        }
        said = output.stdout;
    }
    let observations = report_in(&said)?;
    rubbish.left = false;
    Ok(Seen {
        way: Way::Exec,
        observations,
        pids: vec![1],
        criu: None,
        closed: Vec::new(),
    })
}

/// The arguments of each call.
fn calls(bytes: &[u8]) -> Vec<Vec<String>> {
    let text = base64(bytes);
    let arguments: Vec<String> = text
        .as_bytes()
        .chunks(ARGUMENT)
        .map(|chunk| String::from_utf8_lossy(chunk).into_owned())
        .collect();
    arguments.chunks(ARGUMENTS).map(<[String]>::to_vec).collect()
}

fn base64(bytes: &[u8]) -> String {
    use ::base64::Engine;
    ::base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Parts of the probe that may still be in the container when this is dropped, also because nobody waits any more.
struct Rubbish {
    cri: Cri,
    container: String,
    left: bool,
}

impl Drop for Rubbish {
    fn drop(&mut self) {
        if !self.left {
            return;
        }
        let (cri, container) = (self.cri.clone(), self.container.clone());
        tokio::spawn(async move {
            let command = vec!["sh".into(), "-c".into(), CLEAN.into()];
            let _ = tokio::time::timeout(COMMAND, cri.exec(&container, command, COMMAND)).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_argument_is_longer_than_the_kernel_takes_and_nothing_is_lost() {
        let bytes = vec![7; 3 << 20];
        let calls = calls(&bytes);
        let longest = calls.iter().flatten().map(String::len).max().unwrap();
        assert!(longest < 128 << 10);
        let most = calls
            .iter()
            .map(|call| call.iter().map(String::len).sum::<usize>())
            .max()
            .unwrap();
        assert!(most < 2 << 20);
        assert_eq!(calls.concat().concat(), base64(&bytes));
    }
}
