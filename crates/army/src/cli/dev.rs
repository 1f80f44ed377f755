//! `army dev`: everything on this host.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;

use super::serve;
use army_controller::Controller;
use army_node::NodeService;

/// Serve everything on this host: API, dashboard, store and VMs.
///
/// The first start prints an administrator's key, once. VMs keep running when the server ends, and
/// the server manages them again when it is back.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The address to listen on. An address that is not a loopback address requires
    /// --tls-cert, or --serve-plain-http.
    #[arg(long, default_value = "127.0.0.1:7777", env = "ARMY_LISTEN")]
    listen: SocketAddr,
    #[command(flatten)]
    tls: serve::TlsArgs,
    #[command(flatten)]
    limits: serve::LimitArgs,
    /// The directory for persistent data.
    #[arg(long, default_value = "/var/lib/army", env = "ARMY_STATE")]
    state: PathBuf,
    /// The database for requests, keys and VMs: postgres://…; an SQLite file in --state by default.
    #[arg(
        long,
        value_name = "URL",
        env = "ARMY_DATABASE",
        hide_env_values = true
    )]
    database: Option<String>,
    #[command(flatten)]
    records: serve::RecordArgs,
    /// The name of the host.
    #[arg(long)]
    host_name: Option<String>,
    #[command(flatten)]
    placement: serve::PlacementArgs,
    #[command(flatten)]
    jail: serve::JailArgs,
}

pub(super) async fn run(args: Args) -> Result<ExitCode> {
    let _lock = serve::begin(&args.state)?;
    // This comes first, so that a second server or a wrong address is reported before anything is
    // done.
    let api = serve::Api::open(args.listen, args.tls, args.limits).await?;
    let database = serve::database(args.database.as_deref(), &args.state).await?;
    let name = args.host_name.unwrap_or_else(serve::host_name);
    let node = serve::node(name, &args.state, &args.jail).await?;
    let controller = Controller::of_one_host(database, Arc::new(NodeService::in_process(node)))
        .with_limits(args.placement.limits())
        .keeping_ended_vms(args.records.keep_ended());
    let nothing = |_: &_| Ok(tokio::spawn(std::future::pending()));
    serve::api(controller, api, nothing).await?;
    Ok(ExitCode::SUCCESS)
}
