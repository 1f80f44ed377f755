//! The description of a VM that the source sends ahead of it, and the destination's answer.

use std::fs::File;
use std::path::{Path, PathBuf};

use clone_api::control::{BaseLayers, CpuFeatures};
use clone_api::{ApiError, Client, ErrorCode, VmConfig};
use clone_migration::wire;
use clone_start::cpu;
use clone_start::document::ForkDisk;
use clone_start::error::{Result, failed};
use clone_start::vm_dir::GuestInterface;
use clone_template::{Template, hash_of};
use serde::{Deserialize, Serialize};

use crate::runtime::RunningVm;
use crate::snapshot;
use crate::suspend::base_of;
use crate::suspended::Base;

/// The version of an offer, and the only one that is read.
const FORMAT: u32 = 1;

/// A VM that is offered to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    /// The versions of what is sent.
    pub(super) formats: Formats,
    /// The VM's description, with everything filled in.
    pub(super) config: VmConfig,
    /// The configuration of the guest's network interfaces.
    pub(super) network: Vec<GuestInterface>,
    /// What the VM builds on.
    pub(super) base: OfferedBase,
    /// Whether the guest's agent answers.
    pub(super) has_agent: bool,
    /// The CPU features that the guest sees.
    pub(super) cpu: CpuFeatures,
    /// The memory that the VM has of its own, in bytes.
    pub(super) private_bytes: u64,
}

/// The versions of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Formats {
    /// Of the offer.
    offer: u32,
    /// Of the stream between the processes.
    stream: u32,
    /// Of the machine's state.
    state: u32,
}

impl Formats {
    /// Those of this build.
    pub(super) const OURS: Self = Self {
        offer: FORMAT,
        stream: wire::VERSION,
        state: clone_vmm::snapshot::VERSION,
    };

    /// Refuses what this build cannot read.
    ///
    /// # Errors
    /// [`ErrorCode::HostUnsupported`].
    pub(super) fn check(self) -> Result<()> {
        let ours = Self::OURS;
        let readable =
            self.offer == ours.offer && self.stream == ours.stream && self.state <= ours.state;
        match readable {
            true => Ok(()),
            false => {
                let message = format!(
                    "the VM comes from another version of clone: it is sent as {self:?}, and this \
                     host reads {ours:?}"
                );
                Err(ApiError::new(ErrorCode::HostUnsupported, message)
                    .advise("install the same version on both hosts"))
            }
        }
    }
}

/// What a VM builds on, which the destination must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum OfferedBase {
    /// The layers of a template.
    Template {
        /// The template's id, which is the hash of its content.
        id: String,
        /// The template's name at the source.
        name: String,
        /// The number of its layers that are used.
        layers: BaseLayers,
    },
    /// Images and a kernel, at the same paths on both hosts.
    Files {
        /// The kernel, as the description names it.
        kernel: OfferedFile,
        /// The initial RAM disk.
        initrd: Option<OfferedFile>,
        /// The images of all disks, each with its backing files.
        images: Vec<OfferedFile>,
    },
}

/// A file that the destination must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OfferedFile {
    /// Its path on both hosts.
    pub(super) path: PathBuf,
    /// The hash of its content ([`hash_of`]).
    hash: String,
}

impl OfferedFile {
    fn of(path: &Path) -> Result<Self> {
        let hash = File::open(path).and_then(|file| hash_of(&file));
        Ok(Self {
            path: path.to_owned(),
            hash: hash.map_err(failed("read", path))?,
        })
    }

    /// Refuses a file of this host that is another one.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`] or [`ErrorCode::Conflict`], with advice.
    pub(super) fn check(&self) -> Result<()> {
        let path = self.path.display();
        let advice = format!("copy {path} from the VM's host to the same path");
        match Self::of(&self.path) {
            Ok(ours) if ours == *self => Ok(()),
            Ok(_) => {
                let message = format!("{path} is another file here than on the VM's host");
                Err(ApiError::new(ErrorCode::Conflict, message).advise(advice))
            }
            Err(error) => {
                let message = format!("this host lacks a file of the VM: {}", error.message);
                Err(ApiError::new(ErrorCode::NotFound, message).advise(advice))
            }
        }
    }
}

