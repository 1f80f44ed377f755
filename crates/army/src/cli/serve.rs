//! What the servers of this program have in common: their log, their state directory, and their end.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use army_api::keys::{CreateKey, Role};
use clone_api::jail::RequiredJail;
use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::output;
use crate::server;
use crate::server::tls::{self, Files};
use army_controller::{Controller, DEFAULT_KEPT, Database, Limits};
use army_node::Node;
use army_node_api::cluster::tls::Listener;

/// Starts the log, and creates and locks the state directory. It is locked while the returned file is
/// open.
pub(super) fn begin(state: &Path) -> Result<std::fs::File> {
    start_log()?;
    raise_open_files().context("cannot raise the limit of open files")?;
    std::fs::create_dir_all(state).with_context(|| format!("cannot make {}", state.display()))?;
    // It has keys, the database and the journal.
    std::fs::set_permissions(state, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot protect {}", state.display()))?;
    only_one(state)
}

/// Starts the log on standard error, filtered by `ARMY_LOG`.
fn start_log() -> Result<()> {
    let wanted = std::env::var("ARMY_LOG").unwrap_or_else(|_| "info,sqlx=warn".to_owned());
    let filter: Targets = wanted
        .parse()
        .with_context(|| format!("ARMY_LOG={wanted}: a level is wanted, or PART=LEVEL,…"))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .init();
    Ok(())
}

/// Raises the limit of open files to its maximum. Each VM and each connection takes some, and the
/// usual limit (1,024) is for programs that call select(2).
fn raise_open_files() -> rustix::io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)
}

/// Locks the state directory: two servers with the same state would undo each other's work.
fn only_one(state: &Path) -> Result<std::fs::File> {
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

pub(super) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))
}

/// The database at `url`, or in `state`.
pub(super) async fn database(url: Option<&str>, state: &Path) -> Result<Database> {
    let url = match url {
        Some(url) => url.to_owned(),
        None => Database::sqlite_url(&state.join("army.db")),
    };
    Ok(Database::open(&url).await?)
}

/// The layers that the jail of VMs must have.
#[derive(clap::Args)]
pub(super) struct JailArgs {
    /// Serve even if this host cannot provide every layer of the jail around VMs. `army host ls`
    /// shows the missing layers.
    #[arg(
        long,
        env = "ARMY_ALLOW_WEAK_JAIL",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    allow_weak_jail: bool,
}

impl JailArgs {
    fn required(&self) -> RequiredJail {
        match self.allow_weak_jail {
            true => RequiredJail::default(),
            false => RequiredJail::complete(),
        }
    }
}

/// Limits of placement.
#[derive(clap::Args)]
pub(super) struct LimitArgs {
    /// Place VMs on a host only while the memory sizes of all its VMs together are at most FACTOR
    /// times the host's memory. Without it, the memory that VMs use counts, and not their size:
    /// clones share most of it, so a host can be promised many times over.
    #[arg(long, value_name = "FACTOR", env = "ARMY_MEMORY_PROMISE", value_parser = factor)]
    memory_promise: Option<f64>,
}

impl LimitArgs {
    pub(super) fn limits(&self) -> Limits {
        Limits {
            memory_promise: self.memory_promise,
        }
    }
}

/// Reads a factor above 0.
fn factor(text: &str) -> Result<f64, String> {
    let factor: f64 = text
        .parse()
        .map_err(|_| "write it as a number, as in 4.5")?;
    match factor.is_finite() && factor > 0.0 {
        true => Ok(factor),
        false => Err("it must be more than 0".to_owned()),
    }
}

/// Opens the node of this host, and starts to supervise its VMs.
pub(super) async fn node(name: String, state: &Path, jail: &JailArgs) -> Result<Arc<Node>> {
    let journal = state.join("vms");
    let runtime = clone_host::runtime::Runtime::from_env()?.requiring(jail.required());
    let templates = clone_template::Store::from_env()?;
    let open = move || Node::open(name, journal, runtime, templates);
    let node = tokio::task::spawn_blocking(open).await??;
    let checked = Arc::clone(&node);
    tokio::task::spawn_blocking(move || checked.check_jail())
        .await?
        .map_err(|error| {
            anyhow::anyhow!(
                "{}; provide it, or serve with --allow-weak-jail",
                error.message
            )
        })?;
    node.supervise().context("cannot supervise VMs")?;
    Ok(node)
}

/// How long records are kept.
#[derive(clap::Args)]
pub(super) struct RecordArgs {
    /// The number of days for which the record of a VM that has ended is kept. Its environment
    /// variables are removed at once.
    #[arg(
        long,
        value_name = "DAYS",
        default_value_t = DEFAULT_KEPT.as_secs() / DAY_S,
        value_parser = clap::value_parser!(u64).range(0..=36_500),
        env = "ARMY_KEEP_ENDED"
    )]
    keep_ended: u64,
}

impl RecordArgs {
    pub(super) fn keep_ended(&self) -> Duration {
        Duration::from_secs(self.keep_ended * DAY_S)
    }
}

