//! What a node keeps of having joined: its name and its credentials, and new ones in good time.
//!
//! The controller asks now and then whether a certificate is wanted ([`Membership::request`]) and
//! brings it ([`Membership::take`]). The key is made here, anew each time, and never leaves.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use army_node_api::cluster::authority::{Credentials, NODE_LIFE, write_private};
use army_node_api::cluster::tls::Identity;
use army_node_api::time::now_ms;
use army_node_api::{Error, ErrorKind, Result};

/// Files of another version are not read.
const VERSION: u32 = 1;

/// What is in the file.
#[derive(Clone, Serialize, Deserialize)]
struct Known {
    version: u32,
    host: String,
    credentials: Credentials,
    /// When the certificate was taken, in milliseconds since 1970. Those who joined a former version
    /// do not know, and have it renewed.
    #[serde(default)]
    certified_ms: u64,
}

struct State {
    known: Known,
    /// The key of the certificate that was asked for.
    asked: Option<String>,
}

/// See the module.
pub struct Membership {
    path: PathBuf,
    host: String,
    identity: Identity,
    state: Mutex<State>,
}

impl Membership {
    /// What is remembered in the file at `path`; none where there is no file.
    ///
    /// # Errors
    /// Where it cannot be read or used.
    pub fn open(path: PathBuf) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| wrong(&path, &error))?,
        };
        let known: Known = serde_json::from_str(&text).map_err(|error| wrong(&path, &error))?;
        if known.version != VERSION {
            let why = format!("it is of version {}, not {VERSION}", known.version);
            return Err(wrong(&path, &why));
        }
        Self::new(path, known).map(Some)
    }

    /// Writes down that `host` has just joined.
    pub fn join(path: PathBuf, host: String, credentials: Credentials) -> Result<Self> {
        let known = Known {
            version: VERSION,
            host,
            credentials,
            certified_ms: now_ms(),
        };
        write(&path, &known)?;
        Self::new(path, known)
    }

    fn new(path: PathBuf, known: Known) -> Result<Self> {
        Ok(Self {
            path,
            host: known.host.clone(),
            identity: Identity::new(&known.credentials)?,
            state: Mutex::new(State { known, asked: None }),
        })
    }

    /// What the host is called.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// How the node shows who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A request to certify a new key, in PEM, where a third of the certificate's life is over.
    pub fn request(&self) -> Result<Option<String>> {
        let mut state = self.lock();
        let age = now_ms().saturating_sub(state.known.certified_ms);
        if u128::from(age) < NODE_LIFE.as_millis() / 3 {
            return Ok(None);
        }
        let (key, request) = Credentials::request()?;
        state.asked = Some(key);
        Ok(Some(request))
    }

    /// Takes the certificate, in PEM, that was last asked for.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where none was, or it is for another key; the former one stays.
    pub fn take(&self, certificate: &str) -> Result<()> {
        let mut state = self.lock();
        let conflict = |why: &str| Error::new(ErrorKind::Conflict, why.to_owned());
        let key = state
            .asked
            .clone()
            .ok_or_else(|| conflict("no certificate was asked for"))?;
        let mut known = state.known.clone();
        known.credentials.certificate = certificate.to_owned();
        known.credentials.key = key;
        known.certified_ms = now_ms();
        // Before it is written: one that cannot be used is not found at the next start either.
        Identity::new(&known.credentials).map_err(|error| conflict(&error.message))?;
        write(&self.path, &known)?;
        self.identity.renew(&known.credentials)?;
        *state = State { known, asked: None };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(path: &Path, known: &Known) -> Result<()> {
    let text =
        serde_json::to_string(known).map_err(|error| Error::internal("write it down", &error))?;
    write_private(path, &text)
}

fn wrong(path: &Path, error: &dyn std::fmt::Display) -> Error {
    let detail = format!("cannot use {}: {error}", path.display());
    Error::new(ErrorKind::Internal, detail)
        .advise("with that file removed, the host joins anew, with a token")
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
        assert_eq!(fresh.request().unwrap(), None);
        assert_eq!(fresh.take("x").unwrap_err().kind, ErrorKind::Conflict);

        // As version 1 was first written, without a time.
        let old = serde_json::json!({"version": 1, "host": "a", "credentials": credentials});
        std::fs::write(&path, old.to_string()).unwrap();
        let old = Membership::open(path.clone()).unwrap().unwrap();
        assert_eq!(old.host(), "a");
        let request = old.request().unwrap().unwrap();
        // One for another key is refused, and one's own taken once.
        let of_another = authority.credentials(&member).unwrap().certificate;
        let refused = old.take(&of_another).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        let renewed = authority.sign(&member, &request).unwrap();
        old.take(&renewed).unwrap();
        assert_eq!(old.request().unwrap(), None);
        assert_eq!(old.take(&renewed).unwrap_err().kind, ErrorKind::Conflict);

        let again = Membership::open(path.clone()).unwrap().unwrap();
        assert_eq!(again.lock().known.credentials.certificate, renewed);
        assert_eq!(again.request().unwrap(), None);
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
