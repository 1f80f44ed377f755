//! `army node`: the VMs of one host, for a controller elsewhere.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::{output, serve};
use crate::enrol::{self, SigningRequest};
use army_node::NodeService;
use army_node::membership::Membership;
use army_node_api::cluster::authority;
use army_node_api::cluster::tls::Identity;
use army_node_api::cluster::token::Token;
use army_node_api::serve::{Limits, Server};

/// The file of the node's membership, in the state directory.
const MEMBERSHIP: &str = "membership.json";
/// The file of the signing request of a node that joins, until it has joined.
const JOINING: &str = "joining.json";
/// How often the controller is told where the node listens.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(60);
/// The pause after the controller could not be told.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Run this host's VMs for a controller.
///
/// The first start joins the cluster, with a token from `army host token`; later starts need
/// neither --token nor --controller. VMs keep running when the node ends, and the node manages them
/// again when it is back.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The address where the controller listens for hosts (its --cluster-listen). A node that has
    /// joined and is given it tells the controller when its own address changes.
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
    /// The address where they reach this node; by default the address that the controller sees, and
    /// the port of --listen.
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
    let present = args.advertise.unwrap_or(address);
    let member = membership(&args, present).await?;
    let identity = member.identity().clone();
    let node = serve::node(member.host().to_owned(), &args.state, &args.jail).await?;
    let tls = member.identity().server(false)?;
    let server = Server::new(listener, Some(tls), Limits::MEMBERS);
    output::print(&format!(
        "The node of {} listens on {address}.",
        member.host()
    ));
    let service = NodeService::in_cluster(node, Arc::new(member))?;
    let router = army_node_api::router::router(Arc::new(service));
    let announced = args
        .controller
        .map(|controller| tokio::spawn(announce(controller, identity, present)));
    let served = serve::until_asked(server, router).await;
    if let Some(announced) = announced {
        announced.abort();
    }
    served?;
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
    let pending = args.state.join(JOINING);
    let signing = signing_request(&pending)?;
    let credentials = enrol::join_with(controller, token, &host, address, signing).await?;
    let joined = Membership::join(path, host, credentials)?;
    let _ = std::fs::remove_file(pending);
    Ok(joined)
}

/// The signing request of an earlier attempt to join, whose answer may have been lost, or a new one.
fn signing_request(path: &Path) -> Result<SigningRequest> {
    if let Ok(text) = std::fs::read_to_string(path)
        && let Ok(known) = serde_json::from_str(&text)
    {
        return Ok(known);
    }
    let new = SigningRequest::generate()?;
    authority::write_private(path, &serde_json::to_string(&new)?)?;
    Ok(new)
}

/// Tells the controller where this node listens, at the start and from time to time: the address of
/// a host may change.
async fn announce(controller: SocketAddr, identity: Identity, address: SocketAddr) {
    loop {
        let pause = match enrol::announce(controller, &identity, address).await {
            Ok(()) => ANNOUNCE_EVERY,
            Err(error) => {
                tracing::warn!(%error, "cannot tell the controller where this node is");
                RETRY_AFTER
            }
        };
        tokio::time::sleep(pause).await;
    }
}
