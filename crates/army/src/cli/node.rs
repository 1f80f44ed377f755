//! `army node`: the VMs of one host, for a controller elsewhere.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{output, serve};
use crate::cluster::authority::{Credentials, write_private};
use crate::cluster::enrol::{self, Token};
use crate::cluster::tls::{self, Listener, Peer};
use crate::node;

/// What a node remembers of having joined.
const MEMBERSHIP: &str = "membership.json";

/// Run this host's VMs for a controller.
///
/// The first start joins, with a token of `army host token`; later ones need neither token nor
/// controller. VMs go on when the node ends, and are its own again when it comes back.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Where the controller listens for hosts: its --cluster-listen.
    #[arg(long, value_name = "ADDRESS:PORT", env = "ARMY_CONTROLLER")]
    controller: Option<SocketAddr>,
    /// What to join with. It works once.
    #[arg(long, env = "ARMY_TOKEN", hide_env_values = true)]
    token: Option<Token>,
    /// What the host is called: small letters, digits and `-`.
    #[arg(long)]
    name: Option<String>,
    /// Where to listen for the controller and other nodes. Always mutual TLS.
    #[arg(long, default_value = "0.0.0.0:7779", env = "ARMY_NODE_LISTEN")]
    listen: SocketAddr,
    /// Where they reach this node, told once, when it joins; by default the address that the
    /// controller sees, and the port of --listen.
    #[arg(long)]
    advertise: Option<SocketAddr>,
    /// Where everything is kept that is to outlive the node.
    #[arg(long, default_value = "/var/lib/army-node", env = "ARMY_STATE")]
    state: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Membership {
    version: u32,
    host: String,
    credentials: Credentials,
}

pub(super) async fn run(args: Args) -> Result<ExitCode> {
    let _lock = serve::begin(&args.state)?;
    let listener = serve::listen(args.listen).await?;
    let address = listener.local_addr()?;
    let member = membership(&args, args.advertise.unwrap_or(address)).await?;
    let node = serve::node(member.host.clone(), &args.state).await?;
    let tls = tls::client(&member.credentials)?;
    let listener = Listener::new(listener, &member.credentials, false)?;
    output::print(&format!(
        "The node of {} listens on {address}.",
        member.host
    ));
    let service = node::serve::router(node, tls).into_make_service_with_connect_info::<Peer>();
    serve::until_asked(axum::serve(listener, service).into_future()).await?;
    Ok(ExitCode::SUCCESS)
}

/// What we are: remembered, or new.
async fn membership(args: &Args, address: SocketAddr) -> Result<Membership> {
    let path = args.state.join(MEMBERSHIP);
    if let Some(known) = remembered(&path)? {
        if args.name.as_ref().is_some_and(|name| *name != known.host) {
            anyhow::bail!(
                "this node joined as {}: remove {} to join anew",
                known.host,
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
    let member = Membership {
        version: 1,
        credentials: enrol::join(controller, token, &host, address).await?,
        host,
    };
    write_private(&path, &serde_json::to_string(&member)?)?;
    Ok(member)
}

fn remembered(path: &Path) -> Result<Option<Membership>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let member: Membership = serde_json::from_str(&text)
        .with_context(|| format!("cannot understand {}", path.display()))?;
    if member.version != 1 {
        anyhow::bail!("{} is of another version", path.display());
    }
    Ok(Some(member))
}
