//! The REST API. It translates between HTTP and the [`Controller`], and decides nothing itself.
//!
//! There is one file for each kind of object. [`auth`] authenticates callers, `extract` reads
//! requests, whose limits `bounds` enforces, and `failure` converts errors into problem documents.
//! Guests are reached through `sessions`, output waits within the `budget`, and `audit` logs who has
//! requested what.

mod audit;
pub mod auth;
mod bounds;
mod budget;
mod builds;
mod changes;
mod checkpoints;
mod commands;
mod dashboard;
mod directories;
mod downloads;
mod egress;
mod events;
mod exec;
mod extract;
mod failure;
mod figures;
mod files;
mod health;
mod hosts;
mod keys;
mod metrics;
mod moves;
mod operations;
mod output;
mod ports;
mod ranges;
mod scopes;
mod sessions;
mod streams;
mod templates;
mod tenants;
mod terminal;
pub mod tls;
mod vms;
mod webhooks;

use std::sync::Arc;
use std::time::Duration;

use army_api::Problem;
use army_api::streams::{StreamEvent, StreamRequest};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use utoipa::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use budget::BufferLimits;
pub use failure::Failure;
pub use sessions::SessionLimits;

use army_controller::Controller;
use army_node_api::serve::{Connections, Stop, Stopping};

use bounds::Bounds;
use budget::Budget;
use sessions::Sessions;

/// The largest body of a request, except for files.
const MAX_BODY: usize = 1 << 20;
/// How long a client may take to send the body of a request, except for files and terminals.
const BODY_LIMIT: Duration = Duration::from_secs(30);

/// How long the agent in a guest may take for an exchange that needs no waiting.
const AGENT_LIMIT: Duration = Duration::from_secs(20);

/// How often the client of a WebSocket is pinged. Clients answer by themselves.
const PING_EVERY: Duration = Duration::from_secs(20);
/// A client of a WebSocket that sends nothing for so long, or accepts nothing, has disconnected
/// without notice.
const SILENCE: Duration = Duration::from_secs(60);

/// The state that every handler gets.
#[derive(Clone)]
pub struct App {
    controller: Arc<Controller>,
    /// The limits of requests.
    bounds: Bounds,
    /// The connections to guests.
    sessions: Sessions,
    /// The memory for output that waits for its reader.
    budget: Budget,
    /// The connections of clients, where the server tells.
    connections: Option<Connections>,
}

/// What clients may have of a server at a time, and when it stops.
#[derive(Debug, Clone)]
pub struct Doors {
    /// The limits of connections to guests.
    pub sessions: SessionLimits,
    /// The limits of memory for output that waits for its reader.
    pub buffers: BufferLimits,
    /// Learns that the server stops.
    pub stopping: Stopping,
    /// The connections of clients, for metrics.
    pub connections: Option<Connections>,
}

impl Doors {
    /// The usual limits.
    pub fn new(stopping: Stopping) -> Self {
        Self {
            sessions: SessionLimits::default(),
            buffers: BufferLimits::default(),
            stopping,
            connections: None,
        }
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Army",
        description = "Creates and manages VMs that are clones of templates, on one or many hosts. \
            Failures are RFC 9457 problem documents. Requests that make something accept an \
            Idempotency-Key header, 1 to 200 visible ASCII characters that the client chooses: a \
            request that is repeated with the same key waits for the operation of the first one, or \
            returns what that has made, as it is now. Where the first one made nothing, it is tried \
            again. Operations go on when their client disconnects."
    ),
    security(("key" = [])),
    components(schemas(Problem, StreamRequest, StreamEvent)),
    modifiers(&BearerKey)
)]
struct Document;

struct BearerKey;

