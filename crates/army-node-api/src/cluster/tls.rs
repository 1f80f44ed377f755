//! Connections on which both sides show a certificate of the same authority.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio_rustls::server::TlsStream;

use super::Member;
use super::authority::Credentials;
use crate::{Error, Result};

/// The other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The peer's address.
    pub address: SocketAddr,
    /// The member that the peer's certificate names; `None` where it has no certificate.
    pub member: Option<Member>,
}

/// The member that the certificate of a peer names.
pub(crate) fn member_of<S>(stream: &TlsStream<S>) -> Option<Member> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    certificate.valid_dns_names().find_map(Member::of_dns_name)
}

/// The provider of cryptography for all connections.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads a certificate in PEM.
pub fn certificate(pem: &str) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| Error::internal("read a certificate", &error))
}

/// The identity of a process in its cluster. Its certificate can be renewed while there are
/// connections.
#[derive(Clone)]
pub struct Identity {
    roots: Arc<RootCertStore>,
    shown: Arc<Shown>,
}

impl Identity {
    /// The identity with these credentials.
    ///
    /// # Errors
    /// Where the credentials cannot be read, or do not belong together.
    pub fn new(credentials: &Credentials) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots
            .add(certificate(&credentials.authority)?)
            .map_err(|error| Error::internal("trust the authority", &error))?;
        Ok(Self {
            roots: Arc::new(roots),
            shown: Arc::new(Shown(RwLock::new(own(credentials)?))),
        })
    }

    /// Uses other credentials of the same authority from the next connection on.
    ///
    /// # Errors
    /// The same as [`Identity::new`]; the former credentials stay.
    pub fn renew(&self, credentials: &Credentials) -> Result<()> {
        let own = own(credentials)?;
        *self.shown.0.write().unwrap_or_else(PoisonError::into_inner) = own;
        Ok(())
    }

    /// The configuration of a server for members. With `strangers`, peers without a certificate are
    /// accepted, too; the service decides what they may do.
    pub fn server(&self, strangers: bool) -> Result<ServerConfig> {
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

    /// The configuration for connecting to other members.
    pub fn client(&self) -> Result<ClientConfig> {
        Ok(ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| Error::internal("set up TLS", &error))?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_cert_resolver(Arc::clone(&self.shown) as Arc<dyn ResolvesClientCert>))
    }
}

/// The certificate that is shown to peers at present, with its key.
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
    // The authority's certificate follows: a host that joins knows only its fingerprint.
    let chain = vec![
        certificate(&credentials.certificate)?,
        certificate(&credentials.authority)?,
    ];
    // This also checks that the certificate and the key belong together.
    let own = CertifiedKey::from_der(chain, key, &provider());
    Ok(Arc::new(own.map_err(|error| {
        Error::internal("use a certificate with its key", &error)
    })?))
}

/// The configuration of a host that has no certificate yet, and knows only the fingerprint of the
/// authority.
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

/// The fingerprint of an authority: the hash of its certificate in hexadecimal digits.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

/// Trusts the authority with a known fingerprint, and verifies the server against it as usual.
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
