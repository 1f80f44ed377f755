//! How a host joins a cluster, on both sides: it shows a token, and gets a certificate.
//!
//! The token also has the fingerprint of the cluster's certificate authority, so a host shows its
//! token only to the controller that created it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use army_api::{Problem, ProblemKind};
use army_controller::Controller;
use army_node_api::cluster::authority::{Authority, Credentials};
use army_node_api::cluster::tls::{self, Peer};
use army_node_api::cluster::token::Token;
use army_node_api::cluster::{Member, is_host_name};
use army_node_api::remote;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use crate::server::Failure;

/// The path of the request. Its version changes when hosts of other releases cannot join any more.
const PATH: &str = "/v1/enrol";
/// The largest body of a request.
const MAX_BODY: usize = 64 << 10;
/// The longest time that connecting with the controller may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The longest time that joining may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A host's request to join.
#[derive(Serialize, Deserialize)]
struct EnrolRequest {
    /// The secret of the token.
    secret: String,
    /// The name of the host.
    host: String,
    /// The address where the node listens. An unspecified IP address stands for the one that the
    /// controller sees.
    address: SocketAddr,
    /// A certificate signing request in PEM.
    request: String,
}

/// What a host that has joined gets.
#[derive(Serialize, Deserialize)]
struct EnrolResponse {
    /// The certificate of the authority in PEM.
    authority: String,
    /// The host's own certificate in PEM.
    certificate: String,
}

/// What serving such requests needs.
#[derive(Clone)]
struct Enrolment {
    controller: Arc<Controller>,
    authority: Arc<Authority>,
}

/// The controller's routes for hosts that join. The service that is made of it must provide the
/// [`Peer`] of each connection.
pub fn router(controller: Arc<Controller>, authority: Arc<Authority>) -> Router {
    let enrolment = Enrolment {
        controller,
        authority,
    };
    Router::new()
        .route(PATH, post(enrol))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(enrolment)
}

async fn enrol(
    State(enrolment): State<Enrolment>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(request): Json<EnrolRequest>,
) -> Result<Json<EnrolResponse>, Failure> {
    let Enrolment {
        controller,
        authority,
    } = enrolment;
    if !is_host_name(&request.host) {
        let detail = format!("invalid host name `{}`", request.host.escape_debug());
        let problem = Problem::new(ProblemKind::InvalidRequest, detail);
        return Err(problem
            .advise("use small letters, digits and `-`, at most 63: --name")
            .into());
    }
    let mut address = request.address;
    if address.ip().is_unspecified() {
        address.set_ip(peer.address.ip().to_canonical());
    }
    // An invalid signing request does not use up the token.
    let member = Member::Node(request.host.clone());
    let certificate = authority.sign(&member, &request.request)?;
    controller
        .enrol_host(&request.host, address, &request.secret)
        .await?;
    Ok(Json(EnrolResponse {
        authority: authority.certificate().to_owned(),
        certificate,
    }))
}

/// Has the node of `host`, which listens at `address`, join the cluster of `controller`.
///
/// # Errors
/// The controller's refusal, or [`ProblemKind::HostUnavailable`] where it cannot be reached, or is
/// not the one that created the token.
pub async fn join(
    controller: SocketAddr,
    token: &Token,
    host: &str,
    address: SocketAddr,
) -> Result<Credentials, Problem> {
    let local = |error: army_node_api::Error| Failure::from(error).0;
    let name = Member::Controller.dns_name();
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls::stranger(&token.fingerprint).map_err(local)?)
        .resolve(&name, controller)
        .connect_timeout(CONNECT_LIMIT)
        .timeout(LIMIT)
        .no_proxy()
        .build()
        .map_err(|error| {
            let detail = format!("cannot set up a client: {error}");
            Problem::new(ProblemKind::Internal, detail)
        })?;
    let (key, request) = Credentials::request().map_err(local)?;
    let request = EnrolRequest {
        secret: token.secret.clone(),
        host: host.to_owned(),
        address,
        request,
    };
    let unreachable = |error: reqwest::Error| {
        let detail = format!("cannot join at {controller}: {}", remote::causes(&error));
        Problem::new(ProblemKind::HostUnavailable, detail)
            .advise("the address is that of --cluster-listen, and the token is used once")
    };
    let url = format!("https://{name}:{}{PATH}", controller.port());
    let response = client
        .post(url)
        .json(&request)
        .send()
        .await
        .map_err(unreachable)?;
    let status = response.status();
    if !status.is_success() {
        return Err(response.json().await.unwrap_or_else(|_| {
            let detail = format!("the response has status {status} and no problem document");
            Problem::new(ProblemKind::HostUnavailable, detail)
        }));
    }
    let enrolled: EnrolResponse = response.json().await.map_err(unreachable)?;
    let authority = tls::certificate(&enrolled.authority).map_err(local)?;
    if tls::fingerprint(&authority) != token.fingerprint {
        let detail = "the controller named another authority than the token";
        return Err(Problem::new(ProblemKind::HostUnavailable, detail));
    }
    Ok(Credentials {
        authority: enrolled.authority,
        certificate: enrolled.certificate,
        key,
    })
}
