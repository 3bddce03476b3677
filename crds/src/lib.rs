//! The API of podcheckpoint.dev: types, conditions and reasons.
//!
//! This crate says what a user can write and read. It talks to no cluster and makes no decision: the controller and
//! the agent share it so that both mean the same thing by the same word.

#![forbid(unsafe_code)]

pub mod checkpoint_node;
pub mod conditions;
pub mod generated;
pub mod podcheckpoint;
pub mod reasons;

pub use checkpoint_node::*;
pub use conditions::ConditionType;
pub use podcheckpoint::*;
pub use reasons::Reason;

/// API group of every kind in this crate.
pub const GROUP: &str = "podcheckpoint.dev";
/// Finalizer by which the controller keeps an object until its archive is deleted.
pub const FINALIZER: &str = "podcheckpoint.dev/archive";
/// Field manager under which the controller writes.
pub const CONTROLLER_MANAGER: &str = "podcheckpoint-controller";
/// Field manager under which an agent writes.
pub const AGENT_MANAGER: &str = "podcheckpoint-agent";
