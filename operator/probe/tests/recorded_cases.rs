//! Real cases, recorded on a real kernel by `RECORD_CASES=1 cargo test --test real_causes`, judged again: the taxonomy is
//! tested without root and without the kernel that it happened on.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test; JSON yields null"
)]

use std::fs;
use std::path::Path;

use podcheckpoint_probe::observation::Observations;
use podcheckpoint_probe::verdict::verdict;
use serde_json::Value;

#[test]
fn every_recorded_case_is_judged_as_it_was() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded");
    let mut reasons = std::collections::BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let case: Value = serde_json::from_str(&fs::read_to_string(entry.path()).unwrap()).unwrap();
        let seen: Observations = serde_json::from_value(case["observations"].clone()).unwrap();
        let root = verdict(&seen)
            .root()
            .map(|finding| finding.reason.as_str())
            .unwrap_or_default();
        assert_eq!(case["reason"], root, "{}", entry.path().display());
        reasons.insert(root);
    }
    assert!(reasons.len() >= 20, "only {reasons:?}");
}

#[test]
fn a_kernel_that_lists_no_sockets_stops_only_the_dump_of_a_network_namespace_that_is_saved() {
    use podcheckpoint_probe::observation::{Observations, Process};
    let mut seen = Observations {
        processes: vec![Process::default()],
        ..Observations::default()
    };
    seen.kernel.features.insert("UNIX_DIAG".into(), false);
    let outcome = |seen: &Observations| {
        let findings = podcheckpoint_probe::verdict::verdict(seen).findings;
        let found = findings
            .into_iter()
            .find(|f| f.reason.as_str() == "KernelFeatureMissing");
        format!("{:?}", found.map(|f| f.outcome))
    };
    assert_eq!(outcome(&seen), "Some(Fail)");
    seen.processes = vec![Process {
        first_network: true,
        ..Process::default()
    }];
    assert_eq!(outcome(&seen), "Some(Degraded)");
}
