//! What the agent knows of the node: its container runtime, its kubelet, and the kernel's facts about the target.

pub mod cgroup;
pub mod cri;
mod grpc;
pub mod kubelet;
pub(crate) mod nodefs;
pub mod probe;
pub mod process;
pub mod release;
pub mod runtime_files;
pub mod tasks;
pub mod watchdog;

/// An error with what it comes from.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
