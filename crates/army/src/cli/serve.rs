//! What the servers of this program have in common: their log, their state directory, and their end.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use army_api::keys::{CreateKey, Role};
use clone_api::jail::RequiredJail;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::{open_files, output};
use crate::server::tls::{self, Files};
use crate::server::{self, BufferLimits, Doors, SessionLimits};
use crate::webhooks::HttpSender;
use army_controller::{Controller, DEFAULT_KEPT, Database};
use army_node::Node;
use army_node_api::serve::{Limits, Server, Stop};

/// Starts the log, and creates and locks the state directory. It is locked while the returned file is
/// open.
pub(super) fn begin(state: &Path) -> Result<std::fs::File> {
    start_log()?;
    open_files::raise_limit().context("cannot raise the limit of open files")?;
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
pub(super) struct PlacementArgs {
    /// Place VMs on a host only while the memory sizes of all its VMs together are at most FACTOR
    /// times the host's memory. Without it, the memory that VMs use counts, and not their size:
    /// clones share most of it, so a host can be promised many times over.
    #[arg(long, value_name = "FACTOR", env = "ARMY_MEMORY_PROMISE", value_parser = factor)]
    memory_promise: Option<f64>,
}

impl PlacementArgs {
    pub(super) fn limits(&self) -> army_controller::Limits {
        army_controller::Limits {
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
    /// Serve clients without TLS even if the address to listen on is not a loopback address, because
    /// something else encrypts the connections, such as a private network. Otherwise everybody on
    /// the way can read keys.
    #[arg(
        long,
        env = "ARMY_SERVE_PLAIN_HTTP",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    serve_plain_http: bool,
}

/// What clients may have at a time. A request beyond a limit is refused with status 429, and the
/// metrics show all limits.
#[derive(clap::Args)]
pub(super) struct LimitArgs {
    /// The most connections of clients.
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::STRANGERS.connections)]
    max_connections: usize,
    /// The most connections of clients from one address.
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::STRANGERS.per_address)]
    max_connections_per_address: usize,
    /// The most connections to guests: commands, terminals, ports and files that are open.
    #[arg(long, value_name = "NUMBER", default_value_t = SessionLimits::default().total)]
    max_sessions: usize,
    /// The most connections to one VM.
    #[arg(long, value_name = "NUMBER", default_value_t = SessionLimits::default().per_vm)]
    max_sessions_per_vm: usize,
    /// The most connections to guests with one key.
    #[arg(long, value_name = "NUMBER", default_value_t = SessionLimits::default().per_key)]
    max_sessions_per_key: usize,
    /// The most connections to guests of one tenant.
    #[arg(long, value_name = "NUMBER", default_value_t = SessionLimits::default().per_tenant)]
    max_sessions_per_tenant: usize,
    /// The most memory for output of guests that waits for its readers, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = BufferLimits::default().total >> 20)]
    max_buffers: usize,
    /// The same for one tenant, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = BufferLimits::default().per_tenant >> 20)]
    max_buffers_per_tenant: usize,
}

/// The server for clients.
pub(super) struct Api {
    server: Server,
    doors: Doors,
    stop: Stop,
}

impl Api {
    pub(super) async fn open(address: SocketAddr, tls: TlsArgs, limits: LimitArgs) -> Result<Self> {
        let config = match (tls.tls_cert, tls.tls_key) {
            (Some(certificate), Some(key)) => Some(tls::config(Files { certificate, key })?),
            // Each of the two requires the other.
            _ => None,
        };
        anyhow::ensure!(
            config.is_some() || tls.serve_plain_http || address.ip().is_loopback(),
            "--listen {address} would serve plain HTTP to other hosts: give --tls-cert and \
             --tls-key, or listen on 127.0.0.1 behind a proxy, or give --serve-plain-http"
        );
        open_files::check_limit(limits.max_connections, limits.max_sessions);
        let connections = Limits {
            connections: limits.max_connections,
            per_address: limits.max_connections_per_address,
            ..Limits::STRANGERS
        };
        let server = Server::new(listen(address).await?, config, connections);
        let stop = Stop::default();
        let doors = Doors {
            sessions: SessionLimits {
                per_vm: limits.max_sessions_per_vm,
                per_key: limits.max_sessions_per_key,
                per_tenant: limits.max_sessions_per_tenant,
                total: limits.max_sessions,
            },
            buffers: BufferLimits {
                per_tenant: limits.max_buffers_per_tenant << 20,
                total: limits.max_buffers << 20,
            },
            connections: Some(server.connections()),
            ..Doors::new(stop.stopping())
        };
        Ok(Self {
            server,
            doors,
            stop,
        })
    }

