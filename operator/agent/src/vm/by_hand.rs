//! A snapshot without a cluster: what `podcheckpoint-agent vm-snapshot` does, for administrators and for tests.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::archive::{self, Of};
use super::snapshot::{self, Limits};
use super::{VmError, watchdog};
use crate::archive::{prepare, publish};
use crate::sandbox::{self, Facts, Machine, facts};

/// Looks at the machine of a monitor and, with a folder, takes its snapshot.
pub fn main(pid: i32, to: Option<&Path>, deadline: Duration) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    match runtime.block_on(run(pid, to, deadline)) {
        Ok(words) => {
            println!("{words}");
            ExitCode::SUCCESS
        }
        Err(error) => fail(&format!("{}: {error}", error.reason())),
    }
}

fn fail(words: &str) -> ExitCode {
    eprintln!("{words}");
    ExitCode::FAILURE
}

/// The machine of a monitor, whoever has started it.
///
/// # Errors
/// When the process is gone or no monitor.
pub fn machine(pid: i32) -> Result<Machine, VmError> {
    let process = facts::process(pid).ok_or(VmError::Gone(pid))?;
    let facts = Facts {
        // Nobody's shim: whatever monitor it is, it is meant.
        runtime_type: Some(String::new()),
        processes: vec![process],
        ..Facts::default()
    };
    sandbox::recognise(&facts).machine.ok_or(VmError::Unreachable {
        socket: format!("process {pid}"),
        why: "it is no virtual machine monitor that is known".to_owned(),
    })
}

async fn run(pid: i32, to: Option<&Path>, deadline: Duration) -> Result<String, VmError> {
    let machine = machine(pid)?;
    // The folder above is somebody's: it is only measured, and never made the agent's own as an archive root is.
    let above = to.and_then(Path::parent).filter(|above| above.is_dir());
    let limits = Limits {
        archive_root: above.map_or_else(std::env::temp_dir, Path::to_owned),
        deadline,
        allow_degraded: false,
        cancelled: CancellationToken::new(),
    };
    let ready = snapshot::check(&machine, &limits).await?;
    let Some(folder) = to else {
        return Ok(ready.words());
    };
    let partial = folder.with_extension("partial");
    let of = Of {
        pod_uid: String::new(),
        namespace: String::new(),
        pod: String::new(),
        sandbox: format!("process {pid}"),
        containers: Vec::new(),
    };
    let wrong = |error: crate::archive::ArchiveError| VmError::Disk {
        path: partial.clone(),
        full: error.reason() == podcheckpoint_crds::Reason::StorageFull,
        why: error.to_string(),
    };
    prepare(&partial).map_err(wrong)?;
    let taken = snapshot::take(ready, &partial, &limits).await;
    let stored = taken.and_then(|taken| {
        archive::write_manifest(&partial, &of, &machine, &taken)?;
        let verified = archive::verify(&partial, &of).map_err(wrong)?;
        publish(&partial, folder).map_err(wrong)?;
        Ok(format!(
            "{} bytes, stood still for {} ms",
            verified.size,
            taken.paused.as_millis()
        ))
    });
    if stored.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    stored
}

/// Makes a machine run that an earlier process has left paused.
///
/// # Errors
/// When it does not run afterwards.
pub async fn resume(pid: i32) -> Result<(), VmError> {
    watchdog::release(&super::Handle::of(&machine(pid)?)).await
}
