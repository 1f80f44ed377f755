//! Pulls from a small registry on the loopback interface.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::cpu_level::CpuLevel;
use super::digest::Digest;
use super::oci::Wanted;
use super::pull::{Credentials, RegistryImage, pull};
use super::testing::*;
use crate::{ImageError, Result, RootfsSpec, Source, build_rootfs};

/// What the registry does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Breaks off in the middle of every blob's first transfer.
    BreaksOffOnce,
    BreaksOffAlways,
    /// Sends other content of the right length.
    Lies,
    /// Sends more than the manifest says.
    TooLong,
    WantsLogin,
}

struct Registry {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

type Files = HashMap<String, (String, Vec<u8>)>;

/// Serves a layout's blobs as `app`, its manifest by the tag `v1`, behind an index with another platform.
fn serve(layout: &Path, fault: Fault) -> Registry {
    let mut files: Files = HashMap::new();
    for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        let digest = Digest::sha256(&bytes);
        let manifest = "application/vnd.oci.image.manifest.v1+json".to_owned();
        files.insert(
            format!("/v2/app/manifests/{digest}"),
            (manifest, bytes.clone()),
        );
        files.insert(
            format!("/v2/app/blobs/{digest}"),
            ("application/octet-stream".to_owned(), bytes),
        );
    }
    let mut index: Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    index["manifests"][0]["platform"] = json!({"architecture": "amd64", "os": "linux"});
    let arm = json!({"digest": format!("sha256:{}", "0".repeat(64)), "size": 1,
        "platform": {"architecture": "arm64", "os": "linux"}});
    index["manifests"].as_array_mut().unwrap().insert(0, arm);
    let kind = "application/vnd.oci.image.index.v1+json".to_owned();
    files.insert(
        "/v2/app/manifests/v1".to_owned(),
        (kind, serde_json::to_vec(&index).unwrap()),
    );

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let Some(Ok(request)) = lines.next() else {
                continue;
            };
            while lines
                .next()
                .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
            {}
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            log.lock().unwrap().push(path.clone());
            let seen = log.lock().unwrap().iter().filter(|p| **p == path).count();
            let _ = stream.write_all(&answer(&files, &path, fault, seen));
        }
    });
    Registry { address, asked }
}

fn answer(files: &Files, path: &str, fault: Fault, seen: usize) -> Vec<u8> {
    let reply = |status: &str, kind: &str, length: usize, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        [head.as_bytes(), body].concat()
    };
    if fault == Fault::WantsLogin {
        let body = br#"{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}"#;
        return reply("401 Unauthorized", "application/json", body.len(), body);
    }
    if path.starts_with("/v2/") && path.len() < 5 {
        return reply("200 OK", "application/json", 2, b"{}");
    }
    let Some((kind, bytes)) = files.get(path) else {
        let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#;
        return reply("404 Not Found", "application/json", body.len(), body);
    };
    let mut body = bytes.clone();
    if path.contains("/blobs/") {
        match fault {
            Fault::BreaksOffOnce if seen == 1 => {
                return reply("200 OK", kind, body.len(), &body[..body.len() / 2]);
            }
            Fault::BreaksOffAlways => {
                return reply("200 OK", kind, body.len(), &body[..body.len() / 2]);
            }
            Fault::Lies => body[0] ^= 1,
            Fault::TooLong => body.extend_from_slice(&[0; 10_000]),
            _ => {}
        }
    }
    reply("200 OK", kind, body.len(), &body)
}

fn image(registry: &Registry, tag: &str, blobs: &Path) -> RegistryImage {
    RegistryImage {
        reference: format!("{}/app:{tag}", registry.address),
        blobs: blobs.to_owned(),
        credentials: Credentials::Anonymous,
        plain_http: true,
    }
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        Layer::new().file("bin/app", &[5; 10_000]).tar(),
        Layer::new().file("srv/data", b"x").tar(),
    ]
}

fn try_pull(fault: Fault) -> (Result<Digest>, tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().unwrap();
    let registry = serve(&layout(dir.path(), &layers()), fault);
    let blobs = dir.path().join("blobs-here");
    let wanted = Wanted {
        reference: None,
        architecture: "amd64",
        level: CpuLevel::BASE,
    };
    (
        pull(&image(&registry, "v1", &blobs), wanted, 1 << 30, &()),
        dir,
        registry,
    )
}

