//! `army dev`: everything on this host.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use army_api::keys::{CreateKey, Role};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::output;
use crate::blocking;
use crate::controller::Controller;
use crate::node::Node;
use crate::server;
use crate::store::Store;

/// Serve everything on this host: API, dashboard, store and VMs.
///
/// The first start prints an administrator's key, once. VMs go on when the server ends, and are its
/// own again when it comes back.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Where to listen. Nothing is encrypted: put a proxy with TLS before any other address than
    /// this host's own.
    #[arg(long, default_value = "127.0.0.1:7777", env = "ARMY_LISTEN")]
    listen: SocketAddr,
    /// Where everything is kept that is to outlive the server.
    #[arg(long, default_value = "/var/lib/army", env = "ARMY_STATE")]
    state: PathBuf,
    /// What the host is called.
    #[arg(long)]
    host_name: Option<String>,
}

pub(super) async fn run(args: Args) -> Result<ExitCode> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("ARMY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,sqlx=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    std::fs::create_dir_all(&args.state)
        .with_context(|| format!("cannot make {}", args.state.display()))?;
    let _lock = only_one(&args.state)?;
    // First, so that a second server or a wrong address is told before anything is done.
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let store = Store::open(&args.state.join("army.db")).await?;
    let name = args.host_name.unwrap_or_else(host_name);
    let journal = args.state.join("vms");
    let runtime = clone::runtime::Runtime::from_env()?;
    let templates = clone::template::Store::from_env()?;
    let node = blocking(move || Node::open(name, journal, runtime, templates)).await?;
    node.supervise().context("cannot supervise VMs")?;
    let controller = Arc::new(Controller::new(store.clone(), vec![node]));
    controller.take_up_all().await?;
    let url = format!("http://{}", listener.local_addr()?);
    if !store.has_keys().await? {
        let admin = CreateKey {
            tenant: "default".into(),
            role: Role::Admin,
            max_vms: None,
        };
        let key = store.create_key(&admin).await?;
        output::print(&format!(
            "This key is not shown again:\n\n    export ARMY_URL={url} ARMY_KEY={}\n",
            key.secret
        ));
    }
    output::print(&format!(
        "Army answers at {url}; the dashboard is there, too."
    ));
    let reconcile = tokio::spawn(Arc::clone(&controller).reconcile());
    let mut terminate = signal(SignalKind::terminate())?;
    let serve = axum::serve(listener, server::router(Arc::clone(&controller))).into_future();
    tokio::select! {
        served = serve => served?,
        // Running requests are dropped with their connections: what they began is in the journal.
        _ = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    reconcile.abort();
    Ok(ExitCode::SUCCESS)
}

/// Two servers on one state would undo each other's work.
fn only_one(state: &std::path::Path) -> Result<std::fs::File> {
    let path = state.join("lock");
    let file =
        std::fs::File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&file, lock).map_err(|_| {
        anyhow::anyhow!(
            "another Army serves from {}: end it, or use another --state",
            state.display()
        )
    })?;
    Ok(file)
}

fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    match clone_api::validate::is_valid_name(&name) {
        true => name,
        false => "host".into(),
    }
}
