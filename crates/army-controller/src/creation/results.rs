//! What became of the VMs of a request.

use std::collections::HashMap;
use std::time::Instant;

use army_api::vms::{ForkTimes, Vm, VmState};
use army_node_api::requests::CreatedVm;
use serde::{Deserialize, Serialize};

use super::Results;
use crate::operations::Output;
use crate::store::creation::{ForkResult, Forked};
use crate::{Error, ErrorKind, Result};

/// What became of a request for VMs.
#[derive(Debug, Clone)]
pub struct CreatedVms {
    /// The VMs that run, in the order of the request.
    pub vms: Vec<Vm>,
    /// The VMs that could not be created.
    pub failures: Vec<CreationFailure>,
}

/// A VM that could not be created.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreationFailure {
    /// The name of the VM.
    pub name: String,
    /// Why it could not be created.
    pub error: Error,
}

/// Separates the VMs that another host may be able to run from the others.
pub(super) fn split(results: Results, may_move: bool) -> (Vec<(Vm, Error)>, Results) {
    let (mut refused, mut rest) = (Vec::new(), Vec::new());
    for (vm, result) in results {
        match result {
            Err(error) if may_move && error.kind == ErrorKind::HostUnsupported => {
                refused.push((vm, error));
            }
            result => rest.push((vm, result)),
        }
    }
    (refused, rest)
}

/// The answer to the client, in the order of the request.
pub(super) fn answer(
    ids: &[String],
    mut finished: HashMap<String, (Vm, ForkResult)>,
) -> Result<CreatedVms> {
    let mut created = CreatedVms {
        vms: Vec::new(),
        failures: Vec::new(),
    };
    for id in ids {
        match finished.remove(id) {
            Some((mut vm, Ok(forked))) => {
                vm.state = VmState::Running;
                vm.fork = Some(forked.times);
                vm.notices = forked.notices;
                vm.addresses = forked.addresses;
                created.vms.push(vm);
            }
            Some((vm, Err(error))) => created.failures.push(CreationFailure {
                name: vm.name,
                error,
            }),
            None => {}
        }
    }
    created.or_error()
}

impl CreatedVms {
    /// The VMs, or an error where none of them could be created.
    pub(crate) fn or_error(mut self) -> Result<Self> {
        if !self.vms.is_empty() {
            return Ok(self);
        }
        let count = self.failures.len();
        match (self.failures.pop(), count) {
            (None, _) => {
                let message = "the record of the VMs is missing";
                Err(Error::new(ErrorKind::Internal, message))
            }
            // A request for one VM fails as its creation does.
            (Some(only), 1) => Err(only.error),
            (Some(last), _) => {
                let message = format!(
                    "none of the {count} VMs could be created: {}: {}",
                    last.name, last.error.message
                );
                Err(Error {
                    message,
                    ..last.error
                })
            }
        }
    }
}

/// The VMs that an operation has created.
pub(super) fn created_vms(output: Option<Output>) -> Result<CreatedVms> {
    match output {
        Some(Output::Vms(created)) => Ok(created),
        _ => {
            let message = "the operation has ended without VMs";
            Err(Error::new(ErrorKind::Internal, message))
        }
    }
}

pub(super) fn fork_result(created: CreatedVm, placement_us: u64, start: Instant) -> Forked {
    let times = ForkTimes {
        warm: created.warm,
        placement_us,
        running_us: created.running_us,
        identity_us: created.identity_us,
        total_us: micros(start),
    };
    Forked {
        times,
        notices: created.notices,
        addresses: created.addresses,
    }
}

pub(super) fn micros(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}
