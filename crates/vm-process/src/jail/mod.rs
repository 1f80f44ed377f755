//! The jail of a VM's process: what is left to somebody who took it over from inside the guest.
//!
//! The process calls [`enter`] when it has opened everything it needs and before its first thread
//! starts. From then on it has an empty root, networks and IPC of its own, a user id of its own
//! (where it was root), no capability and no way to a new one. Its threads are filtered one by
//! one, each to the system calls that its work needs: vCPUs by [`confine_vcpu`], the event loop by
//! [`confine_event_loop`] when the machine is built. Threads that the event loop starts (disks'
//! workers) inherit its filter.
//!
//! Each layer stands alone: where the host lacks one, the others are still put up, and the VM's
//! status says what is missing and why ([`JailStatus`]); whoever requires it has the VM refused.
//! Host resources of a VM outside of its process (taps, its directory) are left to others.
//!
//! # What stays open
//! A descriptor goes on giving what its opener could do, whatever the process lost since. So each
//! kind that the process keeps has a reason why it is harmless in a guest's hands:
//!
//! | descriptor | what can be done with it |
//! | --- | --- |
//! | KVM's VM and its vCPUs | what the seccomp lists name, on this VM alone; `/dev/kvm` is closed when they are made |
//! | memory layers, base disks, kernel, initrd, state, locks | read: they are opened so |
//! | the VM's own disk layers, console log, `vmm.log` | read and write; they are this VM's alone |
//! | queues of its tap | frames of this VM; `TUNSETIFF`, for another interface, is not allowed |
//! | `/dev/vhost-net` | one per queue pair of the tap, whose owner is this process |
//! | its listening sockets and their clients | accept; there is no call that connects or sends elsewhere |
//! | `/proc/self/pagemap` | this process's page tables, opened so that frame numbers read as 0 ([`clone_memory::Pagemap`]) |
//! | `/proc/self/smaps_rollup` | sums over this process's own memory; what it reads was checked at `open` |
//! | eventfds, timers, epoll, userfaultfd, io_uring | this process's own objects; rings take only reads, writes and syncs of registered files |
//!
//! No directory, no `/proc` file of another process, no netlink or packet socket and nothing of the
//! launcher's is among them: everything that is not a standard stream is closed first of all
//! ([`crate`]).

mod landlock;
mod namespaces;
mod privileges;
mod seccomp;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use clone_api::jail::{JailLayer, JailStatus, MissingLayer};
use clone_start::cgroup::{self, Limits};

/// What a jail is built around.
#[derive(Debug, Clone)]
pub(super) struct JailSpec {
    /// The VM's runtime directory.
    pub runtime_dir: PathBuf,
    /// The RAM promised to the guest, for the memory limit.
    pub guest_memory_bytes: u64,
    /// How many vCPU threads there will be, for the limit of threads.
    pub vcpus: u32,
}

/// A part of the jail could not be built.
#[derive(Debug, thiserror::Error)]
#[error("cannot jail the VM's process: {action}: {source}")]
pub(super) struct JailError {
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

/// Whether a layer that hosts may lack was put up, or why not.
type Layer = Result<(), String>;

/// Confines the calling process, which has one thread. The layers that this host lacks are in the
/// status, and in the log.
///
/// The first things to go are those that need paths and privileges to be set up.
///
/// # Errors
/// Where a layer fails that this host has. Nothing of the VM may be run then.
pub(super) fn enter(spec: &JailSpec) -> Result<JailStatus, JailError> {
    let limits = Limits {
        guest_memory_bytes: spec.guest_memory_bytes,
        vcpus: spec.vcpus,
    };
    let cgroup = cgroup::join(&spec.runtime_dir, limits);
    let namespaces = namespaces::leave_the_host(&spec.runtime_dir)?;
    privileges::limit_resources()?;
    let user_id = privileges::drop_all()?;
    let landlock = landlock::forbid_everything()?;
    let layers = [
        (JailLayer::Cgroup, cgroup),
        (JailLayer::Namespaces, namespaces),
        (JailLayer::UserId, user_id),
        (JailLayer::Landlock, landlock),
    ];
    let missing = layers.into_iter().filter_map(|(layer, outcome)| {
        let reason = outcome.err()?;
        Some(MissingLayer { layer, reason })
    });
    let status = JailStatus {
        missing: missing.collect(),
    };
    for missing in &status.missing {
        tracing::warn!("the jail lacks a layer: {missing}");
    }
    Ok(status)
}

/// Filters the calling vCPU thread before it runs the guest.
pub(super) fn confine_vcpu() -> io::Result<()> {
    seccomp::apply(seccomp::Kind::Vcpu)
}

/// Filters the calling thread, the event loop's, when everything of the machine is made and before
/// the guest runs. Threads that it starts later inherit the filter.
pub(super) fn confine_event_loop() -> io::Result<()> {
    seccomp::apply(seccomp::Kind::EventLoop)
}
