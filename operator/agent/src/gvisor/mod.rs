//! gVisor's own checkpoint, which is taken by gVisor's kernel itself and needs no ptrace.
//!
//! `runsc checkpoint` only asks: the kernel of the sandbox stops the pod's tasks, writes everything to the files that it
//! was handed, and lets the tasks run again, whether the writing has worked or not, and also when nobody waits for the
//! answer any more. So nothing has to be made to run again here, and nothing can: a kernel that writes cannot be told to
//! stop. What there is to find out is whether it still does, by the files that it holds open.

pub mod archive;
mod runsc;
pub mod save;

use std::time::Duration;

use podcheckpoint_crds::Reason;

/// Name of the state in an archive; runsc gives it.
pub const STATE: &str = "checkpoint.img";

/// Why gVisor's kernel was not asked, or did not do it.
#[derive(Debug, thiserror::Error)]
pub enum GvisorError {
    /// It, or runsc in its place, said no.
    #[error("runsc {command}: {answer}")]
    Refused {
        /// What was asked.
        command: String,
        /// Its words.
        answer: String,
    },
    /// It said nothing.
    #[error("runsc {command} gave no answer within {} s; gVisor's kernel, process {pid}, is in state {state}", limit.as_secs())]
    Silent {
        /// What was asked.
        command: String,
        /// The kernel's process.
        pid: i32,
        /// Its state, as /proc has it.
        state: char,
        /// How long was waited.
        limit: Duration,
    },
    /// Somebody has paused it.
    #[error("container {0} of the sandbox is paused")]
    Paused(String),
    /// Its process has ended.
    #[error("gVisor's kernel, process {0}, has ended")]
    Gone(i32),
    /// The deadline has passed.
    #[error("the checkpoint did not end within {} s", .0.as_secs())]
    Late(Duration),
    /// It was called off.
    #[error("cancelled: the PodCheckpoint was deleted or the agent is ending")]
    Cancelled,
    /// runsc cannot be run, or what it left cannot be read.
    #[error("{what}: {why}")]
    Unusable {
        /// What.
        what: String,
        /// Why.
        why: String,
    },
}

impl GvisorError {
    /// The reason for the status.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused { answer, .. } if answer.contains("no space left on device") => Reason::StorageFull,
            Self::Refused { .. } => Reason::GvisorCheckpointFailed,
            Self::Silent { .. } => Reason::GvisorSilent,
            Self::Paused(_) => Reason::GvisorPaused,
            Self::Gone(_) => Reason::SourcePodGone,
            Self::Late(_) => Reason::DeadlineExceeded,
            Self::Cancelled => Reason::AgentInterrupted,
            Self::Unusable { .. } => Reason::MethodUnavailable,
        }
    }
}
