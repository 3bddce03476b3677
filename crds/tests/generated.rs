//! The committed files are what the code generates.

use std::path::Path;

#[test]
fn committed_files_are_current() {
    for (path, content) in podcheckpoint_crds::generated::files().unwrap() {
        let committed =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_default();
        assert!(
            committed == content,
            "{path} is stale: run `cargo run -p podcheckpoint-crds --bin crdgen`"
        );
    }
}

/// kubectl takes a category for what is meant, and then refuses a name behind it: `kubectl describe podcheckpoint NAME`.
#[test]
fn no_category_is_the_name_of_a_resource() {
    use kube::CustomResourceExt;
    let all = [
        podcheckpoint_crds::PodCheckpoint::crd(),
        podcheckpoint_crds::CheckpointNode::crd(),
    ];
    let names = all.iter().flat_map(|crd| {
        let names = &crd.spec.names;
        let short = names.short_names.iter().flatten();
        short
            .chain([&names.plural])
            .chain(&names.singular)
            .collect::<Vec<_>>()
    });
    let categories: Vec<&String> = all
        .iter()
        .filter_map(|crd| crd.spec.names.categories.as_ref())
        .flatten()
        .collect();
    for name in names {
        assert!(!categories.contains(&name), "{name}");
    }
}
