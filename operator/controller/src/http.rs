//! /healthz, /readyz and /metrics.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use crate::metrics::Metrics;

/// Serves until the process ends.
///
/// # Errors
/// When the address cannot be listened on.
pub(crate) async fn serve(address: SocketAddr, metrics: Metrics, ready: Arc<AtomicBool>) -> io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(|| async { "alive" }))
        .route(
            "/readyz",
            get(move || async move { readiness(ready.load(Ordering::Relaxed)) }),
        )
        .route("/metrics", get(move || async move { exposition(&metrics) }));
    let listener = tokio::net::TcpListener::bind(address).await?;
    axum::serve(listener, router).await
}

/// A replica that waits for the lease is ready: it can take over at any moment.
fn readiness(ready: bool) -> (StatusCode, &'static str) {
    if ready {
        (StatusCode::OK, "ready")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API server has not been reached yet",
        )
    }
}

fn exposition(metrics: &Metrics) -> impl IntoResponse + use<> {
    let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, format)], metrics.text())
}
