//! The record of a suspended VM, as a file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clone_api::control::BaseLayers;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_start::SharedFile;
use clone_start::document::{BaseTemplate, BootSource, ForkDisk, Parent};
use clone_start::error::{Result, failed};
use clone_start::vm_dir::GuestInterface;
use clone_template::Template;
use serde::{Deserialize, Serialize};

use super::MEMORY;

/// The name of the file.
const FILE: &str = "suspended.json";
/// The version of the format that is written, and the newest that can be read.
const FORMAT: u32 = 1;
/// The size limit of the file, in bytes.
const MAX_BYTES: u64 = 4 << 20;

/// What a suspended VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of this format.
    pub(super) format: u32,
    /// The VM's description, with everything filled in.
    pub config: VmConfig,
    /// The configuration of the guest's network interfaces.
    pub(crate) network: Vec<GuestInterface>,
    /// The files under the state.
    pub(crate) base: Base,
    /// The disks with a layer of their own in the directory.
    pub(crate) written_disks: Vec<u32>,
    /// Whether the guest's agent answered when the VM was suspended.
    pub has_agent: bool,
    /// When the VM was suspended, in milliseconds since 1970.
    pub suspended_unix_ms: u64,
}

/// The files under the state of a suspended VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Base {
    /// The layers of a template.
    Template {
        /// The template's directory.
        dir: PathBuf,
        /// The template's id, which is the hash of its content.
        id: String,
        /// The number of its layers that are used.
        layers: BaseLayers,
    },
    /// The images and the kernel that the VM was booted from.
    Files {
        /// The disks, without the layers that are the VM's own.
        disks: Vec<ForkDisk>,
        /// The kernel for reboots.
        boot: Option<BootSource>,
    },
}

impl Record {
    pub(crate) fn new(
        config: VmConfig,
        network: Vec<GuestInterface>,
        base: Base,
        has_agent: bool,
    ) -> Self {
        Self {
            format: FORMAT,
            config,
            network,
            base,
            written_disks: Vec::new(),
            has_agent,
            suspended_unix_ms: clone_base::clock::unix_ms(),
        }
    }

    /// Reads the record of the VM in `dir`.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidConfig`] if it is damaged, or newer than this program.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let mut text = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text))
            .map_err(failed("read", &path))?;
        Self::parse(&text).map_err(|reason| {
            let message = format!("{} cannot be used: {reason}", path.display());
            ApiError::new(ErrorCode::InvalidConfig, message)
        })
    }

    fn parse(text: &[u8]) -> std::result::Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let Version { format } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if format != FORMAT {
            return Err(format!(
                "it is of format {format}, and this program reads format {FORMAT}"
            ));
        }
        serde_json::from_slice(text).map_err(|error| error.to_string())
    }

    /// Writes the record into `dir`, durably.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let text = serde_json::to_vec_pretty(self).map_err(|error| ApiError::internal(&error))?;
        clone_base::file::replace(&path, 0o600, &text).map_err(failed("write", &path))
    }

    /// The template that the VM builds on.
    pub fn template(&self) -> Option<&Path> {
        match &self.base {
            Base::Template { dir, .. } => Some(dir),
            Base::Files { .. } => None,
        }
    }

    /// The files that the VM in `dir` is made of: those of its base, and its own.
    pub(crate) fn parent(&self, dir: &Path, template: Option<&Template>) -> Result<Parent> {
        let mut parent = match (&self.base, template) {
            (Base::Template { layers, .. }, Some(template)) => {
                let mut parent = template.parent()?;
                parent.narrow_to(BaseTemplate {
                    template: template.dir().to_owned(),
                    layers: layers.clone(),
                });
                parent
            }
            (Base::Files { disks, boot }, _) => Parent {
                disks: disks.clone(),
                boot: boot.clone(),
                ..Parent::default()
            },
            (Base::Template { dir, .. }, None) => {
                let message = format!("the template {} was not opened", dir.display());
                return Err(ApiError::new(ErrorCode::Internal, message));
            }
        };
        parent.memory.push(own_file(dir, MEMORY)?);
        for &index in &self.written_disks {
            let Some(disk) = parent.disks.get_mut(index as usize) else {
                let message = format!("{} has no disk {index}", self.config.name);
                return Err(ApiError::new(ErrorCode::InvalidConfig, message));
            };
            disk.layers.push(own_file(dir, &disk_file(index))?);
        }
        Ok(parent)
    }
}

/// The name of the file with a disk's layer.
pub(crate) fn disk_file(index: u32) -> String {
    format!("disk-{index}")
}

/// A file of the VM's own, with its present identity. Only the owner can write to the directory.
pub(crate) fn own_file(dir: &Path, name: &str) -> Result<SharedFile> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(failed("open", &path))?;
    SharedFile::of(path, &file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_this_format_is_read_as_long_as_the_format_lives() {
        let golden = include_bytes!("golden/suspended-1.json");
        let record = Record::parse(golden).unwrap();
        assert_eq!(record.config.name, "anna");
        assert_eq!(record.written_disks, [0]);
        assert_eq!(
            record.template(),
            Some(Path::new("/var/lib/clone/templates/dev"))
        );
        let text = serde_json::to_vec_pretty(&record).unwrap();
        assert_eq!(Record::parse(&text).unwrap(), record);
    }

    #[test]
    fn a_newer_record_is_refused_with_its_format() {
        let newer = br#"{"format": 2, "what": "ever"}"#;
        let reason = Record::parse(newer).unwrap_err();
        assert!(reason.contains("format 2"), "{reason}");
        Record::parse(b"{}").unwrap_err();
        Record::parse(b"").unwrap_err();
    }
}
