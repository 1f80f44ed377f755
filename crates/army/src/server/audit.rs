//! Who has requested what: the actor of events, and a line of the log for each request.
//!
//! A line has the route and not the path, and nothing of the query or the headers, so that no secret
//! gets into the log. `ARMY_LOG=info,army::access=warn` leaves the lines out.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use army_api::keys::Key;
use army_controller::Actor;
use army_node_api::cluster::tls::Peer;
use axum::extract::{ConnectInfo, MatchedPath, Request};
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::Response;

/// The part of the log with the lines.
const TARGET: &str = "army::access";

/// Who makes a request, as far as that is known.
#[derive(Clone, Default)]
pub(super) struct Requester {
    actor: Actor,
    tenant: Arc<OnceLock<String>>,
}

impl Requester {
    /// The tenant of the key, once the request is authenticated.
    pub(super) fn tenant(&self) -> &str {
        self.tenant.get().map_or("", String::as_str)
    }
}

/// Records whose request this is.
pub(super) fn identify(parts: &Parts, key: &Key) {
    if let Some(requester) = parts.extensions.get::<Requester>() {
        requester.actor.identify(&key.id);
        let _ = requester.tenant.set(key.tenant.clone());
    }
}

/// Carries out a request in the name of its caller, and logs it.
pub(super) async fn log(mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let requester = Requester::default();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let peer = request.extensions().get::<ConnectInfo<Peer>>();
    let address = peer.map(|peer| peer.0.address);
    request.extensions_mut().insert(requester.clone());
    let response = requester.actor.clone().carry(next.run(request)).await;
    tracing::info!(
        target: TARGET,
        %method,
        route = route.as_ref().map_or("", MatchedPath::as_str),
        status = response.status().as_u16(),
        took_us = start.elapsed().as_micros() as u64,
        key = requester.actor.name(),
        tenant = requester.tenant(),
        address = address.map(tracing::field::display),
    );
    response
}
