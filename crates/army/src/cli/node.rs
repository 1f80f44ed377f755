//! `army node`: the VMs of one host, for a controller elsewhere.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;

use super::{output, serve};
use crate::enrol;
use army_node::NodeService;
use army_node::membership::Membership;
use army_node_api::cluster::tls::{Listener, Peer};
use army_node_api::cluster::token::Token;

/// The file of the node's membership, in the state directory.
const MEMBERSHIP: &str = "membership.json";

/// Run this host's VMs for a controller.
///
/// The first start joins the cluster, with a token from `army host token`; later starts need
/// neither --token nor --controller. VMs keep running when the node ends, and the node manages them
/// again when it is back.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The address where the controller listens for hosts (its --cluster-listen).
    #[arg(long, value_name = "ADDRESS:PORT", env = "ARMY_CONTROLLER")]
    controller: Option<SocketAddr>,
    /// The token to join with. It works once.
    #[arg(long, env = "ARMY_TOKEN", hide_env_values = true)]
    token: Option<Token>,
    /// The name of the host: lower-case letters, digits and `-`.
    #[arg(long)]
    name: Option<String>,
    /// The address to listen on for the controller and other nodes, always with mutual TLS.
    #[arg(long, default_value = "0.0.0.0:7779", env = "ARMY_NODE_LISTEN")]
    listen: SocketAddr,
    /// The address where they reach this node, registered when it joins; by default the address
    /// that the controller sees, and the port of --listen.
    #[arg(long)]
    advertise: Option<SocketAddr>,
    /// The directory for persistent data.
    #[arg(long, default_value = "/var/lib/army-node", env = "ARMY_STATE")]
    state: PathBuf,
    #[command(flatten)]
    jail: serve::JailArgs,
}

pub(super) async fn run(args: Args) -> Result<ExitCode> {
    let _lock = serve::begin(&args.state)?;
    let listener = serve::listen(args.listen).await?;
    let address = listener.local_addr()?;
    let member = membership(&args, args.advertise.unwrap_or(address)).await?;
    let node = serve::node(member.host().to_owned(), &args.state, &args.jail).await?;
    let listener = Listener::new(listener, member.identity(), false)?;
    output::print(&format!(
        "The node of {} listens on {address}.",
        member.host()
    ));
    let service = NodeService::in_cluster(node, Arc::new(member))?;
    let router = army_node_api::router::router(Arc::new(service));
    let service = router.into_make_service_with_connect_info::<Peer>();
    serve::until_asked(axum::serve(listener, service).into_future()).await?;
    Ok(ExitCode::SUCCESS)
}

/// The membership that is in the state directory, or a new one.
async fn membership(args: &Args, address: SocketAddr) -> Result<Membership> {
    let path = args.state.join(MEMBERSHIP);
    if let Some(known) = Membership::open(path.clone())? {
        if args.name.as_ref().is_some_and(|name| name != known.host()) {
            anyhow::bail!(
                "this node joined as {}: remove {} to join again",
                known.host(),
                path.display()
            );
        }
        return Ok(known);
    }
    let (Some(controller), Some(token)) = (args.controller, &args.token) else {
        anyhow::bail!(
            "this host has not joined yet: give --controller ADDRESS:PORT and --token, which `army host token` makes"
        );
    };
    let host = args.name.clone().unwrap_or_else(serve::host_name);
    let credentials = enrol::join(controller, token, &host, address).await?;
    Ok(Membership::join(path, host, credentials)?)
}
