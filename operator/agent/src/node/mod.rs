//! What the agent knows of the node: its container runtime, its kubelet, and the kernel's facts about the target.

pub mod cgroup;
pub mod cri;
mod grpc;
pub mod kubelet;
pub mod probe;
pub mod process;
pub mod release;
pub mod tasks;
pub mod watchdog;
