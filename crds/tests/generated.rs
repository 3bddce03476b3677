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
