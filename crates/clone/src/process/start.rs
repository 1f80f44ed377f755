//! What a launcher hands to the VM's process: a document on its standard input.

use std::io::Read;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clone_api::config::DiskFormat;
use clone_api::{ApiError, ErrorCode, MacAddr, VmConfig};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The description, and what the launcher found out or opened for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// The VM's description, filled in.
    pub config: VmConfig,
    /// Where its guest comes from.
    pub origin: Origin,
    /// The network interfaces, in the order of the description.
    pub nets: Vec<InheritedNet>,
}

/// Where a guest comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Origin {
    /// A kernel boots.
    Boot {
        /// The described kernel, or a `vmlinux` that was extracted from it.
        kernel: PathBuf,
    },
    /// A snapshot goes on.
    Fork(Fork),
}

/// A snapshot to go on from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fork {
    /// The memory layers, the base first.
    pub memory: Vec<PathBuf>,
    /// The machine's state.
    pub state: PathBuf,
    /// Held with shared locks for as long as the VM lives, so that nobody removes what it uses.
    pub locks: Vec<PathBuf>,
    /// The disks, in the order of the description.
    pub disks: Vec<ForkDisk>,
    /// Whether it only gets ready, and runs when it is given its name.
    pub standby: bool,
    /// Pages to bring in before the guest runs.
    pub prefetch: Option<PathBuf>,
    /// Whether its pages come one by one, so that what it touches can be told: a kernel brings in
    /// the neighbours of what is read, too.
    pub observed: bool,
    /// What its guest boots when it reboots, if it is there: the described kernel, or a `vmlinux`
    /// that was extracted from it.
    pub kernel: PathBuf,
}

/// A disk of a clone: what it shares with others, under what the description says of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForkDisk {
    /// The base image and its format; none where the lowest layer holds everything.
    pub base: Option<(PathBuf, DiskFormat)>,
    /// The backing files of a qcow2 base, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<(PathBuf, DiskFormat)>,
    /// The layers over it, the lowest first.
    pub layers: Vec<PathBuf>,
}

/// A network interface that the launcher set up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InheritedNet {
    /// The queues of its tap: descriptors that the process inherits and nothing else uses.
    pub taps: Vec<RawFd>,
    /// The guest's hardware address.
    pub mac: MacAddr,
    /// What the guest is told of the MTU, where it is not the usual 1,500.
    pub mtu: Option<u16>,
    /// What the kernel's command line must say of the guest's address.
    pub kernel_argument: Option<String>,
}

/// Reads the document to the end of `pipe`; `None` where the launcher ended before it sent one.
pub fn read(mut pipe: impl Read) -> Result<Option<Start>> {
    let mut text = Vec::new();
    pipe.read_to_end(&mut text)
        .map_err(|error| ApiError::internal(&error))?;
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        ApiError::new(
            ErrorCode::Internal,
            format!("the VM's process cannot read its description: {error}"),
        )
    })
}
