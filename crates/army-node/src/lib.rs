//! A host of Army: its VMs, their journal, their supervision and their standbys.
//!
//! The node owns the truth about its VMs. Its [`journal`] is what it knows of them after a restart,
//! and the VMs' directories and processes are what there is. [`supervise`] compares the two, and
//! enforces times to live and idle policies without asking anybody. Who may ask a node for something
//! is not known here.
//!
//! [`Node`] blocks, and [`NodeService`] is the node behind the contract with the controller
//! ([`army_node_api::NodeApi`]), which does not.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod agent;
pub mod capacity;
mod change;
mod checkpoints;
mod fence;
mod figures;
mod fork;
pub mod journal;
pub mod membership;
mod moves;
mod report;
mod service;
mod standbys;
pub mod supervise;
mod suspend;
mod templates;
mod turns;
mod watch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use army_api::templates::CpuFeatures;
use army_api::vms::Balloon;
use army_node_api::{Error, ErrorKind, Result};
use clone_api::jail::JailStatus;
use clone_api::{Bytes, Client, ErrorCode};
use clone_host::launch::fork as launch;
use clone_host::launch::fork::Source;
use clone_host::programs;
use clone_host::runtime::{RunningVm, Runtime};
use clone_template::Store;
use tokio::sync::Semaphore;

use agent::Usage;
use fence::FenceFile;
use journal::{Journal, Stage};
use moves::Transfers;
use report::ReportCache;

pub use service::NodeService;
use standbys::Standbys;
use turns::Turns;

/// The beginning of the names that Army's VMs have on their host.
pub const VM_PREFIX: &str = "army-";

/// The VMs of a host.
pub struct Node {
    name: String,
    runtime: Runtime,
    store: Store,
    journal: Journal,
    fence: FenceFile,
    /// Templates that are open to be forked, by name.
    sources: Mutex<HashMap<String, Arc<Source>>>,
    standbys: Standbys,
    turns: Turns,
    /// Held while a template is received.
    receiving: Mutex<()>,
    reports: ReportCache,
    /// The CPU features that clones can have on this host.
    cpu: Option<CpuFeatures>,
    /// How each VM is used, by id.
    usage: Mutex<HashMap<String, Usage>>,
    /// The VMs that this process is sending or receiving.
    transfers: Transfers,
    /// A permit for each thread that may look at a VM for a connection to its agent.
    looking: Semaphore,
    /// How complete the jail of VMs is on this host, once it was checked.
    jail: OnceLock<JailStatus>,
}

impl Node {
    /// The node of the host `name`, with its journal in `state`. VMs that an earlier process of it
    /// created and that run are supervised again; VMs that it was creating are ended.
    ///
    /// # Errors
    /// Where the journal cannot be read.
    pub fn open(name: String, state: PathBuf, runtime: Runtime, store: Store) -> Result<Arc<Self>> {
        // VMs are started from the program of this build, whatever is installed over it later. Where
        // there is none, each start says so.
        let _ = programs::vm_process();
        let journal = Journal::open(state.clone())?;
        let fence = FenceFile::open(&state)?;
        let node = Arc::new(Self {
            name,
            turns: Turns::default(),
            receiving: Mutex::default(),
            standbys: Standbys::new(runtime.clone()),
            runtime,
            store,
            journal,
            fence,
            sources: Mutex::default(),
            reports: ReportCache::default(),
            cpu: host_cpu(),
            usage: Mutex::default(),
            transfers: Transfers::default(),
            looking: Semaphore::new(agent::LOOKING),
            jail: OnceLock::new(),
        });
        node.recover();
        Ok(node)
    }