/// The destination's answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// The VM cannot be taken.
    Refused(ApiError),
    /// The template is to be sent first; another verdict follows.
    SendTemplate,
    /// A process waits for the VM.
    Accepted,
}

/// What another host must have for a VM, as far as that is needed to choose one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// The name of the VM's template on this host, and its id; `None` for a VM of no template.
    pub template: Option<(String, String)>,
    /// The CPU features that the guest sees.
    pub cpu: CpuFeatures,
    /// The memory that the VM has of its own, in bytes.
    pub private_bytes: u64,
}

/// What another host must have for a running VM.
///
/// # Errors
/// [`ErrorCode::Conflict`] for a VM that cannot leave its host, with the reason.
pub fn needs(vm: &RunningVm) -> Result<Needs> {
    let Offered { offer, .. } = Offer::of(vm)?;
    Ok(Needs {
        template: match offer.base {
            OfferedBase::Template { id, name, .. } => Some((name, id)),
            OfferedBase::Files { .. } => None,
        },
        cpu: offer.cpu,
        private_bytes: offer.private_bytes,
    })
}

/// An offer, and the template of the VM if it has one.
pub(super) struct Offered {
    pub(super) offer: Offer,
    pub(super) template: Option<Template>,
    /// The lowest layers of the VM that the destination has.
    pub(super) layers: BaseLayers,
}

/// Refuses a VM whose guest uses directories of this host.
fn check_shares(config: &VmConfig) -> Result<()> {
    match config.shares.first() {
        None => Ok(()),
        Some(share) => {
            let message = format!(
                "the VM shares the directory {} with this host",
                share.path.display()
            );
            Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("a VM with shared directories stays on its host"))
        }
    }
}

impl Offer {
    /// The offer of a running VM.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] for a VM that cannot leave its host, with the reason.
    pub(super) fn of(vm: &RunningVm) -> Result<Offered> {
        let client = Client::new(vm.dir.control_socket());
        let failed = |error: clone_api::ClientError| ApiError::internal(&error);
        let status = vm.check_here()?;
        let config = vm.dir.config()?;
        check_disks(&config)?;
        check_shares(&config)?;
        let (base, template) = base_of(&config, &vm.dir.parent()?)?;
        let (base, layers) = match base {
            Base::Template { dir, id, layers } => {
                let name = dir.file_name().unwrap_or_default().to_string_lossy();
                let base = OfferedBase::Template {
                    id,
                    name: name.into_owned(),
                    layers: layers.clone(),
                };
                (base, layers)
            }
            Base::Files { disks, .. } => {
                let layers = BaseLayers {
                    memory: 0,
                    disks: vec![0; disks.len()],
                };
                (files(&config, &disks)?, layers)
            }
        };
        let has_agent = snapshot::has_agent(vm, template.as_ref());
        let offer = Self {
            formats: Formats::OURS,
            network: vm.dir.guest_network()?,
            base,
            has_agent,
            cpu: match status.cpu {
                Some(cpu) => cpu,
                // It was booted here, and so has what this host gives.
                None => cpu::of_host()?,
            },
            private_bytes: client.stats().map_err(failed)?.memory.private_bytes,
            config,
        };
        Ok(Offered {
            offer,
            template,
            layers,
        })
    }

    /// The disks whose writes are sent.
    pub(super) fn travelling_disks(&self) -> Vec<u32> {
        let disks = (0..).zip(&self.config.disks);
        disks
            .filter(|(_, disk)| !disk.read_only)
            .map(|(index, _)| index)
            .collect()
    }
}

