//! A node's membership of a cluster: its name and its credentials, in one file.
//!
//! The controller asks from time to time whether the node wants a new certificate
//! ([`Membership::request_renewal`]) and brings it ([`Membership::install_certificate`]). The node
//! generates a new key each time, which never leaves the host.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use army_node_api::cluster::authority::{Credentials, NODE_LIFE, write_private};
use army_node_api::cluster::tls::Identity;
use army_node_api::time::now_ms;
use army_node_api::{Error, ErrorKind, Result};

/// The version of the file. A file of another version is refused.
const VERSION: u32 = 1;

/// The content of the file.
#[derive(Clone, Serialize, Deserialize)]
struct Record {
    version: u32,
    host: String,
    credentials: Credentials,
    /// When the certificate was issued, in milliseconds since 1970. It is missing where the host has
    /// joined with a former release, and the certificate is renewed then.
    #[serde(default)]
    certified_ms: u64,
}

struct State {
    record: Record,
    /// The key of the certificate that was requested.
    requested_key: Option<String>,
}

/// The membership of one node.
pub struct Membership {
    path: PathBuf,
    host: String,
    identity: Identity,
    state: Mutex<State>,
}

impl Membership {
    /// Reads the file at `path`; `None` where there is no file.
    ///
    /// # Errors
    /// Where the file cannot be read or used.
    pub fn open(path: PathBuf) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| unusable(&path, &error))?,
        };
        let record: Record =
            serde_json::from_str(&text).map_err(|error| unusable(&path, &error))?;
        if record.version != VERSION {
            let why = format!("it is of version {}, not {VERSION}", record.version);
            return Err(unusable(&path, &why));
        }
        Self::new(path, record).map(Some)
    }

    /// Records that `host` has just joined.
    pub fn join(path: PathBuf, host: String, credentials: Credentials) -> Result<Self> {
        let record = Record {
            version: VERSION,
            host,
            credentials,
            certified_ms: now_ms(),
        };
        write(&path, &record)?;
        Self::new(path, record)
    }

    fn new(path: PathBuf, record: Record) -> Result<Self> {
        Ok(Self {
            path,
            host: record.host.clone(),
            identity: Identity::new(&record.credentials)?,
            state: Mutex::new(State {
                record,
                requested_key: None,
            }),
        })
    }

    /// The host's name.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// How the node proves who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A signing request for a new key in PEM, where a third of the certificate's life is over.
    pub fn request_renewal(&self) -> Result<Option<String>> {
        let mut state = self.lock();
        let age = now_ms().saturating_sub(state.record.certified_ms);
        if u128::from(age) < NODE_LIFE.as_millis() / 3 {
            return Ok(None);
        }
        let (key, request) = Credentials::request()?;
        state.requested_key = Some(key);
        Ok(Some(request))
    }

    /// Installs the certificate in PEM that was last requested.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where none was requested, or it is for another key. The
    /// former one stays then.
    pub fn install_certificate(&self, certificate: &str) -> Result<()> {
        let mut state = self.lock();
        let conflict = |why: &str| Error::new(ErrorKind::Conflict, why.to_owned());
        let key = state
            .requested_key
            .clone()
            .ok_or_else(|| conflict("no certificate was requested"))?;
        let mut record = state.record.clone();
        record.credentials.certificate = certificate.to_owned();
        record.credentials.key = key;
        record.certified_ms = now_ms();
        // This precedes the write: a certificate that cannot be used would be read at the next
        // start.
        Identity::new(&record.credentials).map_err(|error| conflict(&error.message))?;
        write(&self.path, &record)?;
        self.identity.renew(&record.credentials)?;
        *state = State {
            record,
            requested_key: None,
        };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(path: &Path, record: &Record) -> Result<()> {
    let text = serde_json::to_string(record)
        .map_err(|error| Error::internal("serialize the membership", &error))?;
    write_private(path, &text)
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Error {
    let message = format!("cannot use {}: {error}", path.display());
    Error::new(ErrorKind::Internal, message)
        .advise("remove the file and let the host join again, with a new token")
}

#[cfg(test)]
mod tests {
    use army_node_api::cluster::Member;
    use army_node_api::cluster::authority::Authority;

    use super::*;

    #[test]
    fn a_certificate_is_renewed_when_a_third_of_its_life_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("membership.json");
        let authority = Authority::open(folder.path()).unwrap();
        let member = Member::Node("a".into());
        let credentials = authority.credentials(&member).unwrap();
        let fresh = Membership::join(path.clone(), "a".into(), credentials.clone()).unwrap();
        assert_eq!(fresh.request_renewal().unwrap(), None);
        assert_eq!(
            fresh.install_certificate("x").unwrap_err().kind,
            ErrorKind::Conflict
        );

        // As version 1 was first written, without a time.
        let old = serde_json::json!({"version": 1, "host": "a", "credentials": credentials});
        std::fs::write(&path, old.to_string()).unwrap();
        let old = Membership::open(path.clone()).unwrap().unwrap();
        assert_eq!(old.host(), "a");
        let request = old.request_renewal().unwrap().unwrap();
        // A certificate for another key is refused, and the node's own is installed once.
        let of_another = authority.credentials(&member).unwrap().certificate;
        let refused = old.install_certificate(&of_another).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        let renewed = authority.sign(&member, &request).unwrap();
        old.install_certificate(&renewed).unwrap();
        assert_eq!(old.request_renewal().unwrap(), None);
        assert_eq!(
            old.install_certificate(&renewed).unwrap_err().kind,
            ErrorKind::Conflict
        );

        let again = Membership::open(path.clone()).unwrap().unwrap();
        assert_eq!(again.lock().record.credentials.certificate, renewed);
        assert_eq!(again.request_renewal().unwrap(), None);
    }

    #[test]
    fn files_of_another_version_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("membership.json");
        assert!(Membership::open(path.clone()).unwrap().is_none());
        let credentials = r#"{"authority": "", "certificate": "", "key": ""}"#;
        let text = format!(r#"{{"version": 2, "host": "a", "credentials": {credentials}}}"#);
        std::fs::write(&path, text).unwrap();
        let error = Membership::open(path).err().unwrap();
        assert!(error.message.contains("version 2"), "{error}");
    }
}
