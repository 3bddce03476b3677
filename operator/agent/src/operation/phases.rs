//! How long each part of an operation took, for the log.

use std::time::{Duration, Instant};

/// How long each part of an operation took, for the log.
pub(super) struct Phases {
    begun: Instant,
    ended: Vec<(&'static str, Duration)>,
}

impl Default for Phases {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            ended: Vec::new(),
        }
    }
}

impl Phases {
    /// A part has ended, and the next one begins.
    pub(super) fn end(&mut self, name: &'static str) {
        self.ended.push((name, self.begun.elapsed()));
        self.begun = Instant::now();
    }
}

impl std::fmt::Display for Phases {
    /// `inspect=0.012 prove=0.110 ...`, in seconds.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (name, duration)) in self.ended.iter().enumerate() {
            let space = if number == 0 { "" } else { " " };
            write!(f, "{space}{name}={:.4}", duration.as_secs_f64())?;
        }
        Ok(())
    }
}
