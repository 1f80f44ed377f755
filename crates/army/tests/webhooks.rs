//! Webhooks through the API, with a receiver that is a server of its own.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use army::webhooks::HttpSender;
use army_api::client::ClientError;
use army_api::events::Event;
use army_api::keys::Role;
use army_api::webhooks::{DELIVERY_HEADER, NewWebhook, SIGNATURE_HEADER, Webhook};
use army_api::{Problem, ProblemKind};
use army_node_api::simulated::SimulatedNode;
use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use hmac::{Hmac, KeyInit, Mac};
use reqwest::Method;
use serde_json::json;
use sha2::Sha256;

use served::{Postgres, on_each_database, server_over};

const LIMIT: Duration = Duration::from_secs(60);

type Received = Arc<Mutex<Vec<(HeaderMap, Bytes)>>>;

/// A receiver that refuses the first delivery, and sends the second one elsewhere.
async fn receiver() -> (String, Received) {
    let received = Received::default();
    let all = Arc::clone(&received);
    let handler = move |headers: HeaderMap, body: Bytes| async move {
        let mut all = all.lock().unwrap();
        all.push((headers, body));
        match all.len() {
            1 => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            2 => redirect(),
            _ => StatusCode::NO_CONTENT.into_response(),
        }
    };
    let router = Router::new().route("/hook", post(handler));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, received)
}

fn redirect() -> Response {
    (
        StatusCode::TEMPORARY_REDIRECT,
        [(header::LOCATION, "/hook")],
    )
        .into_response()
}

fn problem<T>(result: Result<T, ClientError>) -> Problem {
    match result {
        Err(ClientError::Refused(problem)) => problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Whether a delivery is signed with a secret.
fn is_signed(headers: &HeaderMap, body: &[u8], secret: &str) -> bool {
    let signature = headers[SIGNATURE_HEADER].to_str().unwrap();
    let (time, signature) = signature.split_once(',').unwrap();
    let seconds = time.strip_prefix("t=").unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(&[seconds.as_bytes(), b".", body].concat());
    let digest = mac.finalize().into_bytes();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    signature == format!("v1={hex}")
}

async fn an_event_is_signed_and_sent_until_it_is_accepted(postgres: Option<Postgres>) {
    let node = Arc::new(SimulatedNode::new("here"));
    let server = server_over(node, postgres).await;
    let (url, received) = receiver().await;
    let body = json!({"url": url, "events": ["key.created"]});
    let created: NewWebhook = {
        let created = server.admin.send(Method::POST, "/v1/webhooks", &body);
        created.await.unwrap()
    };
    let sender = Arc::new(HttpSender::new().unwrap());
    let controller = Arc::clone(&server.controller);
    tokio::spawn(controller.deliver_webhooks(sender));
    server.client("red", Role::User).await;
    let end = Instant::now() + LIMIT;
    while received.lock().unwrap().len() < 3 {
        assert!(Instant::now() < end, "{:?}", received.lock().unwrap().len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A redirect is a failure, and nothing but the event comes again.
    let mut ids = HashSet::new();
    for (headers, body) in received.lock().unwrap().iter() {
        assert!(is_signed(headers, body, &created.secret));
        assert!(!is_signed(headers, body, "another secret"));
        let event: Event = serde_json::from_slice(body).unwrap();
        assert_eq!((&*event.kind, &*event.tenant), ("key.created", "red"));
        assert_eq!(headers["army-event"], event.id.to_string());
        assert_eq!(headers["army-webhook"], created.webhook.id);
        ids.insert(headers[DELIVERY_HEADER].clone());
    }
    // The three are one delivery, which was repeated.
    assert_eq!(ids.len(), 1);
    let works = async || -> Webhook {
        let all: Vec<Webhook> = server.admin.get("/v1/webhooks", &()).await.unwrap();
        all.into_iter().next().unwrap()
    };
    while works().await.failures > 0 {
        assert!(Instant::now() < end);
    }
    let path = format!("/v1/webhooks/{}", created.webhook.id);
    server.admin.plain(Method::DELETE, &path).await.unwrap();
    let refused = problem(server.admin.plain(Method::DELETE, &path).await);
    assert_eq!(refused.kind, ProblemKind::NotFound);
}

async fn users_have_webhooks_of_public_addresses_and_not_too_many(postgres: Option<Postgres>) {
    let node = Arc::new(SimulatedNode::new("here"));
    let server = server_over(node, postgres).await;
    let user = server.client("red", Role::User).await;
    let create = async |url: &str| {
        let body = json!({"url": url, "secret": "0123456789abcdef"});
        user.send::<NewWebhook>(Method::POST, "/v1/webhooks", &body)
            .await
    };
    for url in [
        "http://127.0.0.1/",
        "http://169.254.169.254/",
        "http://[fd00:ec2::254]/",
        "x",
    ] {
        let refused = problem(create(url).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{url}");
    }
    for _ in 0..20 {
        let created = create("https://example.org/hook").await.unwrap();
        assert_eq!(created.secret, "0123456789abcdef");
    }
    let refused = problem(create("https://example.org/hook").await);
    assert_eq!(refused.kind, ProblemKind::QuotaExceeded);
    let other = server.client("blue", Role::User).await;
    let seen: Vec<Webhook> = other.get("/v1/webhooks", &()).await.unwrap();
    assert_eq!(seen, []);
    for body in [
        json!({"url": "https://example.org", "secret": "short"}),
        json!({"url": "https://example.org", "events": ["vm running"]}),
        json!({"url": "https://example.org", "events": vec!["vm.*"; 51]}),
    ] {
        let refused = user.send::<NewWebhook>(Method::POST, "/v1/webhooks", &body);
        let refused = problem(refused.await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{body}");
    }
    let viewer = server.client("red", Role::Viewer).await;
    let refused = problem(viewer.get::<Vec<Webhook>>("/v1/webhooks", &()).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
}

on_each_database! {
    an_event_is_signed_and_sent_until_it_is_accepted,
    users_have_webhooks_of_public_addresses_and_not_too_many,
}
