//! The jail of a share's server: the shared directory is all that it can reach.
//!
//! The server of a share talks to a guest by way of the VM's process, so somebody may take it over.
//! Then the host's kernel holds these limits, each independently of the others:
//!
//! - the directory is the root of a mount namespace that has no other mount; in a read-only share the
//!   mount is read-only, and nobody in the process has the right to change that;
//! - no network, no IPC, no capability and no way to gain one; its user is the owner of the directory
//!   (if it was started as root);
//! - Landlock allows files below the directory only, no TCP port, and signals to nobody;
//! - a filter of system calls without any that starts a program or a thread, makes a socket or
//!   mounts;
//! - a cgroup with limits of memory and threads.
//!
//! What remains in reach of somebody who took the server over is the content of a directory that is
//! moved out of the share while the server has it open, but nothing above it. Layers that the host
//! lacks are reported with the reason.

mod landlock;
mod privileges;
mod root;
mod seccomp;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What the jail is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JailSpec<'a> {
    /// The directory to share.
    pub(crate) directory: &'a Path,
    /// Its device and inode.
    pub(crate) identity: (u64, u64),
    /// Its owner: user and group.
    pub(crate) owner: (u32, u32),
    pub(crate) read_only: bool,
    /// A directory on which the new root is mounted; the mount is not visible outside.
    pub(crate) spot: &'a Path,
    /// The cgroup to join.
    pub(crate) cgroup: Option<&'a Path>,
}

/// A part of the jail could not be built.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {source}")]
pub(crate) struct JailError {
    action: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError {
        action,
        source: error.into(),
    }
}

/// The outcome of a layer that a host may lack: applied, or the reason why not.
type Layer = Result<(), String>;

/// Confines this process, which has one thread. Returns what the host could not provide, and the
/// directory.
///
/// # Errors
/// A part that the host has could not be built; the share must not be served then.
pub(crate) fn enter(spec: &JailSpec<'_>) -> Result<(Vec<String>, OwnedFd), JailError> {
    let entered = enter_without_filter(spec)?;
    seccomp::apply().map_err(failed("filter its system calls"))?;
    Ok(entered)
}

fn enter_without_filter(spec: &JailSpec<'_>) -> Result<(Vec<String>, OwnedFd), JailError> {
    let cgroup = match spec.cgroup {
        // 0 means the writing process.
        Some(cgroup) => fs::write(cgroup.join("cgroup.procs"), "0")
            .map_err(|error| format!("cgroup: cannot join it: {error}")),
        None => Ok(()),
    };
    rustix::process::umask(rustix::fs::Mode::empty());
    let root = root::enter(spec)?;
    privileges::limit_resources()?;
    let user = privileges::drop_all(spec.owner)?;
    let landlock = landlock::allow_only(&root, spec.read_only)?;
    let layers = [cgroup, user, landlock];
    Ok((layers.into_iter().filter_map(Layer::err).collect(), root))
}
