//! What a launcher hands to the VM's process: a document on its standard input.

use std::io::Read;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clone_api::{ApiError, ErrorCode, MacAddr, VmConfig};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The description, and what the launcher found out or opened for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// The VM's description, filled in.
    pub config: VmConfig,
    /// The kernel to boot: the described one, or a `vmlinux` that was extracted from it.
    pub boot_kernel: PathBuf,
    /// The network interfaces, in the order of the description.
    pub nets: Vec<InheritedNet>,
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