impl utoipa::Modify for BearerKey {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

fn api() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(health::health))
        .routes(routes!(health::ready))
        .routes(routes!(metrics::metrics))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::remove))
        .routes(routes!(tenants::list))
        .routes(routes!(tenants::inspect, tenants::change))
        .routes(routes!(hosts::list))
        .routes(routes!(hosts::token))
        .routes(routes!(hosts::inspect, hosts::change, hosts::remove))
        .routes(routes!(hosts::drain))
        .routes(routes!(hosts::undrain))
        .routes(routes!(hosts::evacuate))
        .routes(routes!(templates::list, templates::register))
        .routes(routes!(
            templates::inspect,
            templates::change,
            templates::remove
        ))
        .routes(routes!(templates::copy))
        .routes(routes!(templates::export, templates::import))
        .routes(routes!(templates::tag, templates::untag))
        .routes(routes!(builds::build))
        .routes(routes!(vms::list, vms::create))
        .routes(routes!(vms::inspect, vms::destroy, changes::change))
        .routes(routes!(vms::pause))
        .routes(routes!(vms::suspend))
        .routes(routes!(checkpoints::list, checkpoints::take))
        .routes(routes!(checkpoints::remove))
        .routes(routes!(checkpoints::rewind))
        .routes(routes!(vms::resume))
        .routes(routes!(moves::migrate))
        .routes(routes!(vms::fork))
        .routes(routes!(vms::snapshot))
        .routes(routes!(vms::balloon, vms::set_balloon))
        .routes(routes!(figures::figures))
        .routes(routes!(figures::console))
        .routes(routes!(exec::exec, streams::exec))
        .routes(routes!(commands::list, commands::start))
        .routes(routes!(commands::output))
        .routes(routes!(streams::attach))
        .routes(routes!(commands::signal))
        .routes(routes!(terminal::terminal))
        .routes(routes!(ports::connect))
        .routes(routes!(files::read, files::write, directories::remove))
        .routes(routes!(directories::list))
        .routes(routes!(directories::stat))
        .routes(routes!(directories::make))
        .routes(routes!(directories::rename))
        .routes(routes!(directories::pack, directories::unpack))
        .routes(routes!(directories::watch))
        .routes(routes!(events::events))
        .routes(routes!(operations::list))
        .routes(routes!(operations::inspect))
        .routes(routes!(webhooks::list, webhooks::create))
        .routes(routes!(webhooks::remove))
}

/// The OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    describe().1
}

fn describe() -> (Router<App>, utoipa::openapi::OpenApi) {
    let (router, mut document) = api().split_for_parts();
    // Every operation may be answered with these.
    let problems = [
        (
            "4XX",
            "The request was refused; the problem document explains why",
        ),
        (
            "5XX",
            "The VM's host or guest does not respond, or the server failed",
        ),
    ]
    .map(|(status, description)| (status, problem(description)));
    for item in document.paths.paths.values_mut() {
        let methods = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.patch,
            &mut item.delete,
        ];
        for operation in methods.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            let problems = problems.iter().cloned();
            responses.extend(problems.map(|(status, it)| (status.to_owned(), it.into())));
        }
    }
    (router, document)
}

fn problem(description: &str) -> utoipa::openapi::Response {
    let content = Content::new(Some(Ref::from_schema_name("Problem")));
    ResponseBuilder::new()
        .description(description)
        .content("application/problem+json", content)
        .build()
}

/// All routes with the usual limits, in a server that never stops.
pub fn router(controller: Arc<Controller>) -> Router {
    router_with(controller, Doors::new(Stop::default().stopping()))
}

/// All routes: the API, its OpenAPI document, and the dashboard. Requests should have the
/// [`ConnectInfo`](axum::extract::ConnectInfo) of their peer, as a
/// [`Server`](army_node_api::serve::Server) adds it.
pub fn router_with(controller: Arc<Controller>, doors: Doors) -> Router {
    let (router, document) = describe();
    let bounds = Bounds::of(&document);
    let document = document.to_json().unwrap_or_default();
    let description = move || {
        let document = document.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], document) }
    };
    router
        .route("/openapi.json", get(description))
        .merge(dashboard::router())
        .fallback(extract::no_such_path)
        .method_not_allowed_fallback(extract::no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(harden))
        .layer(middleware::from_fn(audit::log))
        .with_state(App {
            controller,
            bounds,
            sessions: Sessions::new(doors.sessions, doors.stopping),
            budget: Budget::new(doors.buffers),
            connections: doors.connections,
        })
}

/// Adds headers for browsers to every response.
async fn harden(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
    ] {
        headers.insert(name, header::HeaderValue::from_static(value));
    }
    response
}

/// What handlers return.
type Answer<T> = Result<T, Failure>;
