//! Images made by hand for tests.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::digest::Digest;

/// A layer under construction.
pub(crate) struct Layer {
    builder: Builder<Vec<u8>>,
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self {
            builder: Builder::new(Vec::new()),
        }
    }

    /// Any entry; the name is written as it is, whatever it is.
    pub(crate) fn entry(
        mut self,
        name: &str,
        kind: EntryType,
        data: &[u8],
        link: &str,
        mode: u32,
    ) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_size(data.len() as u64);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(100);
        header.set_mtime(1_600_000_000);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(5).unwrap();
            header.set_device_minor(1).unwrap();
        }
        header.set_cksum();
        self.builder.append(&header, data).unwrap();
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name, EntryType::Regular, data, "", 0o644)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.entry(name, EntryType::Directory, b"", "", 0o755)
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, EntryType::Symlink, b"", target, 0o777)
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(name, EntryType::Link, b"", target, 0o644)
    }

    /// Pax records for the entry that follows.
    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.builder
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    pub(crate) fn tar(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    Digest::sha256(bytes).to_string()
}

/// The configuration of an image of these tar streams.
pub(crate) fn config(tars: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
    serde_json::to_vec(&json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "LANG=C.UTF-8"], "WorkingDir": "/srv", "User": "app",
            "Entrypoint": ["/bin/app"], "Cmd": null,
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }))
    .unwrap()
}

/// Writes a blob into a layout and describes it.
pub(crate) fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = Digest::sha256(bytes);
    let path = layout.join(digest.blob_path());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
}

/// An OCI layout of gzipped layers.
pub(crate) fn layout(dir: &Path, tars: &[Vec<u8>]) -> PathBuf {
    let path = dir.join("layout");
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let layers: Vec<Value> = tars
        .iter()
        .map(|tar| {
            blob(
                &path,
                "application/vnd.oci.image.layer.v1.tar+gzip",
                &gzip(tar),
            )
        })
        .collect();
    let config = blob(
        &path,
        "application/vnd.oci.image.config.v1+json",
        &config(tars),
    );
    let manifest =
        serde_json::to_vec(&json!({"schemaVersion": 2, "config": config, "layers": layers}))
            .unwrap();
    let manifest = blob(
        &path,
        "application/vnd.oci.image.manifest.v1+json",
        &manifest,
    );
    write_index(&path, &[manifest]);
    path
}

pub(crate) fn write_index(layout: &Path, manifests: &[Value]) {
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(
        layout.join("index.json"),
        serde_json::to_vec(&index).unwrap(),
    )
    .unwrap();
}

/// An archive as `docker save` of version 24 and before writes it.
pub(crate) fn docker_archive(dir: &Path, tars: &[Vec<u8>]) -> PathBuf {
    let config = config(tars);
    let name = format!("{}.json", &digest(&config)[7..]);
    let layers: Vec<String> = (0..tars.len())
        .map(|n| format!("layer{n}/layer.tar"))
        .collect();
    let manifest = json!([{"Config": name, "RepoTags": ["app:latest"], "Layers": layers}]);
    let mut archive = Layer::new();
    for (layer, tar) in layers.iter().zip(tars) {
        archive = archive.file(layer, tar);
    }
    let archive = archive
        .file(&name, &config)
        .file("manifest.json", &serde_json::to_vec(&manifest).unwrap());
    let path = dir.join("saved.tar");
    fs::write(&path, archive.tar()).unwrap();
    path
}

/// Packs a directory of regular files as a tar.
pub(crate) fn pack(dir: &Path, into: &Path) {
    let mut builder = Builder::new(fs::File::create(into).unwrap());
    builder.append_dir_all(".", dir).unwrap();
    builder.finish().unwrap();
}
