//! What connections may hold of a server, and for how long.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use army_node_api::cluster::Member;
use army_node_api::cluster::authority::Authority;
use army_node_api::cluster::tls::Identity;
use army_node_api::serve::{Connections, Limits, Server, Stop};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::routing::get;
use futures_util::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// The limit for what should happen at once, on a machine under load.
const LIMIT: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

struct Served {
    address: SocketAddr,
    connections: Connections,
    stop: Stop,
    serving: JoinHandle<()>,
}

async fn serve(router: Router, limits: Limits, tls: bool) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = tls.then(|| {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let credentials = authority.credentials(&Member::Controller).unwrap();
        Identity::new(&credentials).unwrap().server(true).unwrap()
    });
    let server = Server::new(listener, tls, limits);
    let connections = server.connections();
    let stop = Stop::default();
    let serving = tokio::spawn(server.serve(router, stop.stopping()));
    Served {
        address,
        connections,
        stop,
        serving,
    }
}

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it goes on")
}

/// Reads until the server closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn a_connection_without_a_request_ends_by_itself() {
    let limits = Limits {
        arrival: SHORT,
        ..Limits::STRANGERS
    };
    for tls in [false, true] {
        let served = serve(hello(), limits, tls).await;
        for sent in [&b""[..], b"GET / HTTP/1.1\r\nhost: "] {
            let mut stream = TcpStream::connect(served.address).await.unwrap();
            stream.write_all(sent).await.unwrap();
            rest(&mut stream).await;
        }
    }
}

#[tokio::test]
async fn an_idle_connection_is_kept_for_a_while() {
    let limits = Limits {
        arrival: SHORT / 3,
        idle: SHORT,
        ..Limits::STRANGERS
    };
    let served = serve(hello(), limits, false).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(REQUEST).await.unwrap();
    let mut answer = [0; 4096];
    let len = within(stream.read(&mut answer)).await.unwrap();
    assert!(answer[..len].starts_with(b"HTTP/1.1 200"));
    // It has arrived, so the time for arriving is of no concern any more.
    tokio::time::sleep(SHORT / 2).await;
    stream.write_all(REQUEST).await.unwrap();
    assert!(within(stream.read(&mut answer)).await.unwrap() > 0);
    assert_eq!(rest(&mut stream).await, "");
}

#[tokio::test]
async fn headers_without_an_end_are_refused() {
    let served = serve(hello(), Limits::STRANGERS, false).await;
    for header in [
        "x: y\r\n".repeat(200),
        format!("x: {}\r\n", "y".repeat(128 << 10)),
    ] {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nhost: x\r\n{header}\r\n");
        let _ = stream.write_all(request.as_bytes()).await;
        let answer = rest(&mut stream).await;
        assert!(!answer.contains("200 OK"), "{answer}");
    }
}

/// Tells when it is dropped.
struct Dropped(Arc<Notify>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[tokio::test]
async fn a_peer_that_does_not_read_its_response_loses_what_makes_it() {
    let ended = Arc::new(Notify::new());
    let guard = Arc::clone(&ended);
    let endless = move || {
        let guard = Dropped(Arc::clone(&guard));
        async move {
            let bytes = stream::repeat_with(move || {
                let _ = &guard;
                Ok::<_, std::io::Error>(Bytes::from_static(&[0; 64 << 10]))
            });
            Body::from_stream(bytes)
        }
    };
    let limits = Limits {
        stall: SHORT,
        ..Limits::STRANGERS
    };
    let router = Router::new().route("/", get(endless));
    let served = serve(router, limits, false).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(REQUEST).await.unwrap();
    within(ended.notified()).await;
}

#[tokio::test]
async fn a_server_that_stops_finishes_requests_and_accepts_no_more() {
    let gate = Arc::new(Notify::new());
    let waits = Arc::clone(&gate);
    let wait = move || {
        let gate = Arc::clone(&waits);
        async move {
            gate.notified().await;
            "done"
        }
    };
    let router = Router::new().route("/", get(wait));
    let served = serve(router, Limits::STRANGERS, false).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(REQUEST).await.unwrap();
    // One that has made no request does not hold up the end.
    let _silent = TcpStream::connect(served.address).await.unwrap();
    while served.connections.count() < 2 {
        tokio::task::yield_now().await;
    }
    // The request has to be there before the server stops.
    tokio::time::sleep(SHORT).await;
    served.stop.begin();
    while TcpStream::connect(served.address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    gate.notify_one();
    assert!(rest(&mut stream).await.ends_with("done"));
    within(served.serving).await.unwrap();
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_left_behind_when_the_server_stops() {
    let router = Router::new().route("/", get(std::future::pending::<()>));
    let limits = Limits {
        drain: SHORT,
        ..Limits::STRANGERS
    };
    let served = serve(router, limits, false).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(REQUEST).await.unwrap();
    while served.connections.count() < 1 {
        tokio::task::yield_now().await;
    }
    served.stop.begin();
    within(served.serving).await.unwrap();
}
