//! The probe as it is sent into a guest: packed once, with the hash of what is sent.

use std::io::{self, Write};
use std::sync::OnceLock;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};

use crate::node::probe;

/// The packed probe.
#[derive(Debug)]
pub struct Packed {
    /// The program, as gzip.
    pub bytes: Vec<u8>,
    /// SHA-256 of these bytes, in hexadecimal.
    pub sha256: String,
}

/// Packs the probe; the work is done once in the life of the agent.
///
/// # Errors
/// When the agent's own copy cannot be read.
pub fn packed() -> io::Result<&'static Packed> {
    static PACKED: OnceLock<Packed> = OnceLock::new();
    if let Some(packed) = PACKED.get() {
        return Ok(packed);
    }
    let made = pack(&std::fs::read(probe::program())?)?;
    Ok(PACKED.get_or_init(|| made))
}

fn pack(program: &[u8]) -> io::Result<Packed> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(program)?;
    let bytes = encoder.finish()?;
    let sha256 = hex(&Sha256::digest(&bytes));
    Ok(Packed { bytes, sha256 })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
