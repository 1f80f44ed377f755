//! What a launcher hands to the VM's process: a document on its standard input.

use std::io::Read;
use std::path::PathBuf;

use clone_api::{ApiError, ErrorCode, VmConfig};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The description, and what the launcher found out or opened for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// The VM's description, filled in.
    pub config: VmConfig,
    /// The kernel to boot: the described one, or a `vmlinux` that was extracted from it.
    pub boot_kernel: PathBuf,
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
