//! The content of a template as its manifest describes it, and the rules for every description.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use clone_api::control::CpuFeatures;
use clone_api::shape::Ceilings;
use clone_api::validate::validate_shape;
use clone_api::{ApiError, Shape};
use clone_start::error::Result;
use clone_vmm::snapshot::{self, CpuProfile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::names;

/// The largest kernel of a template, in bytes, which is also the largest that is booted.
pub const MAX_KERNEL_BYTES: u64 = 1 << 30;
/// The most layers of memory, and of each disk.
const MAX_LAYERS: usize = 250;
/// The longest version of a program, and the longest CPU vendor name, in bytes.
const MAX_WORD: usize = 64;
/// The size limit of all files of a template together, in bytes.
pub const MAX_TOTAL_BYTES: u64 = 1 << 48;

/// The content of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    /// The template or snapshot that this one is a difference to. This template contains all of its
    /// files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The time when the template was taken, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The version of the program that took the template.
    pub version: String,
    /// The version of the guest's agent, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// The machine that the template was taken of, as its guest sees it.
    pub shape: Shape,
    /// The limits that forks are narrowed to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ceilings: Ceilings,
    /// The RAM.
    pub memory: Memory,
    /// The machine's state.
    pub state: HashedFile,
    /// The disks, in the order of the shape.
    pub disks: Vec<Disk>,
    /// The kernel that the guest boots when it reboots; absent in an older format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<HashedFile>,
    /// The initial RAM disk that goes with the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<HashedFile>,
    /// The CPU features that the guest was given.
    pub cpu: CpuFeatures,
}

fn is_default(ceilings: &Ceilings) -> bool {
    *ceilings == Ceilings::default()
}

/// The RAM of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The size in bytes.
    pub bytes: u64,
    /// The layers, the base first.
    pub layers: Vec<MemoryLayer>,
}

/// A memory layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryLayer {
    /// The name of the layer's file.
    pub file: String,
    /// The size of the file; absent in format 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The layer's id, which is a hash over its checksums.
    pub id: String,
    /// The amount of data in the layer, in bytes.
    pub data_bytes: u64,
}

/// A file and its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashedFile {
    /// The file's name.
    pub file: String,
    /// The file's size in bytes.
    pub bytes: u64,
    /// The file's hash, by [`super::hash_of`].
    pub hash: String,
}

