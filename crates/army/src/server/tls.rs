//! TLS for clients, with a certificate that the operator provides.
//!
//! The files are read again when they have changed, so a certificate is renewed by replacing them.
//! Connections are accepted by [`army_node_api::cluster::tls`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use army_controller::{Error, ErrorKind, Result};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use army_node_api::cluster::tls::provider;

/// The files of a certificate, in PEM.
#[derive(Debug, Clone)]
pub struct Files {
    /// The server's certificate, followed by those that lead to an authority.
    pub certificate: PathBuf,
    /// The private key of the server's certificate.
    pub key: PathBuf,
}

/// The TLS configuration with the certificate in `files`.
///
/// # Errors
/// Where a file cannot be read, or the two do not belong together.
pub fn config(files: Files) -> Result<ServerConfig> {
    let current = files.read()?;
    let renewed = Renewed {
        current: Mutex::new(current),
        files,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid(format!("cannot set up TLS: {error}")))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(renewed));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A certificate, and when both of its files had been written when it was read.
#[derive(Clone)]
struct Read {
    key: Arc<CertifiedKey>,
    written: [Option<SystemTime>; 2],
}

impl Files {
    fn written(&self) -> [Option<SystemTime>; 2] {
        let time = |path: &Path| path.metadata().and_then(|it| it.modified()).ok();
        [time(&self.certificate), time(&self.key)]
    }

    fn read(&self) -> Result<Read> {
        // This precedes reading, so that files that are written meanwhile are read again.
        let written = self.written();
        let wrong = |path: &Path, error: &dyn fmt::Display| {
            invalid(format!("cannot use {}: {error}", path.display()))
        };
        let of_certificate = |error: &dyn fmt::Display| wrong(&self.certificate, error);
        let chain = CertificateDer::pem_file_iter(&self.certificate)
            .map_err(|error| of_certificate(&error))?
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| of_certificate(&error))?;
        if chain.is_empty() {
            return Err(of_certificate(&"it contains no certificate"));
        }
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|it| wrong(&self.key, &it))?;
        // This also checks that the two belong together.
        let key = CertifiedKey::from_der(chain, key, &provider())
            .map_err(|error| wrong(&self.key, &error))?;
        Ok(Read {
            key: Arc::new(key),
            written,
        })
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidRequest, message)
}

/// Resolves to the certificate that is in the files at present.
struct Renewed {
    files: Files,
    current: Mutex<Read>,
}

impl fmt::Debug for Renewed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Renewed")
            .field("files", &self.files)
            .finish()
    }
}

impl ResolvesServerCert for Renewed {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.files.written();
        if written != current.written {
            match self.files.read() {
                Ok(read) => *current = read,
                // One of the files may not be replaced yet: the next connection reads them again.
                Err(error) => tracing::warn!(%error, "keeping the previous certificate"),
            }
        }
        Some(Arc::clone(&current.key))
    }
}
