//! The probe is killed at every step of its ladder: the target runs on, untraced and correct, each time.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test; JSON yields null"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod causes;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use causes::{PROBE, Target, eventually, is_root};
use podcheckpoint_probe::observation::Step;

/// How often at each step.
const TRIALS: u32 = 100;

/// Kills the probe when it has announced the step, and the more often a little later.
fn kill_at(target: &Target, step: Step, trial: u32) -> Result<()> {
    let mut probe = Command::new(PROBE)
        .args(["--json", "--inject", "--pid", &target.pid().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let word = format!("{step:?}");
    for line in BufReader::new(probe.stdout.take().context("no output")?).lines() {
        let event: serde_json::Value = serde_json::from_str(&line?)?;
        if event["event"] == "begin" && event["step"] == word.as_str() {
            std::thread::sleep(Duration::from_micros(u64::from(trial % 20) * 10));
            break;
        }
    }
    probe.kill()?;
    probe.wait()?;
    // Its children die with it, and a tracer that dies lets go.
    eventually(Duration::from_secs(1), || target.assert_untraced())
}

#[test]
fn a_probe_that_is_killed_at_any_step_leaves_the_target_running() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["threads", "3"])?;
    for step in Step::ALL {
        for trial in 0..TRIALS {
            kill_at(&target, step, trial).with_context(|| format!("{step:?}, trial {trial}"))?;
        }
        target.assert_goes_on().with_context(|| format!("{step:?}"))?;
    }
    Ok(())
}