/// Whether and how connections of clients are encrypted.
#[derive(clap::Args)]
pub(super) struct TlsArgs {
    /// Serve clients over TLS, with the certificate chain in this PEM file. It is reloaded when it
    /// changes.
    #[arg(long, value_name = "FILE", env = "ARMY_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, a PEM file.
    #[arg(long, value_name = "FILE", env = "ARMY_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// The listener for clients.
pub(super) struct ApiListener {
    listener: TcpListener,
    tls: Option<ServerConfig>,
}

impl ApiListener {
    pub(super) async fn open(address: SocketAddr, args: TlsArgs) -> Result<Self> {
        let tls = match (args.tls_cert, args.tls_key) {
            (Some(certificate), Some(key)) => Some(tls::config(Files { certificate, key })?),
            // Each of the two requires the other.
            _ => None,
        };
        let listener = listen(address).await?;
        Ok(Self { listener, tls })
    }

    fn url(&self) -> Result<String> {
        let scheme = match self.tls {
            Some(_) => "https",
            None => "http",
        };
        Ok(format!("{scheme}://{}", self.listener.local_addr()?))
    }

    async fn serve(self, router: axum::Router) -> std::io::Result<()> {
        match self.tls {
            None => axum::serve(self.listener, router).await,
            Some(config) => {
                let listener = Listener::of(self.listener, config);
                let listener = listener.map_err(std::io::Error::other)?;
                axum::serve(listener, router).await
            }
        }
    }
}

/// The seconds of a day.
const DAY_S: u64 = 24 * 3600;
/// How long the announcement of the server waits for the first reports of hosts.
const FIRST_REPORTS: Duration = Duration::from_secs(3);

/// Serves the API until a signal ends the process. It is served before hosts have reported, one of
/// which may not answer. A loop that ends, which it never should, ends the process with an error.
pub(super) async fn api(
    controller: Controller,
    listener: ApiListener,
    beside: impl FnOnce(&Arc<Controller>) -> Result<tokio::task::JoinHandle<()>>,
) -> Result<()> {
    let controller = Arc::new(controller);
    let mut beside = beside(&controller)?;
    let url = listener.url()?;
    first_key(&controller, &url).await?;
    let mut reconcile = {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move {
            controller.recover().await?;
            Err::<(), _>(controller.reconcile().await)
        })
    };
    let mut term = tokio::spawn(Arc::clone(&controller).hold_term());
    let announced = announce(&controller, url);
    let serve = listener.serve(server::router(Arc::clone(&controller)));
    let serve = async { tokio::join!(announced, serve).1 };
    let served = tokio::select! {
        served = until_asked(serve) => served,
        ended = &mut reconcile => Err(loop_ended("reconcile", ended.map(|it| it.map_err(Into::into)))),
        ended = &mut term => Err(loop_ended("term", ended.map(|error| Err(error.into())))),
        ended = &mut beside => Err(loop_ended("cluster", ended.map(Ok))),
    };
    reconcile.abort();
    beside.abort();
    term.abort();
    if served.is_ok() {
        // Otherwise others wait until the lease has run out.
        if let Err(error) = controller.end_term().await {
            tracing::warn!(%error, "cannot give back the lease of this controller");
        }
    }
    served
}

/// The error that a loop has ended.
fn loop_ended(name: &str, ended: Result<Result<()>, tokio::task::JoinError>) -> anyhow::Error {
    match ended {
        Ok(Ok(())) => anyhow::anyhow!("the loop `{name}` has ended"),
        Ok(Err(error)) => error.context(format!("the loop `{name}` has failed")),
        Err(error) => anyhow::anyhow!("the loop `{name}` has failed: {error}"),
    }
}

/// Says where the server answers, once it has heard of its hosts or has waited some time for them.
async fn announce(controller: &Controller, url: String) {
    let heard = async {
        while controller.unready().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // Requests are served meanwhile.
    let _ = tokio::time::timeout(FIRST_REPORTS, heard).await;
    output::print(&format!(
        "Army answers at {url}; the dashboard is there, too."
    ));
}

/// Creates and prints an administrator's key where there is no key yet.
async fn first_key(controller: &Controller, url: &str) -> Result<()> {
    if controller.has_keys().await? {
        return Ok(());
    }
    let admin = CreateKey {
        tenant: "default".into(),
        role: Role::Admin,
        max_vms: None,
    };
    let key = controller.create_key(&admin).await?;
    output::print(&format!(
        "This key is not shown again:\n\n    export ARMY_URL={url} ARMY_KEY={}\n",
        key.secret
    ));
    Ok(())
}

/// Serves until SIGTERM or SIGINT. Requests that are in progress are dropped with their connections;
/// what they began is in the journal.
pub(super) async fn until_asked(serve: impl Future<Output = std::io::Result<()>>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        served = serve => served?,
        _ = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    Ok(())
}

/// The name of this host.
pub(super) fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    match army_node_api::cluster::is_host_name(&name) {
        true => name,
        false => "host".into(),
    }
}
