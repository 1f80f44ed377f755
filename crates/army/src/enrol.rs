//! How a host becomes one of ours: it shows a token, and gets a certificate.
//!
//! The token also holds the hash of the authority's certificate, so a host does not tell its token
//! to anybody but the controller that made it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use army_api::{Problem, ProblemKind};
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use army_controller::Controller;
use army_node_api::cluster::authority::{Authority, Credentials};
use army_node_api::cluster::tls::{self, Peer};
use army_node_api::cluster::token::Token;
use army_node_api::cluster::{Member, internal, is_host_name};
use army_node_api::{Failure, Result, remote};

/// The largest body of a request.
const MAX_BODY: usize = 64 << 10;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
struct Enrol {
    secret: String,
    host: String,
    /// Where the node listens; the IP address that it is seen with where this one is unspecified.
    address: SocketAddr,
    /// In PEM.
    request: String,
}

#[derive(Serialize, Deserialize)]
struct Enrolled {
    authority: String,
    certificate: String,
}

/// What enrolling needs.
#[derive(Clone)]
struct Desk {
    controller: Arc<Controller>,
    authority: Arc<Authority>,
}

/// What the controller serves to hosts.
pub fn router(controller: Arc<Controller>, authority: Arc<Authority>) -> Router {
    let desk = Desk {
        controller,
        authority,
    };
    Router::new()
        .route("/v1/enrol", post(enrol))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(desk)
}

async fn enrol(
    State(desk): State<Desk>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(asked): Json<Enrol>,
) -> std::result::Result<Json<Enrolled>, Failure> {
    if !is_host_name(&asked.host) {
        let detail = format!("invalid host name `{}`", asked.host.escape_debug());
        let problem = Problem::new(ProblemKind::InvalidRequest, detail);
        return Err(problem
            .advise("use small letters, digits and `-`, at most 63: --name")
            .into());
    }
    let mut address = asked.address;
    if address.ip().is_unspecified() {
        address.set_ip(peer.address.ip().to_canonical());
    }
    // Before the token is used up.
    let certificate = desk
        .authority
        .sign(&Member::Node(asked.host.clone()), &asked.request)?;
    desk.controller
        .store
        .enrol_host(&asked.host, &address.to_string(), &asked.secret)
        .await?;
    desk.controller.connect(&asked.host, address)?;
    Ok(Json(Enrolled {
        authority: desk.authority.certificate().to_owned(),
        certificate,
    }))
}

/// Asks the controller for a certificate for the node of `host`, which listens at `address`.
pub async fn join(
    controller: SocketAddr,
    token: &Token,
    host: &str,
    address: SocketAddr,
) -> Result<Credentials> {
    let name = Member::Controller.dns_name();
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls::stranger(&token.fingerprint)?)
        .resolve(&name, controller)
        .connect_timeout(CONNECT_LIMIT)
        .timeout(LIMIT)
        .no_proxy()
        .build()
        .map_err(|error| internal("set up a client", &error))?;
    let (key, request) = Credentials::request()?;
    let asked = Enrol {
        secret: token.secret.clone(),
        host: host.to_owned(),
        address,
        request,
    };
    let unreachable = |error: reqwest::Error| {
        let detail = format!("cannot join at {controller}: {}", remote::whole(&error));
        Problem::new(ProblemKind::HostUnavailable, detail)
            .advise("the address is that of --cluster-listen, and the token is used once")
    };
    let url = format!("https://{name}:{}/v1/enrol", controller.port());
    let answer = client
        .post(url)
        .json(&asked)
        .send()
        .await
        .map_err(unreachable)?;
    if !answer.status().is_success() {
        return Err(remote::problem_of(answer).await);
    }
    let enrolled: Enrolled = answer.json().await.map_err(unreachable)?;
    let known = tls::fingerprint(&tls::certificate(&enrolled.authority)?);
    if known != token.fingerprint {
        let detail = "the controller named another authority than the token";
        return Err(Problem::new(ProblemKind::HostUnavailable, detail));
    }
    Ok(Credentials {
        authority: enrolled.authority,
        certificate: enrolled.certificate,
        key,
    })
}
