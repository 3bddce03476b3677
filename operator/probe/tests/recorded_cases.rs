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
