//! What a template says of itself: `manifest.json`, for people and for programs.
//!
//! A manifest may come from a hostile hand: names in it are plain names of files beside it, and
//! what it says of them is checked against them.

use std::path::{Component, Path};

use clone_api::control::CpuFeatures;
use clone_api::{ApiError, ErrorCode, VmConfig};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The format that is written, and the newest that is read.
pub const FORMAT: u32 = 1;
/// The manifest's name in its directory.
pub const FILE: &str = "manifest.json";
/// The largest manifest that is read.
pub const MAX_BYTES: u64 = 1 << 20;
/// The most layers of memory, and of each disk.
const MAX_LAYERS: usize = 250;

/// A template's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`]. Read first: a newer one has other fields.
    pub format: u32,
    /// The hash of what follows, and so of all content: 32 hexadecimal digits.
    pub id: String,
    /// What is described.
    #[serde(flatten)]
    pub content: Content,
}

/// What a template is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// The template or snapshot that this one is a difference to. All of it is in here, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// When it was taken, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The version of the program that took it.
    pub version: String,
    /// The version of the guest's agent, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// The VM that it was taken of.
    pub config: VmConfig,
    /// RAM.
    pub memory: Memory,
    /// The machine's state.
    pub state: HashedFile,
    /// Disks, in the order of the description.
    pub disks: Vec<Disk>,
    /// What the guest was told of its CPU.
    pub cpu: CpuFeatures,
}

/// The RAM of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Its size.
    pub bytes: u64,
    /// Its layers, the base first.
    pub layers: Vec<MemoryLayer>,
}

/// A memory layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayer {
    /// Its file.
    pub file: String,
    /// Its id, which is a hash over its checksums.
    pub id: String,
    /// How much data it holds.
    pub data_bytes: u64,
}

/// A file and its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedFile {
    /// Its name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Its hash, by [`super::hash_of`].
    pub hash: String,
}

/// A disk of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The base image, in raw format.
    pub base: HashedFile,
    /// Layers over it, the lowest first.
    pub layers: Vec<HashedFile>,
}

impl Content {
    /// The id of a template with this content.
    pub fn id(&self) -> Result<String> {
        let value = serde_json::to_value(self).map_err(|error| ApiError::internal(&error))?;
        id_of(&value).map_err(|error| ApiError::internal(&error))
    }

    /// The files beside the manifest.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let memory = self.memory.layers.iter().map(|layer| layer.file.as_str());
        memory.chain(self.hashed().map(|file| file.file.as_str()))
    }

    /// Those that have their hash here.
    pub fn hashed(&self) -> impl Iterator<Item = &HashedFile> {
        let disks = self.disks.iter();
        std::iter::once(&self.state)
            .chain(disks.flat_map(|disk| std::iter::once(&disk.base).chain(&disk.layers)))
    }
}

/// The hash of a description as it stands in the file, whatever fields a later version knows.
fn id_of(content: &serde_json::Value) -> serde_json::Result<String> {
    // Keys are sorted in here.
    let text = serde_json::to_vec(content)?;
    Ok(blake3::hash(&text).to_hex()[..32].to_owned())
}

