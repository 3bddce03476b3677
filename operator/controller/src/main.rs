//! The controller: reconciles PodCheckpoints.
//!
//! `observe` reads, `plan` decides (pure, with `target`, `summary` and `agents`), `act` writes; `reconcile` ties them to
//! the watches.

#![forbid(unsafe_code)]

mod act;
mod agent_pod;
mod agents;
mod config;
mod http;
mod leader;
mod metrics;
mod observe;
mod plan;
mod reconcile;
mod summary;
mod target;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use kube::Client;
use kube::runtime::events::Reporter;
use kube::runtime::reflector;
use podcheckpoint_crds::CONTROLLER_MANAGER;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::act::Hand;
use crate::config::Config;
use crate::leader::Leadership;
use crate::metrics::Metrics;
use crate::observe::Reader;
use crate::plan::Settings;
use crate::reconcile::Shared;

/// Reconciles PodCheckpoints: binds them to nodes, launches agents and sums up what they report.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Configuration file.
    #[arg(long, default_value = "/etc/podcheckpoint/controller.yaml")]
    config: PathBuf,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, default_value = "0.0.0.0:8080")]
    http_address: SocketAddr,
    /// Namespace of the operator: here the agents run.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// Name of this replica in the lease.
    #[arg(long, env = "POD_NAME", default_value = CONTROLLER_MANAGER)]
    identity: String,
    /// Work only while holding the lease; this is the default.
    #[arg(long, overrides_with = "no_leader_elect")]
    leader_elect: bool,
    /// Work without a lease. Only safe when there is one replica.
    #[arg(long, overrides_with = "leader_elect")]
    no_leader_elect: bool,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Json,
    Text,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    init_log(cli.log_format);
    match run(&cli).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the controller ends");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: &Cli) -> anyhow::Result<()> {
    let config = read_config(cli)?;
    let client = Client::try_default().await.context("finding the API server")?;
    let metrics = Metrics::default();
    let ready = Arc::new(AtomicBool::new(false));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("asked to end");
    };
    tokio::select! {
        result = http::serve(cli.http_address, metrics.clone(), ready.clone()) => {
            result.with_context(|| format!("serving HTTP on {}", cli.http_address))
        }
        result = lead(cli, client, config, metrics, &ready, stop) => result,
    }
}

fn init_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    match format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
}

fn read_config(cli: &Cli) -> anyhow::Result<Config> {
    let path = cli.config.display();
    let text = std::fs::read_to_string(&cli.config).with_context(|| format!("reading {path}"))?;
    serde_saphyr::from_str(&text).with_context(|| format!("understanding {path}"))
}

/// Works while this replica leads. A lost lease ends the process: another replica works now, and what is under way
/// here must not go on.
async fn lead(
    cli: &Cli,
    client: Client,
    config: Config,
    metrics: Metrics,
    ready: &AtomicBool,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut stop = std::pin::pin!(stop);
    let version = client
        .apiserver_version()
        .await
        .context("asking the API server")?;
    ready.store(true, Ordering::Relaxed);
    tracing::info!(
        kubernetes = version.git_version,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    if cli.no_leader_elect {
        metrics.leader.set(1);
        return tokio::select! {
            () = work(cli, client, config, metrics.clone()) => anyhow::bail!("the watches have ended"),
            () = &mut stop => Ok(()),
        };
    }
    let leadership = Leadership::prepare(&cli.namespace, &cli.identity).await?;
    tokio::select! {
        gained = leadership.gained() => gained?,
        () = &mut stop => return Ok(()),
    }
    tracing::info!(identity = cli.identity, "leading");
    metrics.leader.set(1);
    tokio::select! {
        lost = leadership.lost() => {
            metrics.leader.set(0);
            lost?;
            anyhow::bail!("the lease was lost; another replica leads")
        }
        () = work(cli, client, config, metrics.clone()) => anyhow::bail!("the watches have ended"),
        () = &mut stop => {
            leadership.release().await;
            Ok(())
        }
    }
}

async fn work(cli: &Cli, client: Client, config: Config, metrics: Metrics) {
    let (agents, agents_writer) = reflector::store();
    let settings = Settings {
        namespace: cli.namespace.clone(),
        start_timeout: config.agent.start_timeout_seconds,
        idle_timeout: config.agent.idle_timeout_seconds,
        template: agent_pod::template(&config.agent),
    };
    let reporter = Reporter {
        controller: CONTROLLER_MANAGER.into(),
        instance: Some(cli.identity.clone()),
    };
    let shared = Shared {
        reader: Reader {
            client: client.clone(),
            agents,
            settings,
        },
        hand: Hand {
            announced: Arc::default(),
            client: client.clone(),
            reporter,
            namespace: cli.namespace.clone(),
            config: Arc::new(config),
        },
        metrics,
        failures: Default::default(),
    };
    reconcile::run(client, Arc::new(shared), agents_writer).await;
}
