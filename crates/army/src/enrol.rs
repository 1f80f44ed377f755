//! How a host joins a cluster, on both sides: it shows a token, and gets a certificate.
//!
//! A stranger's request is refused for its token before anything else of it is read. A host that has
//! lost the answer repeats its request, with the same key, and gets the same certificate. A host
//! that has joined tells its present address with its certificate.
//!
//! The token also has the fingerprint of the cluster's certificate authority, so a host shows its
//! token only to the controller that created it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use army_api::{Problem, ProblemKind};
use army_controller::{Controller, Joining};
use army_node_api::cluster::authority::{Authority, Credentials};
use army_node_api::cluster::tls::{self, Identity, Peer};
use army_node_api::cluster::token::Token;
use army_node_api::cluster::{Member, is_host_name};
use army_node_api::remote;
use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::routing::{post, put};
use axum::{Json, Router};
use reqwest::Response;
use reqwest::redirect::Policy;
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::server::Failure;

/// The path of the request. Its version changes when hosts of other releases cannot join any more.
const PATH: &str = "/v2/enrol";
/// The path where a host tells its present address.
const ADDRESS_PATH: &str = "/v2/address";
/// The number of requests of strangers that are looked at at a time.
const STRANGERS: usize = 8;
/// When a request that found too many others is worth repeating, in seconds.
const RETRY_S: u32 = 2;
/// How often a host repeats its request where the answer is lost.
const ATTEMPTS: u32 = 4;
/// The largest body of a request.
const MAX_BODY: usize = 64 << 10;
/// The longest time that connecting with the controller may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The longest time that joining may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A host's request to join. The secret of its token is in the header `Authorization: Bearer`.
#[derive(Serialize, Deserialize)]
struct EnrolRequest {
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

/// The present address of a host's node.
#[derive(Serialize, Deserialize)]
struct PresentAddress {
    /// The address where the node listens. An unspecified IP address stands for the one that the
    /// controller sees.
    address: SocketAddr,
}

/// A signing request, and the key that it is for. A host keeps it until it has joined.
#[derive(Clone, Serialize, Deserialize)]
pub struct SigningRequest {
    /// The private key in PEM.
    pub key: String,
    /// The signing request in PEM.
    pub request: String,
}

impl SigningRequest {
    /// A signing request for a new key.
    ///
    /// # Errors
    /// Where no key can be generated.
    pub fn generate() -> army_node_api::Result<Self> {
        let (key, request) = Credentials::request()?;
        Ok(Self { key, request })
    }
}

/// What serving such requests needs.
#[derive(Clone)]
struct Enrolment {
    controller: Arc<Controller>,
    authority: Arc<Authority>,
    strangers: Arc<Semaphore>,
}

/// The secret of a token that is known. It is checked before the body of the request is read.
struct KnownToken(String);

impl FromRequestParts<Enrolment> for KnownToken {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, enrolment: &Enrolment) -> Result<Self, Failure> {
        let Ok(_permit) = enrolment.strangers.try_acquire() else {
            let detail = "too many hosts try to join at the moment";
            let problem = Problem::new(ProblemKind::Busy, detail);
            return Err(problem.retry_after(RETRY_S).into());
        };
        let header = parts.headers.get(header::AUTHORIZATION);
        let secret = header
            .and_then(|it| it.to_str().ok()?.strip_prefix("Bearer "))
            .unwrap_or_default();
        enrolment.controller.check_join_token(secret).await?;
        Ok(Self(secret.to_owned()))
    }
}

/// The controller's routes for hosts that join. The service that is made of it must provide the
/// [`Peer`] of each connection.
pub fn router(controller: Arc<Controller>, authority: Arc<Authority>) -> Router {
    let enrolment = Enrolment {
        controller,
        authority,
        strangers: Arc::new(Semaphore::new(STRANGERS)),
    };
    Router::new()
        .route(PATH, post(enrol))
        .route(ADDRESS_PATH, put(tell_address))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(enrolment)
}

async fn enrol(
    State(enrolment): State<Enrolment>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    KnownToken(secret): KnownToken,
    Json(request): Json<EnrolRequest>,
) -> Result<Json<EnrolResponse>, Failure> {
    let Enrolment {
        controller,
        authority,
        ..
    } = enrolment;
    if !is_host_name(&request.host) {
        let detail = format!("invalid host name `{}`", request.host.escape_debug());
        let problem = Problem::new(ProblemKind::InvalidRequest, detail);
        return Err(problem
            .advise("use small letters, digits and `-`, at most 63: --name")
            .into());
    }
    // An invalid signing request does not use up the token.
    let member = Member::Node(request.host.clone());
    let certificate = authority.sign(&member, &request.request)?;
    let joining = Joining {
        host: &request.host,
        address: seen(request.address, &peer),
        secret: &secret,
        request: &request.request,
        certificate: &certificate,
    };
    let certificate = controller.enrol_host(&joining).await?;
    Ok(Json(EnrolResponse {
        authority: authority.certificate().to_owned(),
        certificate,
    }))
}

