//! A node's own API: what [`super::Node`] does, for the controller, and its templates, for other
//! nodes. Nobody else is heard; [`army_node_api::cluster::tls`] knows who is who.

use std::io;
use std::sync::Arc;

use army_api::{Problem, ProblemKind};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

use army_node_api::cluster::Member;
use army_node_api::cluster::tls::Peer;
use army_node_api::remote::{self, Make};
use army_node_api::{
    AGENT_PROTOCOL, Failure, Origin, Result, TemplateFacts, answer, blocking, of_agent, pipe,
};

use super::Node;
use crate::membership::Membership;

/// The largest body of a request.
const MAX_BODY: usize = 16 << 20;

#[derive(Clone)]
struct Served {
    node: Arc<Node>,
    member: Arc<Membership>,
    /// How this node connects to others.
    tls: ClientConfig,
    /// Fetching goes one by one.
    fetching: Arc<Mutex<()>>,
}

/// All of it, for the node that `member` is.
pub fn router(node: Arc<Node>, member: Arc<Membership>) -> Result<Router> {
    let served = Served {
        node,
        tls: member.identity().client()?,
        member,
        fetching: Arc::default(),
    };
    Ok(Router::new()
        .route(
            "/v1/create",
            operation(|node, make: Make<'static>| Ok(node.create(&make.of, &make.entries))),
        )
        .route(
            "/v1/fork",
            operation(|node, make: Make<'static>| Ok(node.fork_live(&make.of, &make.entries))),
        )
        .route(
            "/v1/destroy",
            operation(|node, (id, reason): (String, String)| node.destroy(&id, &reason)),
        )
        .route("/v1/pause", operation(|node, id: String| node.pause(&id)))
        .route("/v1/resume", operation(|node, id: String| node.resume(&id)))
        .route(
            "/v1/balloon",
            operation(|node, (id, bytes): (String, Option<u64>)| node.balloon(&id, bytes)),
        )
        .route(
            "/v1/snapshot",
            operation(|node, (id, name, diff): (String, String, bool)| {
                node.snapshot(&id, &name, diff)
            }),
        )
        .route(
            "/v1/template",
            operation(|node, name: String| node.template(&name)),
        )
        .route(
            "/v1/keep",
            operation(|node, (name, standbys): (String, u32)| node.keep(&name, standbys)),
        )
        .route(
            "/v1/remove-template",
            operation(|node, name: String| node.remove_template(&name)),
        )
        .route("/v1/report", operation(|node, ()| Ok(node.report())))
        .route(
            "/v1/forget",
            operation(|node, ids: Vec<String>| {
                node.forget(&ids);
                Ok(())
            }),
        )
        .route("/v1/fetch", post(fetch))
        .route("/v1/agent/{id}", get(agent))
        .route(
            "/v1/content/{template}",
            get(content).put(take).layer(DefaultBodyLimit::disable()),
        )
        .route(
            "/v1/certificate-request",
            asked(|served, ()| served.member.request()),
        )
        .route(
            "/v1/certificate",
            asked(|served, certificate: String| served.member.take(&certificate)),
        )
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(served))
}

/// An operation of the node's that the controller asks for.
fn operation<A, R, W>(work: W) -> MethodRouter<Served>
where
    A: DeserializeOwned + Send + 'static,
    R: Serialize + Send + 'static,
    W: Fn(&Node, A) -> Result<R> + Clone + Send + Sync + 'static,
{
    asked(move |served, arguments| work(&served.node, arguments))
}

/// Anything that the controller, and nobody else, asks for.
fn asked<A, R, W>(work: W) -> MethodRouter<Served>
where
    A: DeserializeOwned + Send + 'static,
    R: Serialize + Send + 'static,
    W: Fn(&Served, A) -> Result<R> + Clone + Send + Sync + 'static,
{
    post(
        move |State(served): State<Served>,
              ConnectInfo(peer): ConnectInfo<Peer>,
              Json(arguments): Json<A>| async move {
            of_controller(&peer)?;
            let done = blocking(move || work(&served, arguments)).await?;
            Ok::<_, Failure>(Json(done))
        },
    )
}

fn of_controller(peer: &Peer) -> Result<()> {
    match &peer.member {
        Some(Member::Controller) => Ok(()),
        _ => Err(Problem::new(
            ProblemKind::Forbidden,
            "only the controller may ask for this",
        )),
    }
}

/// Connects the controller with a VM's agent.
async fn agent(
    State(served): State<Served>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<String>,
    mut request: Request,
) -> std::result::Result<Response, Failure> {
    of_controller(&peer)?;
    if request
        .headers()
        .get(header::UPGRADE)
        .map(|it| it.as_bytes())
        != Some(AGENT_PROTOCOL.as_bytes())
    {
        let detail = format!("this is for `Upgrade: {AGENT_PROTOCOL}`");
        return Err(Problem::new(ProblemKind::InvalidRequest, detail).into());
    }
    let (stream, greeting, in_use) = blocking(move || {
        let (connection, in_use) = served.node.agent(&id)?;
        let (stream, greeting) = connection.into_stream().map_err(|error| of_agent(&error))?;
        Ok((stream, greeting, in_use))
    })
    .await?;
    let local = |error: io::Error| Problem::new(ProblemKind::Internal, error.to_string());
    stream.set_nonblocking(true).map_err(local)?;
    let mut near = tokio::net::UnixStream::from_std(stream).map_err(local)?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _in_use = in_use;
        let Ok(upgraded) = upgrade.await else { return };
        let mut far = TokioIo::new(upgraded);
        if far.write_all(&greeting).await.is_ok() {
            // Ends when either side does.
            let _ = tokio::io::copy_bidirectional(&mut far, &mut near).await;
        }
    });
    let headers = [
        (header::CONNECTION, "upgrade"),
        (header::UPGRADE, AGENT_PROTOCOL),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Sends a template to another node.
async fn content(
    State(served): State<Served>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(name): Path<String>,
) -> std::result::Result<Response, Failure> {
    if peer.member.is_none() {
        let detail = "only hosts of this Army get templates";
        return Err(Problem::new(ProblemKind::Forbidden, detail).into());
    }
    let (sender, pieces) = pipe::pipe();
    tokio::task::spawn_blocking(move || {
        if let Err(problem) = served.node.send_template(&name, sender.clone()) {
            let _ = sender.blocking_send(Err(io::Error::other(problem)));
        }
    });
    Ok(answer(pieces, ProblemKind::Internal).await?)
}

/// Takes a template that the controller sends.
async fn take(
    State(served): State<Served>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(name): Path<String>,
    request: Request,
) -> std::result::Result<Json<TemplateFacts>, Failure> {
    of_controller(&peer)?;
    let pieces = pipe::pieces_of(request.into_body().into_data_stream());
    let facts = blocking(move || served.node.receive_template(&name, None, pieces)).await?;
    Ok(Json(facts))
}

/// Gets a template from another node, unless it is here.
async fn fetch(
    State(served): State<Served>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Json(origin): Json<Origin>,
) -> std::result::Result<Json<()>, Failure> {
    of_controller(&peer)?;
    // Who waits for the same template finds it here.
    let _turn = served.fetching.lock().await;
    let (node, name) = (Arc::clone(&served.node), origin.template.clone());
    let here = blocking(move || match node.template(&name) {
        Ok(facts) => Ok(Some(facts.id)),
        Err(problem) if problem.kind == ProblemKind::NotFound => Ok(None),
        Err(problem) => Err(problem),
    })
    .await?;
    match here {
        Some(id) if id == origin.id => return Ok(Json(())),
        Some(_) => {
            let detail = format!(
                "the host {} has another template that is called `{}`",
                served.node.name(),
                origin.template
            );
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .advise("remove it there: clone template rm")
                .into());
        }
        None => {}
    }
    let dns = Member::Node(origin.host.clone()).dns_name();
    let unavailable = |why: String| {
        let detail = format!("cannot get the template from {}: {why}", origin.host);
        Failure(Problem::new(ProblemKind::HostUnavailable, detail).retry_after(5))
    };
    let url = format!(
        "https://{dns}:{}/v1/content/{}",
        origin.address.port(),
        origin.template
    );
    let answer = remote::client(&dns, origin.address, served.tls.clone())?
        .get(url)
        .send()
        .await
        .map_err(|error| unavailable(remote::whole(&error)))?;
    if !answer.status().is_success() {
        return Err(unavailable(remote::problem_of(answer).await.detail));
    }
    let body = answer.bytes_stream();
    let body = body.map(|piece| piece.map_err(|error| remote::whole(&error)));
    let pieces = pipe::pieces_of(body);
    let node = Arc::clone(&served.node);
    blocking(move || node.receive_template(&origin.template, Some(&origin.id), pieces)).await?;
    Ok(Json(()))
}