/// Temporary files that were left behind.
fn leftovers(dir: &Path) -> usize {
    let names = fs::read_dir(dir.join("blobs-here")).unwrap();
    names
        .filter(|e| {
            e.as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with('.')
        })
        .count()
}

#[test]
fn an_image_is_pulled_built_and_not_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let registry = serve(&layout(dir.path(), &layers()), Fault::None);
    let source = Source::Registry(image(&registry, "v1", &dir.path().join("blobs-here")));
    let mut spec = RootfsSpec::new(source, dir.path().join("disk"));
    let report = build_rootfs(&spec, &()).unwrap();
    assert_eq!(report.config.entrypoint, ["/bin/app"]);
    let fetched = |what: &str| {
        registry
            .asked
            .lock()
            .unwrap()
            .iter()
            .filter(|p| p.contains(what))
            .count()
    };
    assert_eq!(fetched("/blobs/"), 3, "a configuration and two layers");
    spec.replace = true;
    build_rootfs(&spec, &()).unwrap();
    assert_eq!(
        fetched("/blobs/"),
        3,
        "blobs that are here are not fetched again"
    );
    assert_eq!(leftovers(dir.path()), 0);
}

#[test]
fn a_transfer_that_breaks_off_is_tried_again() {
    let (result, dir, registry) = try_pull(Fault::BreaksOffOnce);
    result.unwrap();
    assert_eq!(
        registry
            .asked
            .lock()
            .unwrap()
            .iter()
            .filter(|p| p.contains("/blobs/"))
            .count(),
        6
    );
    assert_eq!(leftovers(dir.path()), 0);
}

#[test]
fn a_registry_that_always_breaks_off_is_given_up() {
    let (result, dir, registry) = try_pull(Fault::BreaksOffAlways);
    assert!(matches!(result, Err(ImageError::Registry { .. })));
    assert_eq!(
        registry
            .asked
            .lock()
            .unwrap()
            .iter()
            .filter(|p| p.contains("/blobs/"))
            .count(),
        3
    );
    assert_eq!(leftovers(dir.path()), 0);
}

#[test]
fn content_that_is_not_what_was_promised_is_refused() {
    for fault in [Fault::Lies, Fault::TooLong] {
        let (result, dir, _registry) = try_pull(fault);
        result.unwrap_err();
        assert_eq!(leftovers(dir.path()), 0);
        let kept = fs::read_dir(dir.path().join("blobs-here/blobs/sha256"))
            .unwrap()
            .count();
        assert_eq!(kept, 2, "the index and the manifest, no blob");
    }
}

#[test]
fn what_the_registry_refuses_is_said_with_advice() {
    let (result, _dir, _registry) = try_pull(Fault::WantsLogin);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("log in"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let registry = serve(&layout(dir.path(), &layers()), Fault::None);
    let wanted = Wanted {
        reference: None,
        architecture: "amd64",
        level: CpuLevel::BASE,
    };
    let error = pull(&image(&registry, "v2", dir.path()), wanted, 1 << 30, &())
        .unwrap_err()
        .to_string();
    assert!(error.contains("v2") && error.contains("check"), "{error}");
    let wanted = Wanted {
        reference: None,
        architecture: "riscv64",
        level: CpuLevel::BASE,
    };
    let error = pull(&image(&registry, "v1", dir.path()), wanted, 1 << 30, &())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("linux/riscv64") && error.contains("linux/arm64"),
        "{error}"
    );
    let mut bad = image(&registry, "v1", dir.path());
    bad.reference = "Not A Name".to_owned();
    let wanted = Wanted {
        reference: None,
        architecture: "amd64",
        level: CpuLevel::BASE,
    };
    assert!(
        pull(&bad, wanted, 1 << 30, &())
            .unwrap_err()
            .to_string()
            .contains("no image reference")
    );
}

#[test]
fn an_image_beyond_the_limit_is_not_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let registry = serve(&layout(dir.path(), &layers()), Fault::None);
    let wanted = Wanted {
        reference: None,
        architecture: "amd64",
        level: CpuLevel::BASE,
    };
    let result = pull(&image(&registry, "v1", dir.path()), wanted, 10, &());
    assert!(matches!(result, Err(ImageError::Limit { .. })));
    assert!(
        !registry
            .asked
            .lock()
            .unwrap()
            .iter()
            .any(|p| p.contains("/blobs/"))
    );
}
