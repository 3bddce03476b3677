//! Looks into the virtual machine of a pod: sends the probe in through a way that is open, and takes its report.
//!
//! The ways, in the order in which they are tried: Kata's debug console, because its shell is root of the guest, with the
//! rights that CRIU would have there; then the runtime's exec, which is open in a stock Kata, but sees with the rights of
//! the container only. kata-agent's own interface is left out: its exec is the runtime's exec, it has none outside of a
//! container, and a second client of it may be refused by the guest's policy. A guest image that carries the probe needs
//! no way of its own: the console finds it and sends none.

pub mod console;
pub mod dump;
pub mod exec;
mod program;
pub mod shell;
pub mod survey;

use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

use podcheckpoint_probe::observation::Observations;
use tokio::time::Instant;

use crate::node::cri::Cri;
use crate::sandbox::Machine;

/// All ways together may take this long: a guest that hangs must not hang the operator.
pub const LIMIT: Duration = Duration::from_secs(5);

/// A way into a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Kata's debug console: a shell of the guest's root.
    Console,
    /// The runtime's exec into the container.
    Exec,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Console => "the debug console",
            Self::Exec => "the runtime's exec",
        })
    }
}

/// Why a way is not open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The way.
    pub way: Way,
    /// Why.
    pub why: String,
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.way, self.why)
    }
}

/// What was seen in a guest.
#[derive(Clone, Debug)]
pub struct Seen {
    /// By which way.
    pub way: Way,
    /// What the probe reported. Process numbers are those of the guest, or of the container when the way is exec.
    pub observations: Observations,
    /// Main process of each container in the order in which they were asked for, numbered as in `observations`.
    pub pids: Vec<i32>,
    /// Where CRIU is in the guest, as far as the way shows it.
    pub criu: Option<String>,
    /// Ways that were tried before.
    pub closed: Vec<Closed>,
}

/// What came of looking into a guest.
#[derive(Clone, Debug)]
pub enum Look {
    /// The probe has reported.
    Seen(Box<Seen>),
    /// No way was open.
    Closed(Vec<Closed>),
}

impl Look {
    /// What was seen, if anything.
    pub fn seen(&self) -> Option<&Seen> {
        match self {
            Self::Seen(seen) => Some(seen),
            Self::Closed(_) => None,
        }
    }

    /// Why no way was open, each way with its reason; empty when something was seen.
    pub fn obstacles(&self) -> String {
        match self {
            Self::Seen(_) => String::new(),
            Self::Closed(all) => all.iter().map(Closed::to_string).collect::<Vec<_>>().join("; "),
        }
    }
}

/// Sends the probe into the guest and waits for its report, [`LIMIT`] at most.
pub async fn look(cri: &Cri, machine: Option<&Machine>, containers: &[String]) -> Look {
    // Not the guest's time: the agent packs its own copy, once.
    let packed = tokio::task::spawn_blocking(program::packed);
    if let Err(error) = packed
        .await
        .map_err(std::io::Error::other)
        .and_then(|packed| packed)
    {
        tracing::error!(%error, "the probe cannot be read");
    }
    let until = Instant::now() + LIMIT;
    let mut closed = Vec::new();
    let step = Step::default();
    match within(until, &step, console::look(machine, containers, &step)).await {
        Ok(seen) => return Look::Seen(Box::new(seen)),
        Err(why) => closed.push(Closed {
            way: Way::Console,
            why,
        }),
    }
    match within(until, &step, exec::look(cri, containers, &step)).await {
        Ok(mut seen) => {
            seen.closed = closed;
            Look::Seen(Box::new(seen))
        }
        Err(why) => {
            closed.push(Closed { way: Way::Exec, why });
            Look::Closed(closed)
        }
    }
}

/// What is being done, for whoever has to say where the time went.
#[derive(Debug, Default)]
pub struct Step(Mutex<&'static str>);

impl Step {
    fn at(&self, what: &'static str) {
        if let Ok(mut step) = self.0.lock() {
            *step = what;
        }
    }

    fn last(&self) -> &'static str {
        self.0.lock().map_or("", |step| *step)
    }
}

async fn within<T, E: std::error::Error>(
    until: Instant,
    step: &Step,
    look: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match tokio::time::timeout_at(until, look).await {
        Ok(result) => result.map_err(|error| crate::node::chain(&error)),
        Err(_) => Err(format!(
            "no answer within the {} s of all ways, while {}",
            LIMIT.as_secs(),
            step.last()
        )),
    }
}
