//! `army controller`: the API of several hosts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::serve;
use crate::enrol;
use army_controller::{Cluster, Controller};
use army_node_api::cluster::Member;
use army_node_api::cluster::authority::Authority;
use army_node_api::cluster::tls::{self, Identity};
use army_node_api::serve::{Limits, Server, Stop};

/// The limits of connections of hosts that join, each of which makes a request or two.
const JOINING: Limits = Limits {
    connections: 4096,
    per_address: 256,
    ..Limits::STRANGERS
};

/// Serve the API and the dashboard of several hosts, each of which runs `army node`.
///
/// The first start prints an administrator's key, once, and creates the certificate authority for
/// hosts; `army host token` makes the token that a host joins with. VMs keep running when this
/// server ends.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The address to listen on for clients. An address that is not a loopback
    /// address requires --tls-cert, or --serve-plain-http.
    #[arg(long, default_value = "127.0.0.1:7777", env = "ARMY_LISTEN")]
    listen: SocketAddr,
    #[command(flatten)]
    tls: serve::TlsArgs,
    #[command(flatten)]
    limits: serve::LimitArgs,
    /// The address to listen on for hosts that join, always with TLS.
    #[arg(long, default_value = "0.0.0.0:7778", env = "ARMY_CLUSTER_LISTEN")]
    cluster_listen: SocketAddr,
    /// The directory for persistent data, including the authority's key.
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
    #[command(flatten)]
    placement: serve::PlacementArgs,
}

pub(super) async fn run(args: Args) -> Result<ExitCode> {
    let _lock = serve::begin(&args.state)?;
    let api = serve::Api::open(args.listen, args.tls, args.limits).await?;
    let joining = serve::listen(args.cluster_listen).await?;
    let database = serve::database(args.database.as_deref(), &args.state).await?;
    let authority = Authority::open(&args.state)?;
    let certificate = CertificateDer::from_pem_slice(authority.certificate().as_bytes())?;
    let identity = Identity::new(&authority.credentials(&Member::Controller)?)?;
    let cluster = Cluster {
        tls: identity.client()?,
        fingerprint: tls::fingerprint(&certificate),
    };
    let controller = Controller::of_cluster(database, cluster)
        .await?
        .with_limits(args.placement.limits())
        .keeping_ended_vms(args.records.keep_ended());
    // Hosts that join have no certificate yet.
    let joining = Server::new(joining, Some(identity.server(true)?), JOINING);
    let enrol = move |controller: &Arc<Controller>| {
        let authority = Arc::new(authority);
        let router = enrol::router(Arc::clone(controller), Arc::clone(&authority));
        let renewal = Arc::clone(controller).renew_certificates(authority);
        // Neither ends; if one did, the process would.
        Ok(tokio::spawn(async move {
            tokio::select! {
                () = renewal => {}
                () = joining.serve(router, Stop::default().stopping()) => {}
            }
        }))
    };
    serve::api(controller, api, enrol).await?;
    Ok(ExitCode::SUCCESS)
}
