//! Condition types, who owns each, and the one way to build a condition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::Reason;

/// Type of a condition. Each type is written by one owner only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConditionType {
    /// The pod exists, runs, its UID is pinned and its node is known.
    TargetResolved,
    /// Whether ptrace works on the target.
    PtraceValidated,
    /// Security settings are as the checkpoint needs them.
    SecurityPrepared,
    /// The archive is complete, synced and verified.
    Checkpointed,
    /// Every changed setting is back to what it was.
    SecurityRestored,
    /// After the operation the pod runs, is thawed and untraced.
    SourceRunning,
    /// Summary.
    Ready,
    /// Failed for good.
    Stalled,
}

/// Who writes a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The controller.
    Controller,
    /// The agent on the node of the target.
    Agent,
}

impl ConditionType {
    /// All types, in the order in which a checkpoint passes them.
    pub const ALL: [Self; 8] = [
        Self::TargetResolved,
        Self::PtraceValidated,
        Self::SecurityPrepared,
        Self::Checkpointed,
        Self::SecurityRestored,
        Self::SourceRunning,
        Self::Ready,
        Self::Stalled,
    ];

    /// The name as it stands in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TargetResolved => "TargetResolved",
            Self::PtraceValidated => "PtraceValidated",
            Self::SecurityPrepared => "SecurityPrepared",
            Self::Checkpointed => "Checkpointed",
            Self::SecurityRestored => "SecurityRestored",
            Self::SourceRunning => "SourceRunning",
            Self::Ready => "Ready",
            Self::Stalled => "Stalled",
        }
    }

    /// The only one who may write this type.
    pub fn owner(self) -> Owner {
        match self {
            Self::TargetResolved | Self::Ready | Self::Stalled => Owner::Controller,
            Self::PtraceValidated
            | Self::SecurityPrepared
            | Self::Checkpointed
            | Self::SecurityRestored
            | Self::SourceRunning => Owner::Agent,
        }
    }
}

/// Status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Not known, or not yet.
    Unknown,
}

impl Verdict {
    /// The name as it stands in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Builds a condition. `previous` are the conditions as they stand: when the status of this type has not changed, its
/// lastTransitionTime is kept, so that writing the same thing again changes nothing.
pub fn condition(
    r#type: ConditionType,
    verdict: Verdict,
    reason: Reason,
    message: impl Into<String>,
    observed_generation: Option<i64>,
    previous: &[Condition],
    now: &Time,
) -> Condition {
    let same = previous
        .iter()
        .find(|c| c.type_ == r#type.as_str() && c.status == verdict.as_str());
    Condition {
        type_: r#type.as_str().to_owned(),
        status: verdict.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        message: message.into(),
        observed_generation,
        last_transition_time: same.map_or_else(|| now.clone(), |c| c.last_transition_time.clone()),
    }
}
