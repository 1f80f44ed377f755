//! The jail of a VM's process, which limits what an attacker can do who took the process over from
//! inside the guest.
//!
//! The process calls [`enter`] after it has opened everything that it needs, and before it starts
//! its first thread. From then on it has an empty root, its own networks and IPC, its own user id
//! (if it was started as root), no capability and no way to gain one. Each thread is filtered to
//! the system calls that its work needs: vCPUs by [`confine_vcpu`], the event loop by
//! [`confine_event_loop`] once the machine is built. Threads that the event loop starts (the disks'
//! workers) inherit its filter.
//!
//! The layers are independent: where the host lacks one, the others are still applied, and the VM's
//! status says which is missing and why ([`JailStatus`]). A start that requires the missing layer
//! is refused. Host resources of a VM outside of its process (taps, the runtime directory) are
//! handled elsewhere.
//!
//! # What stays open
//! A descriptor keeps the access that it was opened with, whatever the process has lost since. So
//! for each kind that the process keeps, this table says why it is harmless in a guest's hands:
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
//! The process has no directory, no `/proc` file of another process, no netlink or packet socket,
//! and no descriptor of its launcher: everything but the standard streams is closed before anything
//! else ([`crate`]).

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

/// The facts about a VM that its jail depends on.
#[derive(Debug, Clone)]
pub(super) struct JailSpec {
    /// The VM's runtime directory.
    pub runtime_dir: PathBuf,
    /// The RAM promised to the guest, for the memory limit.
    pub guest_memory_bytes: u64,
    /// The number of vCPU threads, for the limit of threads.
    pub vcpus: u32,
}

/// A part of the jail could not be built.
#[derive(Debug, thiserror::Error)]
#[error("cannot jail the VM's process: {action}: {source}")]
pub(super) struct JailError {
    /// The step that failed, in the form "verb object".
    pub action: &'static str,
    /// The operating system's error.
    pub source: io::Error,
}

/// Makes a closure for `map_err` that wraps the error of `action`.
fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError {
        action,
        source: error.into(),
    }
}

/// The outcome of a layer that a host may lack: applied, or the reason why not.
type Layer = Result<(), String>;

/// Confines the calling process, which must have one thread. Layers that this host lacks are in the
/// returned status and in the log.
///
/// The layers that need paths and privileges to be set up are applied first.
///
/// # Errors
/// A layer that this host has could not be applied. The VM must not be run then.
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

/// Filters the calling thread, which runs the event loop, after the machine is built and before the
/// guest runs. Threads that it starts later inherit the filter.
pub(super) fn confine_event_loop() -> io::Result<()> {
    seccomp::apply(seccomp::Kind::EventLoop)
}