/// Refuses disks that keep their writes on this host.
///
/// # Errors
/// [`ErrorCode::Conflict`].
pub(super) fn check_disks(config: &VmConfig) -> Result<()> {
    for (index, disk) in config.disks.iter().enumerate() {
        if snapshot::keeps_writes(disk) {
            let message = format!(
                "disk {index} keeps its writes in a file of its host, which does not travel"
            );
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("only disks with overlay=ephemeral, and read-only ones, can move"));
        }
    }
    Ok(())
}

fn files(config: &VmConfig, disks: &[ForkDisk]) -> Result<OfferedBase> {
    let mut images = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        if !disk.layers.is_empty() {
            let message = format!("disk {index} lies on layers of its host, which do not travel");
            return Err(ApiError::new(ErrorCode::Conflict, message));
        }
        for (image, _) in disk.base.iter().chain(&disk.backing) {
            images.push(OfferedFile::of(&image.path)?);
        }
    }
    Ok(OfferedBase::Files {
        kernel: OfferedFile::of(&config.kernel)?,
        initrd: config.initrd.as_deref().map(OfferedFile::of).transpose()?,
        images,
    })
}

#[cfg(test)]
mod tests {
    use clone_api::config::{DiskConfig, Overlay};

    use super::*;

    #[test]
    fn an_offer_of_this_format_is_read_as_long_as_the_format_lives() {
        let golden = include_str!("golden/offer-1.json");
        let offer: Offer = serde_json::from_str(golden).unwrap();
        assert_eq!(
            offer.formats,
            Formats {
                offer: 1,
                stream: 1,
                state: 1
            }
        );
        assert_eq!(offer.config.name, "anna");
        assert_eq!(offer.travelling_disks(), [0]);
        assert!(matches!(&offer.base, OfferedBase::Template { name, .. } if name == "dev"));
        // The description has its own format, whose defaults are filled in.
        let written = serde_json::to_value(&offer).unwrap();
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        for field in [
            "formats",
            "network",
            "base",
            "has_agent",
            "cpu",
            "private_bytes",
        ] {
            assert_eq!(written[field], golden[field], "{field}");
        }
        assert_eq!(serde_json::from_value::<Offer>(written).unwrap(), offer);
    }

    #[test]
    fn other_formats_are_refused_but_older_states_are_read() {
        Formats::OURS.check().unwrap();
        let older = Formats {
            state: 0,
            ..Formats::OURS
        };
        older.check().unwrap();
        for other in [
            Formats {
                state: 99,
                ..Formats::OURS
            },
            Formats {
                stream: 0,
                ..Formats::OURS
            },
            Formats {
                offer: 2,
                ..Formats::OURS
            },
        ] {
            assert_eq!(other.check().unwrap_err().code, ErrorCode::HostUnsupported);
        }
    }

    #[test]
    fn disks_that_keep_their_writes_do_not_travel() {
        let disk = |overlay, read_only| VmConfig {
            disks: vec![DiskConfig {
                overlay,
                read_only,
                ..DiskConfig::default()
            }],
            ..VmConfig::default()
        };
        check_disks(&disk(Overlay::Ephemeral, false)).unwrap();
        check_disks(&disk(Overlay::None, true)).unwrap();
        check_disks(&disk(Overlay::None, false)).unwrap_err();
        check_disks(&disk(Overlay::Kept("/x".into()), false)).unwrap_err();
    }

    #[test]
    fn a_file_that_is_missing_or_another_one_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        std::fs::write(&path, "kernel").unwrap();
        let offered = OfferedFile::of(&path).unwrap();
        offered.check().unwrap();
        std::fs::write(&path, "Kernel").unwrap();
        assert_eq!(offered.check().unwrap_err().code, ErrorCode::Conflict);
        std::fs::remove_file(&path).unwrap();
        let missing = offered.check().unwrap_err();
        assert_eq!(missing.code, ErrorCode::NotFound);
        assert!(missing.message.contains("vmlinux"), "{}", missing.message);
    }
}
