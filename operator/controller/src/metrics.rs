//! What is counted. Labels come from closed sets.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use podcheckpoint_crds::{PodCheckpoint, Reason};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::plan::{Action, Event};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    class: &'static str,
}

/// The metrics of the controller.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    operations: Family<Ended, Counter>,
    seconds: Histogram,
    errors: Family<Class, Counter>,
    /// 1 while this replica leads.
    pub leader: Gauge<i64, AtomicI64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("podcheckpoint");
        let operations = Family::default();
        let seconds = Histogram::new([
            0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0,
        ]);
        let errors = Family::default();
        let leader = Gauge::default();
        registry.register(
            "operations",
            "PodCheckpoints that ended, by result and root cause",
            operations.clone(),
        );
        registry.register("duration_seconds", "From the binding to the end", seconds.clone());
        registry.register("reconcile_errors", "Passes that failed, by class", errors.clone());
        registry.register("leader", "1 while this replica leads", leader.clone());
        Self {
            registry: Arc::new(registry),
            operations,
            seconds,
            errors,
            leader,
        }
    }
}

impl Metrics {
    /// Counts an end, if the actions hold one.
    pub fn count(&self, object: &PodCheckpoint, actions: &[Action]) {
        for action in actions {
            let ended = match action {
                Action::Announce(Event::Succeeded(_)) => Ended {
                    result: "succeeded",
                    reason: "",
                },
                Action::Announce(Event::Failed { reason, .. }) => Ended {
                    result: "failed",
                    reason: Reason::parse(reason).unwrap_or(Reason::DumpFailed).as_str(),
                },
                _ => continue,
            };
            self.operations.get_or_create(&ended).inc();
            if let Some(start) = object.status.as_ref().and_then(|s| s.start_time.as_ref()) {
                self.seconds.observe(
                    k8s_openapi::jiff::Timestamp::now()
                        .duration_since(start.0)
                        .as_secs_f64(),
                );
            }
        }
    }

    /// Counts a failed pass.
    pub fn error(&self, class: &'static str) {
        self.errors.get_or_create(&Class { class }).inc();
    }

    /// Everything in the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
