//! The files that are generated from this crate and committed beside it.

use kube::CustomResourceExt;

use crate::{CheckpointNode, PodCheckpoint, reasons};

/// Every generated file: its path relative to this crate, and its content.
///
/// # Errors
/// When the CRD cannot be serialised, which would be a mistake in the types.
pub fn files() -> Result<Vec<(&'static str, String)>, serde_saphyr::ser::Error> {
    let pods = serde_saphyr::to_string(&PodCheckpoint::crd())?;
    let nodes = serde_saphyr::to_string(&CheckpointNode::crd())?;
    Ok(vec![
        ("generated/podcheckpoints.yaml", pods.clone()),
        ("generated/checkpointnodes.yaml", nodes.clone()),
        // Helm reads only files inside the chart.
        ("../charts/podcheckpoint/files/podcheckpoints.yaml", pods),
        ("../charts/podcheckpoint/files/checkpointnodes.yaml", nodes),
        ("reasons.md", reasons::markdown()),
    ])
}