/// A disk of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

    /// The files besides the manifest, in the order in which they are transferred.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.sizes().map(|(file, _)| file)
    }

    /// The files and their sizes, which format 1 does not give for all.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, Option<u64>)> {
        let memory = self.memory.layers.iter();
        let memory = memory.map(|layer| (layer.file.as_str(), layer.bytes));
        memory.chain(self.hashed().map(|it| (it.file.as_str(), Some(it.bytes))))
    }

    /// The files whose hashes are in the manifest.
    pub fn hashed(&self) -> impl Iterator<Item = &HashedFile> {
        let disks = self.disks.iter();
        std::iter::once(&self.state)
            .chain(disks.flat_map(|disk| std::iter::once(&disk.base).chain(&disk.layers)))
            .chain(self.kernel.iter().chain(&self.initrd))
    }

    /// Checks the description's own consistency; the error is one sentence.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        self.check_words()?;
        self.check_shape()?;
        self.check_names()?;
        self.check_sizes()
    }

    fn check_words(&self) -> std::result::Result<(), String> {
        let words = [&self.version, &self.cpu.vendor];
        for word in words.into_iter().chain(&self.agent_version) {
            if word.len() > MAX_WORD || word.chars().any(char::is_control) {
                return Err(format!("{word:?} is neither a version nor a maker"));
            }
        }
        if let Some(id) = self
            .parent
            .as_ref()
            .filter(|id| !is_hex(id, ID_DIGITS..=ID_DIGITS))
        {
            return Err(format!("its parent {id:?} is no id of a template"));
        }
        let mut features = self.cpu.features.keys();
        match features.find(|name| !CpuProfile::is_word(name)) {
            Some(name) => Err(format!(
                "it needs CPU features ({name:?}) that this version does not know"
            )),
            None => Ok(()),
        }
    }

    fn check_shape(&self) -> std::result::Result<(), String> {
        let problems = validate_shape(&self.shape, &self.ceilings);
        if !problems.is_empty() {
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            return Err(format!(
                "its machine cannot be made: {}",
                problems.join("; ")
            ));
        }
        let (held, wanted) = (self.memory.bytes, self.shape.memory.0);
        if held != wanted {
            return Err(format!("it holds {held} bytes of RAM for a VM of {wanted}"));
        }
        if self.disks.len() != self.shape.disks.len() {
            return Err("its disks are not those of its machine".to_owned());
        }
        if self.initrd.is_some() && self.kernel.is_none() {
            return Err("it has an initial RAM disk and no kernel".to_owned());
        }
        Ok(())
    }

    fn check_names(&self) -> std::result::Result<(), String> {
        let layers = self.disks.iter().map(|disk| disk.layers.len());
        let most = layers.chain([self.memory.layers.len()]).max();
        if most.unwrap_or(0) > MAX_LAYERS {
            return Err(format!("more than {MAX_LAYERS} layers"));
        }
        if self.memory.layers.is_empty() {
            return Err("it has no memory".to_owned());
        }
        let mut seen = BTreeSet::new();
        for name in self.files() {
            if !names::is_plain_name(name) || !names::is_file_of_a_template(name) {
                return Err(format!("{name:?} cannot name a file of a template"));
            }
            if !seen.insert(name) {
                return Err(format!("{name} is named twice"));
            }
        }
        let hashes = self.hashed().map(|file| (&file.file, &file.hash));
        let layers = self.memory.layers.iter();
        let mut hashes = hashes.chain(layers.map(|layer| (&layer.file, &layer.id)));
        match hashes.find(|(_, hash)| !is_hex(hash, 1..=HASH_DIGITS)) {
            Some((file, _)) => Err(format!("{file} has no hash")),
            None => Ok(()),
        }
    }

    /// Checks that no file is larger than its part of the machine can need.
    fn check_sizes(&self) -> std::result::Result<(), String> {
        let limits = self.limits();
        let sizes = self.sizes().map(|(file, bytes)| (file, bytes.unwrap_or(0)));
        let mut total = 0_u64;
        for ((file, bytes), limit) in sizes.zip(limits) {
            if bytes > limit {
                return Err(format!("{file} has {bytes} bytes, more than {limit}"));
            }
            total = total.saturating_add(bytes);
        }
        if total > MAX_TOTAL_BYTES {
            return Err(format!("its files have more than {MAX_TOTAL_BYTES} bytes"));
        }
        let mut layers = self.memory.layers.iter();
        if let Some(layer) = layers.find(|layer| layer.data_bytes > self.memory.bytes) {
            return Err(format!("{} holds more than all of memory", layer.file));
        }
        for (disk, shape) in self.disks.iter().zip(&self.shape.disks) {
            if disk.base.bytes != shape.bytes.0 {
                let (held, wanted) = (disk.base.bytes, shape.bytes.0);
                let file = &disk.base.file;
                return Err(format!("{file} has {held} bytes for a disk of {wanted}"));
            }
        }
        Ok(())
    }

    /// The size limit of each file in bytes, in the order of [`Content::files`].
    fn limits(&self) -> impl Iterator<Item = u64> {
        // An index takes at most 16 bytes for each page, and 32 for each 2 MiB.
        let memory = self.memory.bytes;
        let layer = memory + memory / 128 + (64 << 10);
        let layers = self.memory.layers.iter().map(move |_| layer);
        let disks = self.disks.iter().zip(&self.shape.disks);
        let disks = disks.flat_map(|(disk, shape)| {
            // A map takes two bits for each block.
            let layer = shape.bytes.0 + shape.bytes.0 / 128 + (16 << 20);
            let layers = disk.layers.iter().map(move |_| layer);
            std::iter::once(shape.bytes.0).chain(layers)
        });
        layers
            .chain([snapshot::MAX_BYTES])
            .chain(disks)
            .chain(self.kernel.iter().map(|_| MAX_KERNEL_BYTES))
            .chain(self.initrd.iter().map(move |_| memory))
    }
}

const ID_DIGITS: usize = 32;
pub(crate) const HASH_DIGITS: usize = 64;

fn is_hex(text: &str, digits: RangeInclusive<usize>) -> bool {
    let lower = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    digits.contains(&text.len()) && text.bytes().all(lower)
}

/// The hash of a description as it is in the file, including fields of later versions.
pub(crate) fn id_of(content: &Value) -> serde_json::Result<String> {
    // A `Value` sorts its keys.
    let text = serde_json::to_vec(content)?;
    Ok(blake3::hash(&text).to_hex()[..ID_DIGITS].to_owned())
}