    fn url(&self) -> Result<String> {
        let scheme = match self.server.has_tls() {
            true => "https",
            false => "http",
        };
        Ok(format!("{scheme}://{}", self.server.local_addr()?))
    }
}

/// The seconds of a day.
const DAY_S: u64 = 24 * 3600;
/// How long the announcement of the server waits for the first reports of hosts.
const FIRST_REPORTS: Duration = Duration::from_secs(3);

/// Serves the API until a signal ends the process. It is served before hosts have reported, one of
/// which may not answer. A loop that ends, which it never should, ends the process with an error.
///
/// At the end, requests that are in progress may finish for some seconds. What those that are cut
/// off began is in the journal.
pub(super) async fn api(
    controller: Controller,
    api: Api,
    beside: impl FnOnce(&Arc<Controller>) -> Result<tokio::task::JoinHandle<()>>,
) -> Result<()> {
    let controller = Arc::new(controller);
    let mut beside = beside(&controller)?;
    let url = api.url()?;
    first_key(&controller, &url).await?;
    let mut reconcile = {
        let controller = Arc::clone(&controller);
        tokio::spawn(async move {
            controller.recover().await?;
            Err::<(), _>(controller.reconcile().await)
        })
    };
    let mut term = tokio::spawn(Arc::clone(&controller).hold_term());
    let sender = HttpSender::new().context("cannot set up HTTP for webhooks")?;
    let mut webhooks = tokio::spawn(Arc::clone(&controller).deliver_webhooks(Arc::new(sender)));
    let announced = async {
        announce(&controller, url).await;
        std::future::pending().await
    };
    let router = server::router_with(Arc::clone(&controller), api.doors);
    let mut serve = std::pin::pin!(api.server.serve(router, api.stop.stopping()));
    let served = tokio::select! {
        asked = asked_to_end() => asked,
        () = &mut serve => Ok(()),
        () = announced => Ok(()),
        ended = &mut reconcile => Err(loop_ended("reconcile", ended.map(|it| it.map_err(Into::into)))),
        ended = &mut term => Err(loop_ended("term", ended.map(|error| Err(error.into())))),
        ended = &mut beside => Err(loop_ended("cluster", ended.map(Ok))),
        ended = &mut webhooks => Err(loop_ended("webhooks", ended.map(Ok))),
    };
    if served.is_ok() {
        api.stop.begin();
        serve.await;
    }
    reconcile.abort();
    beside.abort();
    webhooks.abort();
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
    let admin = CreateKey::new("default", Role::Admin);
    let key = controller.create_key(&admin).await?;
    output::print(&format!(
        "This key is not shown again:\n\n    export ARMY_URL={url} ARMY_KEY={}\n",
        key.secret
    ));
    Ok(())
}

/// Serves until a signal ends the process. Requests that are in progress may then finish for some
/// seconds; what those that are cut off began is in the journal.
pub(super) async fn until_asked(server: Server, router: axum::Router) -> Result<()> {
    let stop = Stop::default();
    let mut serve = std::pin::pin!(server.serve(router, stop.stopping()));
    tokio::select! {
        asked = asked_to_end() => asked?,
        () = &mut serve => {}
    }
    stop.begin();
    serve.await;
    Ok(())
}

/// Completes with SIGTERM or SIGINT.
async fn asked_to_end() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Args {
        #[command(flatten)]
        tls: TlsArgs,
        #[command(flatten)]
        limits: LimitArgs,
    }

    async fn open(address: &str, args: &[&str]) -> Result<Api> {
        let args = Args::parse_from([&["army"], args].concat());
        Api::open(address.parse()?, args.tls, args.limits).await
    }

    #[tokio::test]
    async fn plain_http_is_served_to_other_hosts_only_by_name() {
        open("127.0.0.1:0", &[]).await.unwrap();
        let refused = open("0.0.0.0:0", &[]).await.map(drop).unwrap_err();
        assert!(
            refused.to_string().contains("--serve-plain-http"),
            "{refused}"
        );
        open("0.0.0.0:0", &["--serve-plain-http"]).await.unwrap();
    }

    #[tokio::test]
    async fn limits_are_what_the_flags_say() {
        let args = ["--max-sessions", "7", "--max-buffers-per-tenant", "3"];
        let api = open("127.0.0.1:0", &args).await.unwrap();
        assert_eq!(api.doors.sessions.total, 7);
        assert_eq!(api.doors.buffers.per_tenant, 3 << 20);
    }
}
