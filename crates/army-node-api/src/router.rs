//! Serves a node to the controller and to other nodes: the other end of [`Remote`](crate::Remote).
//!
//! Only the controller may command a node. Another member of the cluster may read a template, or send a
//! VM, for which the controller has given it a ticket, and nobody else is heard;
//! [`cluster::tls`](crate::cluster::tls) proves who a peer is.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures_util::StreamExt;
use hyper_util::rt::TokioIo;

use crate::chunks;
use crate::cluster::Member;
use crate::cluster::tls::Peer;
use crate::moves::carry;
use crate::relay::relay;
use crate::requests::{
    AcceptVmRequest, AdmitFetchRequest, ConnectAgentRequest, ExpectVmRequest,
    ExportTemplateRequest, ImportTemplateRequest, InspectTemplateRequest, Operation, TemplateFacts,
};
use crate::tickets::{TICKET_HEADER, Tickets};
use crate::{
    AGENT_PROTOCOL, Call, DEADLINE_HEADER, Deadline, EPOCH_HEADER, Error, ErrorKind, MOVE_PROTOCOL,
    NodeApi, Reply, Result, VERSION,
};

/// The largest body of a request, except for templates.
const MAX_BODY: usize = 16 << 20;
/// The bytes of a VM's stream that may wait for the node.
const STREAM_BUFFER: usize = 256 << 10;

type Node = Arc<dyn NodeApi>;

/// All routes of `node`. The service that is made of it must provide the [`Peer`] of each
/// connection.
pub fn router(node: Arc<dyn NodeApi>) -> Router {
    let content = get(export_template)
        .put(import_template)
        .layer(DefaultBodyLimit::disable());
    let routes = Router::new()
        .merge(operation(<dyn NodeApi>::create_vms))
        .merge(operation(<dyn NodeApi>::fork_vm))
        .merge(operation(<dyn NodeApi>::destroy_vm))
        .merge(operation(<dyn NodeApi>::pause_vm))
        .merge(operation(<dyn NodeApi>::suspend_vm))
        .merge(operation(<dyn NodeApi>::checkpoint_vm))
        .merge(operation(<dyn NodeApi>::list_checkpoints))
        .merge(operation(<dyn NodeApi>::remove_checkpoint))
        .merge(operation(<dyn NodeApi>::rewind_vm))
        .merge(operation(<dyn NodeApi>::resume_vm))
        .merge(operation(<dyn NodeApi>::update_vm))
        .merge(operation(<dyn NodeApi>::balloon))
        .merge(operation(<dyn NodeApi>::measure_vm))
        .merge(operation(<dyn NodeApi>::read_console))
        .merge(operation(<dyn NodeApi>::snapshot_vm))
        .merge(operation(<dyn NodeApi>::inspect_template))
        .merge(operation(<dyn NodeApi>::set_standbys))
        .merge(operation(<dyn NodeApi>::remove_template))
        .merge(operation(<dyn NodeApi>::fetch_template))
        .route(&format!("/{}", AdmitFetchRequest::NAME), post(admit_fetch))
        .merge(operation(<dyn NodeApi>::offer_vm))
        .route(&format!("/{}", ExpectVmRequest::NAME), post(expect_vm))
        .merge(operation(<dyn NodeApi>::send_vm))
        .merge(operation(<dyn NodeApi>::inspect_move))
        .merge(operation(<dyn NodeApi>::decide_move))
        .merge(operation(<dyn NodeApi>::report))
        .merge(operation(<dyn NodeApi>::forget_vms))
        .merge(operation(<dyn NodeApi>::request_renewal))
        .merge(operation(<dyn NodeApi>::install_certificate))
        .route("/agent/{vm}", get(connect_agent))
        .route("/arrivals/{vm}", get(accept_vm))
        .route("/content/{template}", content);
    Router::new()
        .nest(&format!("/{VERSION}"), routes)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(Extension(Arc::<Tickets>::default()))
        .with_state(node)
}

/// The route of an operation that the controller may request.
fn operation<O: Operation>(
    operation: for<'a> fn(&'a dyn NodeApi, O, Call) -> Reply<'a, O::Response>,
) -> Router<Node> {
    let handler = move |State(node): State<Node>,
                        ConnectInfo(peer): ConnectInfo<Peer>,
                        Carried(call): Carried,
                        Json(request): Json<O>| async move {
        check_controller(&peer)?;
        let response = operation(&*node, request, call).await?;
        Ok::<_, Refusal>(Json(response))
    };
    Router::new().route(&format!("/{}", O::NAME), post(handler))
}

fn check_controller(peer: &Peer) -> Result<()> {
    match &peer.member {
        Some(Member::Controller) => Ok(()),
        _ => Err(Error::new(
            ErrorKind::PermissionDenied,
            "only the controller may request this",
        )),
    }
}

/// The deadline of a request, by this host's clock, and its epoch.
struct Carried(Call);

impl<S: Sync> FromRequestParts<S> for Carried {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> std::result::Result<Self, Refusal> {
        let number = |header| {
            let value = parts.headers.get(header)?.to_str().ok()?;
            value.parse::<u64>().ok()
        };
        let Some(remaining_ms) = number(DEADLINE_HEADER) else {
            return Err(Refusal(Error::new(
                ErrorKind::InvalidRequest,
                format!("the request has no valid {DEADLINE_HEADER} header"),
            )));
        };
        let deadline = Deadline::after(Duration::from_millis(remaining_ms));
        // Other nodes know no epoch.
        let epoch = number(EPOCH_HEADER).unwrap_or(0);
        Ok(Self(Call { deadline, epoch }))
    }
}

