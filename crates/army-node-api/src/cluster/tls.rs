//! Connections on which both sides show a certificate of the same authority.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Member;
use super::authority::Credentials;
use crate::{Error, Result};

/// How long a peer may take to show who it is.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Peers that may be about to show who they are.
const HANDSHAKES: usize = 128;

/// Who is at the other end.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it is.
    pub address: SocketAddr,
    /// What its certificate says; none where it showed none.
    pub member: Option<Member>,
}

/// Connections whose handshake is done.
pub struct Listener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, Peer)>,
    address: SocketAddr,
    accept: tokio::task::JoinHandle<()>,
}

impl Listener {
    /// Takes connections from `listener`. With `strangers` also from those that show no
    /// certificate; what they may do is for others to say.
    pub fn new(listener: TcpListener, identity: &Identity, strangers: bool) -> Result<Self> {
        Self::of(listener, identity.server(strangers)?)
    }

    /// Takes connections from `listener` that are encrypted as `config` says.
    pub fn of(listener: TcpListener, config: ServerConfig) -> Result<Self> {
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let address = listener
            .local_addr()
            .map_err(|error| Error::internal("listen", &error))?;
        let (done, ready) = mpsc::channel(HANDSHAKES);
        let places = Arc::new(Semaphore::new(HANDSHAKES));
        let accept = tokio::spawn(async move {
            loop {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                    return;
                };
                let (stream, address) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Of one connection, or of all: then it would fail at once again.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let (acceptor, done) = (acceptor.clone(), done.clone());
                tokio::spawn(async move {
                    let _place = place;
                    let _ = stream.set_nodelay(true);
                    let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream));
                    match shaken.await {
                        Ok(Ok(stream)) => {
                            let member = member_of(&stream);
                            let _ = done.send((stream, Peer { address, member })).await;
                        }
                        Ok(Err(error)) => {
                            tracing::warn!(%address, %error, "a connection is none of ours");
                        }
                        Err(_) => tracing::warn!(%address, "a connection did not say whose it is"),
                    }
                });
            }
        });
        Ok(Self {
            ready,
            address,
            accept,
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl axum::serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // Its task ended with the runtime.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Ok(Peer {
            address: self.address,
            member: None,
        })
    }
}

impl Connected<IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        stream.remote_addr().clone()
    }
}

fn member_of(stream: &TlsStream<TcpStream>) -> Option<Member> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    certificate.valid_dns_names().find_map(Member::of_dns_name)
}

/// The provider of cryptography of all connections.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads a certificate in PEM.
pub fn certificate(pem: &str) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| Error::internal("read a certificate", &error))
}

/// Who a process is to the others of its Army. What it shows can be renewed while it is connected.
#[derive(Clone)]
pub struct Identity {
    roots: Arc<RootCertStore>,
    shown: Arc<Shown>,
}

impl Identity {
    /// Whoever has these credentials.
    ///
    /// # Errors
    /// Where they cannot be read, or do not belong together.
    pub fn new(credentials: &Credentials) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots
            .add(certificate(&credentials.authority)?)
            .map_err(|error| Error::internal("take up the authority", &error))?;
        Ok(Self {
            roots: Arc::new(roots),
            shown: Arc::new(Shown(RwLock::new(own(credentials)?))),
        })
    }

    /// Shows other credentials of the same authority from the next connection on.
    ///
    /// # Errors
    /// As [`Identity::new`]; the former ones stay.
    pub fn renew(&self, credentials: &Credentials) -> Result<()> {
        let own = own(credentials)?;
        *self.shown.0.write().unwrap_or_else(PoisonError::into_inner) = own;
        Ok(())
    }

    fn server(&self, strangers: bool) -> Result<ServerConfig> {
        let failed = |error: &dyn std::fmt::Display| Error::internal("set up TLS", error);
        let roots = Arc::clone(&self.roots);
        let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
        if strangers {
            verifier = verifier.allow_unauthenticated();
        }
        Ok(ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| failed(&error))?
            .with_client_cert_verifier(verifier.build().map_err(|error| failed(&error))?)
            .with_cert_resolver(Arc::clone(&self.shown) as Arc<dyn ResolvesServerCert>))
    }

    /// How it connects to others.
    pub fn client(&self) -> Result<ClientConfig> {
        Ok(ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| Error::internal("set up TLS", &error))?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_cert_resolver(Arc::clone(&self.shown) as Arc<dyn ResolvesClientCert>))
    }
}

/// The certificate that is shown at present, with its key.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl Shown {
    fn now(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn own(credentials: &Credentials) -> Result<Arc<CertifiedKey>> {
    let key = PrivateKeyDer::from_pem_slice(credentials.key.as_bytes())
        .map_err(|error| Error::internal("read a key", &error))?;
    // With the authority's behind it: a host that enrols knows only that one's hash.
    let chain = vec![
        certificate(&credentials.certificate)?,
        certificate(&credentials.authority)?,
    ];
    // This compares the certificate and the key, too.
    let own = CertifiedKey::from_der(chain, key, &provider());
    Ok(Arc::new(own.map_err(|error| {
        Error::internal("use a certificate with its key", &error)
    })?))
}

/// How a host connects that has no certificate yet, and knows only the hash of the authority's.
pub fn stranger(fingerprint: &str) -> Result<ClientConfig> {
    let pinned = Pinned {
        fingerprint: fingerprint.to_owned(),
        provider: provider(),
    };
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Error::internal("set up TLS", &error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth())
}

/// What an authority is known by: the hash of its certificate, in hexadecimal digits.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

/// Believes the authority whose certificate has a known hash, and checks the server against it as
/// usual.
#[derive(Debug)]
struct Pinned {
    fingerprint: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        server: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::General("the controller is not the token's".into());
        let authority = others
            .iter()
            .find(|it| fingerprint(it) == self.fingerprint)
            .ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|_| unknown())?
            .verify_server_cert(server, &[], name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
