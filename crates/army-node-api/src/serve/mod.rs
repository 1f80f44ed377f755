//! Serves HTTP to strangers and to members: accepts connections, with TLS or without, and bounds
//! what each of them can hold.
//!
//! A connection has to make its first request in time. Until then it is *arriving*, and when one
//! address has too many arriving connections, its own oldest ones are closed: silent connections
//! never close the door for others. Established connections are limited in total and for each
//! address, end after an idle time, and end when their peer does not read what it asked for.
//!
//! Only HTTP/1.1 is served. Who a peer is, and what it may do, is decided by the routes.

mod places;
mod stream;

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::cluster::tls::{Peer, member_of};
pub use places::Connections;
use places::Place;
use stream::PeerStream;

/// The most headers of a request.
const MAX_HEADERS: usize = 100;
/// The most bytes of a request's headers, and of a body that are received ahead of their reader.
const MAX_BUFFER: usize = 64 << 10;
/// The pause after a connection could not be accepted: the error may concern all connections, so
/// that the next attempt would fail at once, too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections may hold, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most connections at a time.
    pub connections: usize,
    /// The most connections of one address at a time.
    pub per_address: usize,
    /// How many connections of one address may be arriving before its oldest ones are closed, if
    /// they are older than [`Limits::patience`].
    pub arriving_per_address: usize,
    /// How many connections may be arriving before the oldest one of the address that has the most
    /// of them is closed.
    pub arriving: usize,
    /// How long an arriving connection is safe, however many its address has.
    pub patience: Duration,
    /// How long a connection may take for its TLS handshake and the headers of its first request.
    pub arrival: Duration,
    /// How long a connection may be idle between two requests, including the headers of the second.
    pub idle: Duration,
    /// How long a peer may read nothing of what is being sent to it.
    pub stall: Duration,
    /// How long requests that are in progress may take to finish when the server stops.
    pub drain: Duration,
}

impl Limits {
    /// The limits of a server that strangers reach.
    pub const STRANGERS: Self = Self {
        connections: 32_768,
        per_address: 16_384,
        arriving_per_address: 64,
        arriving: 4096,
        patience: Duration::from_secs(5),
        arrival: Duration::from_secs(15),
        idle: Duration::from_secs(120),
        stall: Duration::from_secs(60),
        drain: Duration::from_secs(5),
    };

    /// The limits of a server that only members of a cluster reach, who are few and have many
    /// connections each.
    pub const MEMBERS: Self = Self {
        connections: 131_072,
        per_address: 131_072,
        arriving_per_address: 4096,
        arriving: 8192,
        drain: Duration::from_secs(2),
        ..Self::STRANGERS
    };
}

/// Tells servers to stop.
#[derive(Debug)]
pub struct Stop(watch::Sender<bool>);

impl Stop {
    /// Tells all servers and sessions that hold a [`Stopping`] of it to stop.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }

    /// What learns that servers stop.
    pub fn stopping(&self) -> Stopping {
        Stopping(self.0.subscribe())
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self(watch::channel(false).0)
    }
}

/// Learns that servers stop.
#[derive(Debug, Clone)]
pub struct Stopping(watch::Receiver<bool>);

impl Stopping {
    /// Completes when servers stop.
    pub async fn begun(&mut self) {
        if self.0.wait_for(|stopping| *stopping).await.is_err() {
            // Nobody can tell any more.
            pending().await
        }
    }
}

/// A server on one address.
pub struct Server {
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    limits: Limits,
    connections: Connections,
}

impl Server {
    /// A server on `listener`, with TLS where there is a configuration of it.
    pub fn new(listener: TcpListener, tls: Option<ServerConfig>, limits: Limits) -> Self {
        Self {
            listener,
            acceptor: tls.map(|config| TlsAcceptor::from(Arc::new(config))),
            limits,
            connections: Connections::new(limits),
        }
    }

    /// The address where the server listens.
    ///
    /// # Errors
    /// Where the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Whether connections are encrypted.
    pub fn has_tls(&self) -> bool {
        self.acceptor.is_some()
    }

    /// The connections of the server, for metrics.
    pub fn connections(&self) -> Connections {
        self.connections.clone()
    }

    /// Serves `router`, whose requests have the [`ConnectInfo`] of their [`Peer`], until `stopping`
    /// tells the server to stop. Requests that are in progress may then finish within
    /// [`Limits::drain`]. Dropping the future closes the listener, and no connection.
    pub async fn serve(self, router: Router, mut stopping: Stopping) {
        let router = TowerToHyperService::new(router);
        loop {
            let (stream, address) = tokio::select! {
                () = stopping.begun() => break,
                accepted = self.listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
            };
            let Some(place) = self.connections.admit(address.ip()) else {
                tracing::debug!(%address, "a connection was refused: there are too many");
                continue;
            };
            let connection = Connection {
                acceptor: self.acceptor.clone(),
                router: router.clone(),
                limits: self.limits,
                stopping: stopping.clone(),
                address,
            };
            tokio::spawn(connection.run(stream, place));
        }
        drop(self.listener);
        let drained = self.connections.empty();
        if timeout(self.limits.drain, drained).await.is_err() {
            let open = self.connections.count();
            tracing::warn!(
                open,
                "connections are closed before their requests have finished"
            );
        }
    }
}

/// A connection before its stream is encrypted.
struct Connection {
    acceptor: Option<TlsAcceptor>,
    router: TowerToHyperService<Router>,
    limits: Limits,
    stopping: Stopping,
    address: SocketAddr,
}

impl Connection {
    async fn run(self, stream: TcpStream, place: Place) {
        let place = Arc::new(place);
        let address = self.address;
        let arrival = self.limits.arrival;
        let expelled = place.expelled();
        let is_late = {
            let place = Arc::clone(&place);
            async move {
                tokio::time::sleep(arrival).await;
                if place.is_established() {
                    pending().await
                }
            }
        };
        let stream = PeerStream::new(stream, self.limits.stall, Arc::clone(&place));
        tokio::select! {
            () = self.serve(stream, place) => {}
            () = expelled => tracing::debug!(%address, "a silent connection was closed for others"),
            () = is_late => tracing::debug!(%address, "a connection made no request in time"),
        }
    }

    async fn serve(self, stream: PeerStream, place: Arc<Place>) {
        let address = self.address;
        let Some(acceptor) = self.acceptor.clone() else {
            let member = None;
            return self.requests(stream, Peer { address, member }, place).await;
        };
        match acceptor.accept(stream).await {
            Ok(stream) => {
                let member = member_of(&stream);
                self.requests(stream, Peer { address, member }, place).await;
            }
            Err(error) => tracing::debug!(%address, %error, "a TLS handshake failed"),
        }
    }

    async fn requests<S>(mut self, stream: S, peer: Peer, place: Arc<Place>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let router = self.router;
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            place.establish();
            let mut request: Request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(ConnectInfo(peer.clone()));
            router.call(request)
        });
        let mut served = std::pin::pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(self.limits.idle)
                .max_headers(MAX_HEADERS)
                .max_buf_size(MAX_BUFFER)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
        );
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = self.stopping.begun() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(address = %self.address, %error, "a connection ended early");
        }
    }
}