impl Manifest {
    /// Reads a manifest's text.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let refuse = |reason: String| refused(path, &reason);
        let Version { format } =
            serde_json::from_slice(text).map_err(|error| refuse(error.to_string()))?;
        if format != FORMAT {
            return Err(refuse(format!(
                "it is of format {format}, and this version reads {FORMAT}"
            ))
            .advise("use the version of clone that made it, or a newer one"));
        }
        let wrong = |error: serde_json::Error| refuse(error.to_string());
        let manifest: Self = serde_json::from_slice(text).map_err(wrong)?;
        let mut content: serde_json::Value = serde_json::from_slice(text).map_err(wrong)?;
        if let Some(fields) = content.as_object_mut() {
            fields.retain(|name, _| name != "format" && name != "id");
        }
        let id = id_of(&content).map_err(wrong)?;
        if id != manifest.id {
            let reason = format!("its content is not what its id says, but that of {id}");
            return Err(refuse(reason));
        }
        manifest.check().map_err(refuse)?;
        Ok(manifest)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let content = &self.content;
        let layers = content.disks.iter().map(|disk| disk.layers.len());
        let most = layers.chain([content.memory.layers.len()]).max();
        if most.unwrap_or(0) > MAX_LAYERS {
            return Err(format!("more than {MAX_LAYERS} layers"));
        }
        if content.memory.layers.is_empty() {
            return Err("it has no memory".to_owned());
        }
        let (held, told) = (content.memory.bytes, content.config.memory.0);
        if held != told {
            return Err(format!("it holds {held} bytes of RAM for a VM of {told}"));
        }
        if content.disks.len() != content.config.disks.len() {
            return Err("its disks are not those that it describes".to_owned());
        }
        match content.files().find(|name| !is_plain_name(name)) {
            Some(name) => Err(format!("{name:?} is no name of a file in it")),
            None => Ok(()),
        }
    }
}

/// Whether it names something in a directory and nothing anywhere else.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let first = matches!(parts.next(), Some(Component::Normal(part)) if part == name);
    first && parts.next().is_none() && name != FILE
}

pub(super) fn refused(path: &Path, reason: &str) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidConfig,
        format!(
            "{} is no template that can be used: {reason}",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> HashedFile {
        HashedFile {
            file: name.to_owned(),
            bytes: 1,
            hash: "00".to_owned(),
        }
    }

    pub(in crate::template) fn content() -> Content {
        Content {
            parent: None,
            created_unix_ms: 1_790_000_000_000,
            version: "0.1.0".to_owned(),
            agent_version: Some("0.1.0".to_owned()),
            config: VmConfig::default(),
            memory: Memory {
                bytes: 512 << 20,
                layers: vec![MemoryLayer {
                    file: "memory-0.layer".to_owned(),
                    id: "ab".to_owned(),
                    data_bytes: 4096,
                }],
            },
            state: file("state"),
            disks: Vec::new(),
            cpu: CpuFeatures::default(),
        }
    }

    fn text(content: Content) -> Vec<u8> {
        let id = content.id().unwrap();
        let format = FORMAT;
        serde_json::to_vec_pretty(&Manifest {
            format,
            id,
            content,
        })
        .unwrap()
    }

    #[test]
    fn the_first_format_is_still_read() {
        let golden = include_bytes!("manifest-v1.json");
        let manifest = Manifest::parse(golden, Path::new("golden")).unwrap();
        assert_eq!(manifest.content, content());
    }

    #[test]
    fn names_that_lead_out_of_the_directory_are_refused() {
        for name in ["../x", "/x", "a/b", "", ".", "..", "a/", "manifest.json"] {
            let mut bad = content();
            bad.state.file = name.to_owned();
            let error = Manifest::parse(&text(bad), Path::new("t")).unwrap_err();
            assert!(error.message.contains("no name of a file"), "{error}");
        }
    }

    #[test]
    fn what_was_changed_after_the_fact_and_what_is_newer_is_refused() {
        let good = String::from_utf8(text(content())).unwrap();
        for (from, to, word) in [
            (
                "\"bytes\": 536870912",
                "\"bytes\": 536870913",
                "its id says",
            ),
            ("\"format\": 1", "\"format\": 2", "format 2"),
            ("\"memory\"", "\"memori\"", "memory"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            let error = Manifest::parse(bad.as_bytes(), Path::new("t")).unwrap_err();
            assert!(error.message.contains(word), "{error}");
        }
        for cut in [0, 1, good.len() / 2, good.len() - 1] {
            assert!(Manifest::parse(&good.as_bytes()[..cut], Path::new("t")).is_err());
        }
    }
}
