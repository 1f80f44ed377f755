//! Suspending VMs, and waking them.
//!
//! The journal says that a VM is suspended before its process is ended, and that it is not after it
//! goes on. What is in between after a kill is seen by what there is: a process, or a state on disk.

use army_api::vms::NetworkPolicy;
use army_node_api::{Error, Result, validate};
use clone_api::Client;
use clone_api::config::Egress;
use clone_host::launch::fork;
use clone_host::launch::resume::{self, Reach};
use clone_host::runtime::RunningVm;
use clone_host::suspend;

use crate::journal::Entry;
use crate::{Node, vm_name};

impl Node {
    /// Suspends a VM: its state is kept on disk, and its process ends. It is not an error if the VM
    /// is suspended already.
    ///
    /// # Errors
    /// Where the state cannot be written; the VM then runs on.
    pub fn suspend(&self, id: &str) -> Result<()> {
        self.turns.take(id, || self.suspend_in_turn(id))
    }

    pub(crate) fn suspend_in_turn(&self, id: &str) -> Result<()> {
        let entry = self.journal.get(id)?;
        entry.check_changeable()?;
        if entry.suspended {
            return Ok(());
        }
        let vm = self.find(id)?;
        self.journal.update(id, |entry| {
            entry.suspended = true;
            // The host may be restarted meanwhile, and its clock since the start with it.
            entry.ends_ms = None;
        })?;
        let suspended = suspend::suspend(&self.runtime, &vm);
        self.reports.invalidate(id);
        if let Err(error) = suspended {
            self.journal.update(id, |now| {
                now.suspended = false;
                now.ends_ms = entry.ends_ms;
            })?;
            return Err(error.into());
        }
        self.journal.set_asleep(id, false)
    }

    /// The VM, which is woken where it is suspended.
    pub(crate) fn find_awake(&self, id: &str) -> Result<RunningVm> {
        if !self.journal.get(id)?.suspended {
            return self.find(id);
        }
        self.turns.take(id, || {
            let entry = self.journal.get(id)?;
            entry.check_changeable()?;
            match entry.suspended {
                true => self.wake(&entry),
                // Another request has woken the VM.
                false => self.find(id),
            }
        })
    }

    pub(crate) fn wake(&self, entry: &Entry) -> Result<RunningVm> {
        let name = vm_name(&entry.id);
        let running = self.find(&entry.id);
        let suspended = self.runtime.suspended()?.find(&name)?;
        let vm = match (running, suspended) {
            // The suspension was interrupted, and the guest is paused in its process.
            (Ok(vm), _) => {
                Client::new(vm.dir.control_socket()).resume()?;
                vm
            }
            (Err(_), Some(suspended)) => {
                let reach = self.reach_of(entry)?;
                let resumed = resume::resume(&self.runtime, &suspended, reach.as_ref())?;
                for notice in &resumed.notices {
                    tracing::warn!(vm = entry.id, "{notice}");
                }
                resumed.vm
            }
            (Err(error), None) => return Err(error),
        };
        self.journal
            .update(&entry.id, |entry| entry.suspended = false)?;
        self.mark_used(&entry.id);
        self.reports.invalidate(&entry.id);
        Ok(vm)
    }

    /// The destinations that a VM may send to, where its network policy says so.
    pub(crate) fn reach_of(&self, entry: &Entry) -> Result<Option<Reach>> {
        let policy = entry.network.as_ref();
        let reach = policy.map(|policy| reach(policy, entry.ceiling.as_ref()));
        reach.transpose()
    }

    /// Continues a suspension or a resumption that an earlier process of the node did not finish. A
    /// VM of which there is neither a process nor a state has ended; what is examined next notices.
    pub(crate) fn recover_suspended(&self, entry: &Entry) {
        let name = vm_name(&entry.id);
        let state = self.runtime.suspended().and_then(|vms| vms.find(&name));
        let has_state = match state {
            Ok(state) => state.is_some(),
            Err(error) => {
                tracing::error!(vm = entry.id, message = error.message, "a suspended VM");
                return;
            }
        };
        let recovered = match (self.find(&entry.id), has_state) {
            // The guest may be paused in its process; where it runs, this changes nothing.
            (Ok(vm), _) => {
                let resumed = Client::new(vm.dir.control_socket()).resume();
                let resumed = resumed.map_err(Error::from);
                resumed.and_then(|()| self.journal.update(&entry.id, |it| it.suspended = false))
            }
            (Err(_), true) => Ok(()),
            (Err(_), false) => self.journal.update(&entry.id, |it| it.suspended = false),
        };
        if let Err(error) = recovered {
            tracing::error!(vm = entry.id, %error, "a suspended VM is not recovered");
        }
    }
}

/// What a network policy permits within what the VM's template permits.
fn reach(policy: &NetworkPolicy, ceiling: Option<&Egress>) -> Result<Reach> {
    let wanted = validate::egress(policy)?;
    Ok(Reach {
        egress: match ceiling {
            Some(ceiling) => fork::narrowed(&wanted, ceiling)?,
            None => wanted,
        },
        host: policy.host,
    })
}
