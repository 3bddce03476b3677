//! The agent's command line.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use podcheckpoint_agent::journal::Journal;
use podcheckpoint_agent::node::kubelet::Kubelet;
use podcheckpoint_agent::node::watchdog;
use podcheckpoint_agent::operation::Context;
use podcheckpoint_agent::run;
use podcheckpoint_agent::security::Security;
use podcheckpoint_agent::vm;
use podcheckpoint_crds::PatchKind;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Takes checkpoints of the pods of one node. Started by the controller as a pod.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch the PodCheckpoints of this node.
    Run(RunArguments),
    /// Make a target run again when the agent is gone. Started by the agent itself.
    #[command(hide = true)]
    Watchdog {
        /// Seconds until the target is released in any case.
        deadline: u64,
        /// The container runtime's CRI socket.
        runtime_socket: PathBuf,
        /// Folder of all archives.
        archive_root: PathBuf,
        /// The target's freezers, as JSON.
        freezers: String,
    },
    /// Make a machine run again when the agent is gone. Started by the agent itself.
    #[command(hide = true)]
    VmWatchdog {
        /// Milliseconds until the machine is made to run in any case.
        deadline: u64,
        /// Folder of all archives.
        archive_root: PathBuf,
        /// How the machine is reached, as JSON.
        handle: String,
    },
    /// Run a program as a process sees files. Started by the agent itself.
    #[command(hide = true)]
    InMountsOf {
        /// The process.
        pid: i32,
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Take a snapshot of a machine by hand, or only find out whether that is possible.
    VmSnapshot(VmSnapshotArguments),
}

#[derive(clap::Args)]
struct VmSnapshotArguments {
    /// Process of the virtual machine monitor.
    #[arg(long)]
    vmm_pid: i32,
    /// Folder to make; its parent needs room for the guest's memory. Without it, the machine is only looked at.
    #[arg(long)]
    to: Option<PathBuf>,
    /// Seconds that the machine may stand still.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

#[derive(clap::Args)]
struct RunArguments {
    /// Name of this node.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// Address of this node, for its kubelet.
    #[arg(long, env = "HOST_IP")]
    host_ip: Option<String>,
    /// Folder of all archives; at the same path on the node, since the runtime writes there.
    #[arg(long, default_value = "/var/lib/podcheckpoint")]
    archive_root: PathBuf,
    /// The container runtime's CRI socket; found by itself when absent.
    #[arg(long)]
    runtime_socket: Option<PathBuf>,
    /// Port of the kubelet; the kubelet is not asked when absent.
    #[arg(long)]
    kubelet_port: Option<u16>,
    /// Authority of the kubelet's certificate (PEM); the cluster's when absent.
    #[arg(long, env = "KUBELET_CA_PEM")]
    kubelet_ca: Option<String>,
    /// A kind of security setting that may be changed for the time of a checkpoint. May be repeated.
    #[arg(long = "allow-patch", value_name = "KIND")]
    allow_patches: Vec<PatchKind>,
    /// Take a virtual machine that runs in an ordinary pod for the pod. The tenant chooses what is paused and written.
    #[arg(long)]
    machines_in_pods: bool,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Json,
    Text,
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Watchdog {
            deadline,
            runtime_socket,
            archive_root,
            freezers,
        } => watchdog::main(deadline, &runtime_socket, &archive_root, &freezers),
        Command::VmWatchdog {
            deadline,
            archive_root,
            handle,
        } => vm::watchdog::main(Duration::from_millis(deadline), &archive_root, &handle),
        Command::InMountsOf { pid, command } => in_mounts_of(pid, &command),
        Command::VmSnapshot(arguments) => vm::by_hand::main(
            arguments.vmm_pid,
            arguments.to.as_deref(),
            Duration::from_secs(arguments.timeout),
        ),
        Command::Run(arguments) => run_agent(arguments),
    }
}

/// Only from a process with one thread: a mount namespace belongs to all of them.
fn in_mounts_of(pid: i32, command: &[String]) -> ExitCode {
    use std::os::unix::process::CommandExt;
    let enter = || {
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(rustix::thread::LinkNameSpaceType::Mount),
        )?;
        let (program, arguments) = command.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
        Err::<(), _>(std::process::Command::new(program).args(arguments).exec())
    };
    if let Err(error) = enter() {
        eprintln!("{}: {error}", command.join(" "));
    }
    ExitCode::FAILURE
}

fn run_agent(arguments: RunArguments) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    match arguments.log_format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no asynchronous runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the agent ends");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: RunArguments) -> Result<(), Box<dyn std::error::Error>> {
    let client = kube::Client::try_default().await?;
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopper = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("asked to end");
        stopper.cancel();
    });
    let kubelet = match (&arguments.host_ip, arguments.kubelet_port) {
        (Some(host), Some(port)) => Some(Kubelet::new(host, port, arguments.kubelet_ca.as_deref())?),
        _ => None,
    };
    let context = Context {
        runtime_socket: arguments.runtime_socket,
        kubelet,
        journal: Journal::new(&arguments.archive_root),
        security: Arc::new(Security::new(&arguments.archive_root, arguments.allow_patches)),
        archive_root: arguments.archive_root,
        node: Arc::default(),
        machines_in_pods: arguments.machines_in_pods,
    };
    run::run(client, &arguments.node_name, context, stop).await?;
    Ok(())
}