    /// Checks how complete the jail of VMs is on this host, for reports.
    ///
    /// # Errors
    /// Where the jail lacks a layer that this node requires: no VM could be created.
    pub fn check_jail(&self) -> clone_start::Result<()> {
        let jail = clone_host::launch::check_jail(&self.runtime)?;
        for warning in jail.warnings() {
            tracing::warn!("{warning}");
        }
        let checked = self.runtime.required_jail().check(&jail);
        let _ = self.jail.set(jail);
        checked
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ends a VM. It is not an error if the VM has ended, or is unknown.
    pub fn destroy(&self, id: &str, reason: &str) -> Result<()> {
        self.journal
            .advance(id, Stage::Ended(reason.to_owned()))
            .or_else(|error| match error.kind {
                ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })?;
        let ended = self.end_for_good(id);
        lock(&self.usage).remove(id);
        ended
    }

    /// Ends the process of a VM that has ended by the journal, and removes its state.
    pub(crate) fn end_for_good(&self, id: &str) -> Result<()> {
        // What is changing the VM ends with its process, and then cannot start it again.
        self.end_process(id)?;
        self.turns.take(id, || {
            self.end_process(id)?;
            Ok(self.runtime.discard_suspended(&vm_name(id))?)
        })
    }

    /// Ends the process of a VM, if it has one.
    fn end_process(&self, id: &str) -> Result<()> {
        match self.runtime.find(&vm_name(id)) {
            Ok(vm) => launch::end(&self.runtime, &vm),
            Err(error) if error.code == ErrorCode::NotFound => {}
            // A suspended VM has no process.
            Err(_) if self.journal.get(id).is_ok_and(|it| it.suspended) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Refuses what would interfere with the move of a VM.
    fn check_not_moving(&self, id: &str) -> Result<()> {
        match self.journal.get(id) {
            Ok(entry) if entry.departure.is_some() || entry.stage == Stage::Arriving => {
                entry.check_changeable()
            }
            _ => Ok(()),
        }
    }

    /// Stops the CPUs of a VM.
    pub fn pause(&self, id: &str) -> Result<()> {
        self.check_not_moving(id)?;
        let paused = self.client(id)?.pause();
        self.reports.invalidate(id);
        Ok(paused?)
    }

    /// Lets the CPUs of a paused VM run again, or wakes a suspended VM.
    pub fn resume(&self, id: &str) -> Result<()> {
        self.check_not_moving(id)?;
        self.mark_used(id);
        self.find_awake(id)?;
        let resumed = self.client(id)?.resume();
        self.reports.invalidate(id);
        Ok(resumed?)
    }

    /// Reads a VM's balloon, after requesting the size `target_bytes` where it is given.
    pub fn balloon(&self, id: &str, target_bytes: Option<u64>) -> Result<Balloon> {
        let client = self.client(id)?;
        let status = match target_bytes {
            Some(bytes) => client.set_balloon(Bytes(bytes)),
            None => client.balloon(),
        };
        if target_bytes.is_some() {
            self.reports.invalidate(id);
        }
        let status = status?;
        Ok(Balloon {
            target_bytes: status.target_bytes,
            actual_bytes: status.actual_bytes,
            available_bytes: status.guest.and_then(|guest| guest.available_bytes),
        })
    }

    /// The VM with this id, which must run.
    fn find(&self, id: &str) -> Result<RunningVm> {
        self.runtime
            .find(&vm_name(id))
            .map_err(|error| match error.code {
                ErrorCode::NotFound => not_running(id),
                _ if self.journal.get(id).is_ok_and(|it| it.suspended) => {
                    let message = "the VM is suspended: resume it first";
                    Error::new(ErrorKind::Conflict, message)
                }
                _ => error.into(),
            })
    }

    fn client(&self, id: &str) -> Result<Client> {
        Ok(Client::new(self.find(id)?.dir.control_socket()))
    }
}

/// A VM's name on its host.
fn vm_name(id: &str) -> String {
    format!("{VM_PREFIX}{id}")
}

fn not_running(id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the VM {id} does not run"))
}

/// Clone's description of CPU features, as Army's API has it.
fn cpu_features(cpu: clone_api::control::CpuFeatures) -> CpuFeatures {
    CpuFeatures {
        vendor: cpu.vendor,
        features: cpu.features,
    }
}

/// The CPU features of this host; `None` where they cannot be found out.
fn host_cpu() -> Option<CpuFeatures> {
    match clone_start::cpu::of_host() {
        Ok(cpu) => Some(cpu_features(cpu)),
        Err(error) => {
            // The first fork fails for the same reason, and its client receives the error.
            tracing::warn!(
                message = error.message,
                "this host's CPU features are unknown"
            );
            None
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
