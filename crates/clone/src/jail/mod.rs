//! The jail of a VM's process: what is left to somebody who took it over from inside the guest.
//!
//! The process calls [`enter`] when it has opened everything it needs and before its first thread
//! starts. From then on it has an empty root, networks and IPC of its own, a user id of its own
//! (where it was root), no capability and no way to a new one. Its threads are filtered one by
//! one, each to the system calls that its work needs: vCPUs by [`confine_vcpu`], the event loop by
//! [`confine_event_loop`] when the machine is built. Threads that the event loop starts (disks'
//! workers) inherit its filter.
//!
//! Each layer stands alone: where the host lacks one, the others are still put up, and the log
//! says what is missing. Host resources of a VM outside of its process (taps, its directory) are
//! left to others.

mod cgroup;
mod landlock;
mod namespaces;
mod privileges;
mod seccomp;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

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

/// For `map_err`: the error of `action`.
fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError {
        action,
        source: error.into(),
    }
}

/// Confines the calling process, which has one thread.
///
/// The first things to go are those that need paths and privileges to be set up.
///
/// # Errors
/// Where a layer fails that this host has. Nothing of the VM may be run then.
pub fn enter(spec: &JailSpec) -> Result<(), JailError> {
    cgroup::join(spec);
    namespaces::leave_the_host(&spec.runtime_dir)?;
    privileges::limit_resources()?;
    privileges::drop_all()?;
    landlock::forbid_everything()
}

/// Filters the calling vCPU thread before it runs the guest.
pub fn confine_vcpu() -> io::Result<()> {
    seccomp::apply(seccomp::Kind::Vcpu)
}

/// Filters the calling thread, the event loop's, when everything of the machine is made and before
/// the guest runs. Threads that it starts later inherit the filter.
pub fn confine_event_loop() -> io::Result<()> {
    seccomp::apply(seccomp::Kind::EventLoop)
}

/// Lets the VM in `runtime_dir` take so many bytes of memory more (or less): it is to write files
/// that may be in memory. Only its launcher can.
pub fn allow_memory(runtime_dir: &Path, bytes: i64) -> io::Result<()> {
    cgroup::grow(runtime_dir, bytes)
}

/// Removes what the jail of the VM in `runtime_dir` left on the host when its process is gone.
pub fn sweep(runtime_dir: &Path) -> io::Result<()> {
    cgroup::remove(runtime_dir)
}
