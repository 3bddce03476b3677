//! Proves that ptrace works on a target, without ever hanging and without a trace left in it, and names the cause when
//! it does not.
//!
//! Observing ([`ladder`], [`facts`]) and judging ([`verdict`]) are apart: observations are plain data, the verdict is a
//! pure function of them.

pub mod btf;
pub mod child;
pub mod criu;
#[cfg(test)]
mod damaged;
pub mod facts;
pub mod freezer;
pub mod inject;
pub mod ladder;
pub mod observation;
pub mod proc;
pub mod rungs;
pub mod selinux;
pub mod sys;
pub mod verdict;
pub mod wire;