/// Records the present address of the host whose certificate the peer has.
async fn tell_address(
    State(enrolment): State<Enrolment>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(present): Json<PresentAddress>,
) -> Result<StatusCode, Failure> {
    let Some(Member::Node(host)) = &peer.member else {
        let detail = "only a host that has joined may tell its address";
        return Err(Problem::new(ProblemKind::Forbidden, detail).into());
    };
    let address = seen(present.address, &peer);
    enrolment.controller.move_host(host, address).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// An address with the IP address that the controller sees, where the host did not say.
fn seen(mut address: SocketAddr, peer: &Peer) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(peer.address.ip().to_canonical());
    }
    address
}

/// Tells the controller the present address of the node with this identity.
///
/// # Errors
/// The controller's refusal, or [`ProblemKind::HostUnavailable`] where it cannot be reached.
pub async fn announce(
    controller: SocketAddr,
    identity: &Identity,
    address: SocketAddr,
) -> Result<(), Problem> {
    let tls = identity.client().map_err(|error| Failure::from(error).0)?;
    let client = client(controller, tls)?;
    let request = client
        .put(url(controller, ADDRESS_PATH))
        .json(&PresentAddress { address });
    let response = request.send().await.map_err(|error| {
        let detail = format!("cannot reach {controller}: {}", remote::causes(&error));
        Problem::new(ProblemKind::HostUnavailable, detail)
    })?;
    refusal(response).await.map(drop)
}

fn url(controller: SocketAddr, path: &str) -> String {
    let name = Member::Controller.dns_name();
    format!("https://{name}:{}{path}", controller.port())
}

/// A client of the controller at this address, whose name is not looked up anywhere.
fn client(controller: SocketAddr, tls: ClientConfig) -> Result<reqwest::Client, Problem> {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .resolve(&Member::Controller.dns_name(), controller)
        .connect_timeout(CONNECT_LIMIT)
        .timeout(LIMIT)
        .no_proxy()
        .redirect(Policy::none())
        .build()
        .map_err(|error| {
            let detail = format!("cannot set up a client: {error}");
            Problem::new(ProblemKind::Internal, detail)
        })
}

/// A response that is a success; the problem of another one.
async fn refusal(response: Response) -> Result<Response, Problem> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    Err(response.json().await.unwrap_or_else(|_| {
        let detail = format!("the response has status {status} and no problem document");
        Problem::new(ProblemKind::HostUnavailable, detail)
    }))
}

/// Has the node of `host`, which listens at `address`, join the cluster of `controller` with a new
/// key.
///
/// # Errors
/// The same as [`join_with`].
pub async fn join(
    controller: SocketAddr,
    token: &Token,
    host: &str,
    address: SocketAddr,
) -> Result<Credentials, Problem> {
    let signing = SigningRequest::generate().map_err(|error| Failure::from(error).0)?;
    join_with(controller, token, host, address, signing).await
}

/// Has the node of `host`, which listens at `address`, join the cluster of `controller`. A request
/// whose answer is lost is repeated some times. Later calls with the same signing request and token
/// get the same certificate, until the token expires.
///
/// # Errors
/// The controller's refusal, or [`ProblemKind::HostUnavailable`] where it cannot be reached, or is
/// not the one that created the token.
pub async fn join_with(
    controller: SocketAddr,
    token: &Token,
    host: &str,
    address: SocketAddr,
    signing: SigningRequest,
) -> Result<Credentials, Problem> {
    let local = |error: army_node_api::Error| Failure::from(error).0;
    let client = client(
        controller,
        tls::stranger(&token.fingerprint).map_err(local)?,
    )?;
    let request = EnrolRequest {
        host: host.to_owned(),
        address,
        request: signing.request,
    };
    let unreachable = |error: reqwest::Error| {
        let detail = format!("cannot join at {controller}: {}", remote::causes(&error));
        Problem::new(ProblemKind::HostUnavailable, detail)
            .advise("the address is that of --cluster-listen, and the token is used once")
    };
    let mut attempt = 0;
    let enrolled: EnrolResponse = loop {
        attempt += 1;
        let request = client
            .post(url(controller, PATH))
            .bearer_auth(&token.secret)
            .json(&request);
        let error = match request.send().await {
            Ok(response) => match refusal(response).await?.json().await {
                Ok(enrolled) => break enrolled,
                Err(error) => error,
            },
            Err(error) => error,
        };
        if attempt == ATTEMPTS || error.is_connect() {
            return Err(unreachable(error));
        }
    };
    let authority = tls::certificate(&enrolled.authority).map_err(local)?;
    if tls::fingerprint(&authority) != token.fingerprint {
        let detail = "the controller named another authority than the token";
        return Err(Problem::new(ProblemKind::HostUnavailable, detail));
    }
    Ok(Credentials {
        authority: enrolled.authority,
        certificate: enrolled.certificate,
        key: signing.key,
    })
}
