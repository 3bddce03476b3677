//! The controller: reconciles PodCheckpoints.
//!
//! `observe` reads, `plan` decides (pure), `act` writes; `reconcile` ties them to the watches.

#![forbid(unsafe_code)]

mod act;
mod agent_pod;
mod config;
mod metrics;
mod observe;
mod plan;
mod reconcile;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use clap::{Parser, ValueEnum};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client};
use kube_lease_manager::LeaseManagerBuilder;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::act::Writer;
use crate::agent_pod::COMPONENT;
use crate::metrics::Metrics;
use crate::observe::Reader;
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
    #[arg(long, env = "POD_NAME", default_value = "podcheckpoint-controller")]
    identity: String,
    /// Work without a lease. Only safe when there is one replica.
    #[arg(long)]
    no_leader_election: bool,
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
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    match cli.log_format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
    let text =
        std::fs::read_to_string(&cli.config).with_context(|| format!("reading {}", cli.config.display()))?;
    let config: config::Config = serde_saphyr::from_str(&text).context("reading the configuration")?;
    let client = Client::try_default().await.context("finding the API server")?;
    let metrics = Metrics::default();
    let ready = Arc::new(AtomicBool::new(false));
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = serve_http(cli.http_address, metrics.clone(), ready.clone()) => result,
        result = lead(&cli, client, config, metrics, ready) => result,
        _ = terminate.recv() => {
            tracing::info!("asked to end");
            Ok(())
        }
    }
}

async fn serve_http(address: SocketAddr, metrics: Metrics, ready: Arc<AtomicBool>) -> anyhow::Result<()> {
    let readiness = move || async move {
        if ready.load(Ordering::Relaxed) {
            (StatusCode::OK, "ready")
        } else {
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "the API server has not been reached yet",
            )
        }
    };
    let router = Router::new()
        .route("/healthz", get(|| async { "alive" }))
        .route("/readyz", get(readiness))
        .route("/metrics", get(move || async move { metrics.text() }));
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))?;
    axum::serve(listener, router).await.context("serving HTTP")
}

/// Works while this replica leads. A lost lease ends the process: another replica works now, and what is under way
/// here must not go on.
async fn lead(
    cli: &Cli,
    client: Client,
    config: config::Config,
    metrics: Metrics,
    ready: Arc<AtomicBool>,
) -> anyhow::Result<()> {
    client
        .apiserver_version()
        .await
        .context("asking the API server")?;
    ready.store(true, Ordering::Relaxed);
    if cli.no_leader_election {
        metrics.leader.set(1);
        work(cli, client, config, metrics).await;
        return Ok(());
    }
    let manager = LeaseManagerBuilder::new(client.clone(), "podcheckpoint-controller")
        .with_namespace(&cli.namespace)
        .with_identity(&cli.identity)
        .build()
        .await
        .context("preparing the lease")?;
    let (mut leads, _task) = manager.watch().await;
    leads
        .wait_for(|leads| *leads)
        .await
        .context("waiting for the lease")?;
    tracing::info!(identity = cli.identity, "leading");
    metrics.leader.set(1);
    tokio::select! {
        () = work(cli, client, config, metrics.clone()) => Ok(()),
        _ = leads.wait_for(|leads| !*leads) => {
            metrics.leader.set(0);
            anyhow::bail!("the lease was lost; another replica leads")
        }
    }
}

async fn work(cli: &Cli, client: Client, config: config::Config, metrics: Metrics) {
    let config = Arc::new(config);
    let namespace = cli.namespace.clone();
    let (agents, writer) = reflector::store();
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let mine = watcher::Config::default().labels(&format!("{}={}", COMPONENT.0, COMPONENT.1));
    let cache = watcher(pods, mine)
        .default_backoff()
        .modify(|pod| pod.metadata.managed_fields = None)
        .reflect(writer)
        .boxed();
    let reporter = Reporter {
        controller: "podcheckpoint-controller".into(),
        instance: Some(cli.identity.clone()),
    };
    let shared = Shared {
        reader: Reader {
            client: client.clone(),
            agents,
            namespace: namespace.clone(),
            config: config.clone(),
        },
        writer: Writer {
            client: client.clone(),
            recorder: Recorder::new(client.clone(), reporter),
            namespace,
            config,
        },
        metrics,
    };
    reconcile::run(client, Arc::new(shared), cache).await;
}
