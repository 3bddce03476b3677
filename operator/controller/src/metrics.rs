//! What is counted. Labels come from closed sets.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use k8s_openapi::jiff::Timestamp;
use podcheckpoint_crds::PodCheckpoint;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::plan::{Action, Event};
use crate::reconcile::Class;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorClass {
    class: &'static str,
}

/// The metrics of the controller.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Registry>,
    operations: Family<Ended, Counter>,
    seconds: Histogram,
    errors: Family<ErrorClass, Counter>,
    /// Operations that are bound and have not ended.
    pub(crate) in_progress: Gauge<i64, AtomicI64>,
    /// 1 while this replica leads.
    pub(crate) leader: Gauge<i64, AtomicI64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("podcheckpoint");
        let metrics = Self {
            registry: Arc::default(),
            operations: Family::default(),
            seconds: Histogram::new([
                0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0,
            ]),
            errors: Family::default(),
            in_progress: Gauge::default(),
            leader: Gauge::default(),
        };
        let operations = metrics.operations.clone();
        registry.register(
            "operations",
            "PodCheckpoints that ended, by result and root cause",
            operations,
        );
        registry.register(
            "duration_seconds",
            "From the binding to the end",
            metrics.seconds.clone(),
        );
        registry.register("in_progress", "Operations under way", metrics.in_progress.clone());
        registry.register(
            "reconcile_errors",
            "Passes that failed, by class",
            metrics.errors.clone(),
        );
        registry.register("leader", "1 while this replica leads", metrics.leader.clone());
        Self {
            registry: Arc::new(registry),
            ..metrics
        }
    }
}

impl Metrics {
    /// Counts an end, if the actions that were carried out hold one.
    pub(crate) fn count(&self, object: &PodCheckpoint, actions: &[Action], now: Timestamp) {
        let ends = actions.iter().filter_map(|action| match action {
            Action::Announce(Event::Succeeded { reason, .. }) => Some(("succeeded", reason)),
            Action::Announce(Event::Failed { reason, .. }) => Some(("failed", reason)),
            _ => None,
        });
        for (result, reason) in ends {
            let reason = reason.as_str();
            self.operations.get_or_create(&Ended { result, reason }).inc();
            if let Some(start) = object.status.as_ref().and_then(|s| s.start_time.as_ref()) {
                self.seconds.observe(now.duration_since(start.0).as_secs_f64());
            }
        }
    }

    /// Counts a failed pass.
    pub(crate) fn error(&self, class: Class) {
        let class = class.as_str();
        self.errors.get_or_create(&ErrorClass { class }).inc();
    }

    /// Everything in the text format of OpenMetrics.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podcheckpoint_crds::{PodCheckpointSpec, Reason};

    #[test]
    fn an_end_is_counted_by_its_root_cause() {
        let metrics = Metrics::default();
        let object = PodCheckpoint::new("a", PodCheckpointSpec::default());
        let failed = Event::Failed {
            reason: Reason::CriuMissing,
            message: "no criu".into(),
        };
        metrics.count(&object, &[Action::Announce(failed)], Timestamp::UNIX_EPOCH);
        let line = "podcheckpoint_operations_total{result=\"failed\",reason=\"CriuMissing\"} 1";
        assert!(metrics.text().contains(line), "{}", metrics.text());
    }
}
