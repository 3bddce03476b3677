//! Restores an archive on a node of the local cluster and shows that it goes on: `restore NODE ARCHIVE IMAGE FILE`
//! prints FILE as the restored container writes it.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result};
use podcheckpoint_e2e::{eventually, restore::restore};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [node, archive, image, file] = arguments.as_slice() else {
        anyhow::bail!("usage: restore NODE ARCHIVE IMAGE FILE");
    };
    let restored = restore(node, archive, image, "restored")?;
    println!("restored with runc as process {} of {node}", restored.pid);
    restored.run(&format!("rm -f {file}"))?;
    let result: Result<()> = (0..3).try_for_each(|_| {
        let value = eventually(Duration::from_secs(10), || restored.run(&format!("cat {file}")))?;
        println!("  {file}: {}", value.trim());
        std::thread::sleep(Duration::from_millis(700));
        Ok(())
    });
    restored.remove()?;
    result.context("reading what the restored container writes")
}
