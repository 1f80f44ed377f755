//! The API over TLS, with certificates of the owner's.
#![allow(clippy::unwrap_used)]

mod served;

use std::path::Path;

use army::server::tls::{Files, config};
use army_api::client::{Client, ClientError};
use army_api::keys::Role;
use army_api::vms::VmPage;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// An authority that certifies servers of this host.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn certify(&self, files: &Files) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        // As a careful renewal does it; the times of files are what is looked at.
        let put = |path: &Path, text: String| {
            let new = path.with_extension("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, path).unwrap();
        };
        put(&files.key, key.serialize_pem());
        put(&files.certificate, certificate.pem());
    }
}

async fn list(client: &Client) -> Result<VmPage, ClientError> {
    client.get("/v1/vms", &()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_believe_the_authority_they_are_told_of_and_renewals_are_noticed() {
    let server = served::server(None).await;
    let key = served::create_key(&server.records, "root", Role::Admin, None).await;
    let files = Files {
        certificate: server.dir.path().join("cert.pem"),
        key: server.dir.path().join("key.pem"),
    };
    assert!(config(files.clone()).is_err(), "there is no file yet");
    let authority = Authority::new();
    authority.certify(&files);
    let url = server.over_tls(config(files.clone()).unwrap()).await;
    let believing = |authority: &Authority| {
        let pem = authority.0.pem();
        Client::believing(&url, &key.secret, pem.as_bytes()).unwrap()
    };
    assert_eq!(list(&believing(&authority)).await.unwrap().vms, []);
    let other = Authority::new();
    let refused = list(&believing(&other)).await.unwrap_err();
    assert!(refused.to_string().contains("certificate"), "{refused}");
    let plain = Client::new(url.replace("https", "http"), &key.secret).unwrap();
    assert!(list(&plain).await.is_err());
    // The same server, with a renewed certificate that the other authority gave.
    other.certify(&files);
    assert_eq!(list(&believing(&other)).await.unwrap().vms, []);
    assert!(list(&believing(&authority)).await.is_err());
    // What is no certificate does not end what works.
    std::fs::write(&files.certificate, "nothing").unwrap();
    assert_eq!(list(&believing(&other)).await.unwrap().vms, []);
    let empty = Client::believing(&url, &key.secret, b"nothing");
    assert!(matches!(empty, Err(ClientError::NoCertificate { .. })));
}

#[test]
fn a_key_of_another_certificate_is_noticed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let files = |name: &str| Files {
        certificate: dir.path().join(format!("{name}.crt")),
        key: dir.path().join(format!("{name}.key")),
    };
    let (one, two) = (files("one"), files("two"));
    let authority = Authority::new();
    authority.certify(&one);
    authority.certify(&two);
    let mixed = Files {
        certificate: one.certificate,
        key: two.key,
    };
    let error = config(mixed).unwrap_err();
    assert!(error.message.contains("two.key"), "{error}");
}
