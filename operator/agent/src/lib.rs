//! The agent: runs on the target's node, finds the target, takes the checkpoint, verifies the archive and reports.
//!
//! `node` observes, `plan` decides (pure), `operation` acts, `report` writes what came of it. Nothing here listens.

#![forbid(unsafe_code)]

pub mod archive;
pub mod capability;
pub mod criu;
pub mod guest;
pub mod gvisor;
pub mod journal;
pub mod node;
pub mod operation;
pub mod plan;
pub mod report;
pub mod run;
pub mod sandbox;
pub mod security;
pub mod validate;
pub mod vm;
mod words;
