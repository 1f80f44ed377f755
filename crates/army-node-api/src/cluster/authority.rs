//! The authority that signs the certificates of one cluster.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde::{Deserialize, Serialize};

use super::Member;
use crate::{Error, ErrorKind, Result};

/// How long a node's certificate is valid. It is renewed before it expires, so this is how long a
/// host may be away, and how long other hosts trust one that was removed.
pub const NODE_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// How long the controller's certificate is valid, which is issued anew at each start.
const CONTROLLER_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long the authority's own certificate is valid.
const AUTHORITY_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// The most that clocks of hosts may differ.
const SKEW: Duration = Duration::from_secs(24 * 3600);

/// What a process proves its identity with, and the authority that it trusts.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    /// The authority's certificate in PEM.
    pub authority: String,
    /// The process's own certificate in PEM.
    pub certificate: String,
    /// The private key of that certificate in PEM.
    pub key: String,
}

impl Credentials {
    /// Generates a key, and a signing request for it. Both are in PEM.
    pub fn request() -> Result<(String, String)> {
        let failed = |error: rcgen::Error| Error::internal("generate a key", &error);
        let key = KeyPair::generate().map_err(failed)?;
        let request = CertificateParams::default()
            .serialize_request(&key)
            .and_then(|request| request.pem())
            .map_err(failed)?;
        Ok((key.serialize_pem(), request))
    }
}

/// The certificate authority, which only the controller has.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Opens the authority in `folder`, which is created where there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let (certificate, key) = (folder.join("authority.pem"), folder.join("authority.key"));
        if !certificate.exists() {
            make(&certificate, &key)?;
        }
        let read = |path: &Path| {
            fs::read_to_string(path)
                .map_err(|error| Error::internal(&format!("read {}", path.display()), &error))
        };
        let text = read(&certificate)?;
        let wrong = |error: rcgen::Error| Error::internal("read the authority", &error);
        let key = KeyPair::from_pem(&read(&key)?).map_err(wrong)?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_pem(&text, key).map_err(wrong)?,
            certificate: text,
        })
    }

    /// The authority's certificate in PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Certifies that the owner of the key in `request` is `member`. Names in the request itself are
    /// ignored.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidRequest`] where it is not a signing request in PEM.
    pub fn sign(&self, member: &Member, request: &str) -> Result<String> {
        let invalid = |error: rcgen::Error| {
            let message = format!("the request for a certificate cannot be read: {error}");
            Error::new(ErrorKind::InvalidRequest, message)
        };
        let mut request = CertificateSigningRequestParams::from_pem(request).map_err(invalid)?;
        request.params = describe(member)?;
        let signed = request.signed_by(&self.issuer);
        Ok(signed
            .map_err(|error| Error::internal("sign a certificate", &error))?
            .pem())
    }

    /// Issues credentials for a process of this host.
    pub fn credentials(&self, member: &Member) -> Result<Credentials> {
        let (key, request) = Credentials::request()?;
        Ok(Credentials {
            authority: self.certificate.clone(),
            certificate: self.sign(member, &request)?,
            key,
        })
    }
}

fn make(certificate: &Path, key: &Path) -> Result<()> {
    let failed = |error: rcgen::Error| Error::internal("create a certificate authority", &error);
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "Army's own authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    set_time(&mut params, AUTHORITY_LIFE);
    let pair = KeyPair::generate().map_err(failed)?;
    let text = params.self_signed(&pair).map_err(failed)?.pem();
    // The certificate is written last: without it, both are created anew.
    write_private(key, &pair.serialize_pem())?;
    write_private(certificate, &text)
}

fn describe(member: &Member) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    let name = member.dns_name();
    let dns = name
        .clone()
        .try_into()
        .map_err(|error: rcgen::Error| Error::internal("name a host", &error))?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::DnsName(dns)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    let life = match member {
        Member::Controller => CONTROLLER_LIFE,
        Member::Node(_) => NODE_LIFE,
    };
    set_time(&mut params, life);
    Ok(params)
}

fn set_time(params: &mut CertificateParams, life: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - SKEW).into();
    params.not_after = (now + life).into();
}

/// Writes a file that only its owner can read. It appears as a whole or not at all.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    clone_base::file::replace(path, 0o600, text.as_bytes())
        .map_err(|error| Error::internal(&format!("write {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_authority_is_stored_and_its_key_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let first = Authority::open(folder.path()).unwrap();
        let again = Authority::open(folder.path()).unwrap();
        assert_eq!(first.certificate(), again.certificate());
        let mode = fs::metadata(folder.path().join("authority.key")).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
        again.credentials(&Member::Node("a".into())).unwrap();
    }

    #[test]
    fn text_that_is_not_a_signing_request_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(folder.path()).unwrap();
        let error = authority.sign(&Member::Controller, "x").unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidRequest);
    }
}
