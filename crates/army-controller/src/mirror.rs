//! The VMs of this controller's own hosts, in memory.
//!
//! Hosts report every second, and mostly what is known: comparing with the database would cost a
//! query for each. The mirror is what the database had at the last change that was read. It is
//! brought up to date by reading the changes after that one, whoever made them. What is decided by
//! it is written on condition that the VM has not changed since.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use army_api::vms::{VmMemory, VmState};

use crate::Result;
use crate::store::Store;
use crate::store::vm_states::ChangedVm;

/// How old the mirror may be when a host's report is compared with it.
const FRESH: Duration = Duration::from_millis(50);

/// A VM that has not ended.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// The number of its last change.
    pub(crate) changed: i64,
    /// What the VM was forked from.
    pub(crate) template: String,
    /// The state that was last recorded.
    pub(crate) state: VmState,
    /// Whether nobody has requested its deletion.
    pub(crate) wanted: bool,
    /// The controller that creates the VM, or created it.
    pub(crate) creator: Option<String>,
    /// The memory that was last reported.
    pub(crate) memory: Option<VmMemory>,
    /// The addresses that were last reported.
    pub(crate) addresses: Vec<String>,
    /// The memory that was last written to the database.
    pub(crate) written: Option<VmMemory>,
    /// Whether the host has not applied all that was changed.
    pub(crate) pending: bool,
    /// The incarnation of the VM that may run.
    pub(crate) epoch: u64,
    /// The number of the comparison that has last found the VM in a report.
    pub(crate) seen: u64,
}

/// The VMs of some hosts.
#[derive(Default)]
pub(crate) struct Mirror {
    state: Mutex<State>,
    /// Held while changes are read.
    turn: tokio::sync::Mutex<Read>,
}

#[derive(Default)]
struct State {
    /// The number of the last change that was read.
    last: i64,
    hosts: HashMap<Arc<str>, HashMap<String, Known>>,
    /// The host of each VM.
    placed: HashMap<String, Arc<str>>,
}

/// When the mirror was last brought up to date, and to what.
#[derive(Default)]
struct Read {
    at: Option<Instant>,
    changes: u64,
}

impl Mirror {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the mirror up to date at once.
    pub(crate) async fn refresh_now(&self, store: &Store) -> Result<()> {
        let mut read = self.turn.lock().await;
        if let Some(at) = &mut read.at {
            *at = at.checked_sub(FRESH).unwrap_or(*at);
        }
        drop(read);
        self.refresh(store).await
    }

    /// Brings the mirror up to date, unless it is, or was a moment ago.
    pub(crate) async fn refresh(&self, store: &Store) -> Result<()> {
        let mut read = self.turn.lock().await;
        // A change that comes later is read the next time.
        let changes = store.changes();
        match read.at {
            None => {
                let last = store.last_vm_change().await?;
                self.state().last = last;
            }
            Some(at) if at.elapsed() < FRESH || read.changes == changes => return Ok(()),
            Some(_) => {}
        }
        loop {
            let last = self.state().last;
            let page = store.vms_changed_after(last).await?;
            if page.is_empty() {
                break;
            }
            let mut state = self.state();
            for vm in page {
                state.last = vm.number;
                state.apply(vm);
            }
        }
        *read = Read {
            at: Some(Instant::now()),
            changes,
        };
        Ok(())
    }

    /// Adds a host and its VMs, unless it is there.
    pub(crate) async fn add_host(&self, store: &Store, host: &str) -> Result<()> {
        self.refresh(store).await?;
        if self.state().hosts.contains_key(host) {
            return Ok(());
        }
        // From now on changes of its VMs are applied, too.
        self.state().hosts.insert(host.into(), HashMap::new());
        let vms = match store.vms_of_host(host).await {
            Ok(vms) => vms,
            Err(error) => {
                self.remove_host(host);
                return Err(error);
            }
        };
        let mut state = self.state();
        for vm in vms {
            state.apply(vm);
        }
        Ok(())
    }

    /// Removes a host and its VMs.
    pub(crate) fn remove_host(&self, host: &str) {
        let mut state = self.state();
        for id in state.hosts.remove(host).unwrap_or_default().into_keys() {
            state.placed.remove(&id);
        }
    }

    /// The number of the last change that is in the mirror.
    pub(crate) fn last(&self) -> i64 {
        self.state().last
    }

    /// Looks at the VMs of a host; nothing where the host is not in the mirror.
    pub(crate) fn with_host<T>(
        &self,
        host: &str,
        look: impl FnOnce(&mut HashMap<String, Known>) -> T,
    ) -> Option<T> {
        self.state().hosts.get_mut(host).map(look)
    }

    /// The number of VMs, for tests: what has ended is not in it.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let state = self.state();
        let vms: usize = state.hosts.values().map(HashMap::len).sum();
        vms.max(state.placed.len())
    }
}

impl State {
    fn apply(&mut self, vm: ChangedVm) {
        let former = self.placed.get(&vm.id).cloned();
        let mut entry = None;
        if let Some(host) = former
            && let Some(vms) = self.hosts.get_mut(&host)
        {
            match vms.get(&vm.id) {
                // The change was applied when the host was added.
                Some(known) if known.changed > vm.number => return,
                _ => entry = vms.remove(&vm.id),
            }
            self.placed.remove(&vm.id);
        }
        if !vm.alive {
            return;
        }
        let Some((host, _)) = self.hosts.get_key_value(vm.host.as_str()) else {
            return;
        };
        let host = Arc::clone(host);
        let known = Known {
            changed: vm.number,
            template: vm.template,
            state: vm.state,
            wanted: vm.wanted,
            creator: vm.creator,
            memory: entry.as_ref().and_then(|it| it.memory),
            addresses: entry
                .as_ref()
                .map(|it| it.addresses.clone())
                .unwrap_or_default(),
            written: entry.map_or(vm.memory, |it| it.written),
            pending: vm.pending,
            epoch: vm.epoch,
            seen: 0,
        };
        self.placed.insert(vm.id.clone(), Arc::clone(&host));
        self.hosts.entry(host).or_default().insert(vm.id, known);
    }
}
