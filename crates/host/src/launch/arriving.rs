//! Starts the process of a VM that comes from another host: everything is set up here, and the
//! machine is built, but its memory, its disks' writes and its state are still to come.

use std::path::{Path, PathBuf};
use std::process::Child;

use clone_api::VmConfig;
use clone_start::document::{Origin, Parent};
use clone_start::error::Result;
use clone_start::vm_dir::GuestInterface;
use clone_template::Template;

use super::{Plan, fork, identity, preflight, reaper, start_or_abandon};
use crate::runtime::{RunningVm, Runtime};

/// A VM whose process waits for it.
#[derive(Debug)]
pub(crate) struct ArrivingVm {
    /// The VM.
    pub(crate) vm: RunningVm,
    /// Its process as a child of this one. Until it has the stream, it ends with this process.
    pub(crate) child: Child,
}

/// Starts the process of a VM that was `former` connected like this, with the addresses that it had
/// where they are free.
///
/// # Errors
/// The host's; nothing is left then.
pub(crate) fn start(
    runtime: &Runtime,
    config: VmConfig,
    origin: Origin,
    former: Vec<GuestInterface>,
    parent: &Parent,
) -> Result<ArrivingVm> {
    runtime.sweep()?;
    let plan = Plan {
        config,
        origin,
        former_network: former,
        incoming: true,
    };
    let launched = start_or_abandon(runtime, plan, parent)?;
    let vm = RunningVm {
        dir: launched.dir,
        process: launched.process,
    };
    Ok(ArrivingVm {
        vm,
        child: launched.child,
    })
}

/// Sets the paths in the description of a VM of `template` to those of this host.
pub(crate) fn set_paths(config: &mut VmConfig, template: &Template, parent: &Parent) {
    fork::set_paths(config, template, parent);
}

/// The kernel that is loaded for the one that a description names.
///
/// # Errors
/// It cannot be read.
pub(crate) fn boot_kernel(kernel: &Path) -> Result<PathBuf> {
    preflight::boot_kernel(kernel)
}

/// Sets the guest's clock, and its addresses where they are not the `former` ones. Returns notices
/// about what could not be done; the guest runs in any case.
pub(crate) fn go_on(vm: &RunningVm, former: &[GuestInterface]) -> Vec<String> {
    match identity::go_on(vm, former) {
        Ok(notices) => notices,
        Err(error) => vec![format!("the guest's clock was not set: {error}")],
    }
}

/// Lets the VM's process run on without this one.
pub(crate) fn leave_running(child: Child) {
    reaper::adopt(child);
}
