//! Writes what is generated from this crate: the CRD and the page of reasons. Run it after a change of the API;
//! `tests/generated.rs` fails while the committed files are stale.

use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    for (path, content) in podcheckpoint_crds::generated::files().map_err(io::Error::other)? {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        std::fs::write(&path, content)?;
        println!("{}", path.display());
    }
    Ok(())
}