/// An error as a response.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            ErrorKind::InvalidRequest => StatusCode::BAD_REQUEST,
            ErrorKind::PermissionDenied => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict | ErrorKind::HostUnsupported | ErrorKind::StaleEpoch => {
                StatusCode::CONFLICT
            }
            ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorKind::Exhausted => StatusCode::TOO_MANY_REQUESTS,
            ErrorKind::GuestUnavailable | ErrorKind::HostUnreachable => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            ErrorKind::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), error = %self.0, "a request failed");
        }
        (status, Json(self.0)).into_response()
    }
}

type Answer<T> = std::result::Result<T, Refusal>;

/// Connects the controller with the agent in a VM.
async fn connect_agent(
    State(node): State<Node>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Carried(call): Carried,
    Path(vm): Path<String>,
    mut request: Request,
) -> Answer<Response> {
    check_controller(&peer)?;
    check_upgrade(&request, AGENT_PROTOCOL)?;
    let agent = node.connect_agent(ConnectAgentRequest { vm }, call);
    let (near, greeting) = agent.await?.into_parts()?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        relay(TokioIo::new(upgraded), near, greeting).await;
    });
    Ok(switching_to(AGENT_PROTOCOL))
}

fn check_upgrade(request: &Request, protocol: &str) -> Result<()> {
    let upgrade = request.headers().get(header::UPGRADE);
    if upgrade.map(|it| it.as_bytes()) == Some(protocol.as_bytes()) {
        return Ok(());
    }
    let message = format!("this path requires `Upgrade: {protocol}`");
    Err(Error::new(ErrorKind::InvalidRequest, message))
}

fn switching_to(protocol: &'static str) -> Response {
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, protocol)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Lets a node expect a VM, and accepts the ticket with which another node may send it.
async fn expect_vm(
    State(node): State<Node>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(tickets): Extension<Arc<Tickets>>,
    Carried(call): Carried,
    Json(request): Json<ExpectVmRequest>,
) -> Answer<Json<()>> {
    check_controller(&peer)?;
    node.expect_vm(request.clone(), call).await?;
    Ok(Json(tickets.expect(&request)?))
}

/// Receives a VM from another node that shows a ticket.
async fn accept_vm(
    State(node): State<Node>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(tickets): Extension<Arc<Tickets>>,
    Carried(call): Carried,
    Path(vm): Path<String>,
    mut request: Request,
) -> Answer<Response> {
    let Some(Member::Node(from)) = peer.member else {
        let message = "only nodes of this cluster may send VMs";
        return Err(Error::new(ErrorKind::PermissionDenied, message).into());
    };
    check_upgrade(&request, MOVE_PROTOCOL)?;
    let ticket = request.headers().get(TICKET_HEADER);
    let ticket = ticket.and_then(|it| it.to_str().ok());
    tickets.redeem(ticket, &from, &vm)?;
    // What comes out of the connection is the node's as soon as the response was sent.
    let (near, far) = tokio::io::duplex(STREAM_BUFFER);
    let accept = AcceptVmRequest { vm, from };
    node.accept_vm(accept, Box::new(near), call).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        if let Err(error) = carry(Box::new(TokioIo::new(upgraded)), far).await {
            tracing::debug!(%error, "the connection of a VM that moves has failed");
        }
    });
    Ok(switching_to(MOVE_PROTOCOL))
}

/// Accepts a ticket with which another node may fetch a template.
async fn admit_fetch(
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(tickets): Extension<Arc<Tickets>>,
    Json(request): Json<AdmitFetchRequest>,
) -> Answer<Json<()>> {
    check_controller(&peer)?;
    Ok(Json(tickets.admit(request)?))
}

/// Sends a template to the controller, or to another node that shows a ticket.
async fn export_template(
    State(node): State<Node>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(tickets): Extension<Arc<Tickets>>,
    Carried(call): Carried,
    Path(template): Path<String>,
    headers: HeaderMap,
) -> Answer<Response> {
    match &peer.member {
        Some(Member::Controller) => {}
        Some(Member::Node(host)) => {
            let ticket = headers.get(TICKET_HEADER).and_then(|it| it.to_str().ok());
            let id = tickets.check(ticket, host, &template)?;
            let inspect = InspectTemplateRequest {
                template: template.clone(),
            };
            if node.inspect_template(inspect, call).await?.id != id {
                let message = "the ticket is for another template of this name";
                return Err(Error::new(ErrorKind::PermissionDenied, message).into());
            }
        }
        None => {
            let message = "only members of this cluster may read templates";
            return Err(Error::new(ErrorKind::PermissionDenied, message).into());
        }
    }
    let request = ExportTemplateRequest { template };
    let mut content = node.export_template(request, call).await?;
    // An error before the first chunk becomes the response.
    let first = match content.recv().await {
        Some(Err(error)) => return Err(Error::internal("send the template", &error).into()),
        first => first,
    };
    let rest = chunks::into_stream(content);
    let body = Body::from_stream(futures_util::stream::iter(first).chain(rest));
    let media = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((media, body).into_response())
}

/// Receives a template from the controller.
async fn import_template(
    State(node): State<Node>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Carried(call): Carried,
    Path(template): Path<String>,
    request: Request,
) -> Answer<Json<TemplateFacts>> {
    check_controller(&peer)?;
    let content = chunks::receive(request.into_body().into_data_stream());
    let request = ImportTemplateRequest { template };
    Ok(Json(node.import_template(request, content, call).await?))
}
