//! What controller and node tell each other.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use army_api::hosts::{Capacity, MissingJailLayer};
use army_api::templates::CpuFeatures;
use army_api::vms::{IdlePolicy, NetworkPolicy, VmMemory, VmState};
use serde::{Deserialize, Serialize};

/// A VM that is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The VM's id.
    pub id: String,
    /// The life of the VM that this is. A node refuses an epoch that is not newer than the one that
    /// it knows.
    pub epoch: u64,
    /// The guest's host name.
    pub name: String,
    /// When the VM is destroyed, in milliseconds since 1970 by the controller's clock.
    pub expires_ms: Option<u64>,
    /// How long the VM may live, in milliseconds. Takes precedence over `expires_ms`.
    pub ttl_ms: Option<u64>,
    /// What the node does when the VM is not used.
    pub idle: Option<IdlePolicy>,
    /// What the VM's network permits; `None` is the default policy.
    pub network: Option<NetworkPolicy>,
}

impl VmSpec {
    /// A VM without limits and policies.
    pub fn new(id: String, epoch: u64, name: String) -> Self {
        Self {
            id,
            epoch,
            name,
            expires_ms: None,
            ttl_ms: None,
            idle: None,
            network: None,
        }
    }
}

/// A VM that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Whether it was a standby.
    pub warm: bool,
    /// From the request to its guest running, in microseconds.
    pub running_us: u64,
    /// From then until it had its own identity, in microseconds.
    pub identity_us: u64,
    /// What its host or its guest could not do. Nodes of older releases say nothing of it.
    #[serde(default)]
    pub notices: Vec<String>,
}

/// What a host knows of a template.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TemplateFacts {
    /// The hash of its content.
    pub id: String,
    /// The template that it is a difference to.
    pub parent: Option<String>,
    /// The RAM of its clones.
    pub memory_bytes: u64,
    /// Data in its memory layers.
    pub data_bytes: u64,
    /// CPUs of its clones.
    pub vcpus: u32,
    /// When it was taken.
    pub taken_ms: u64,
    /// The CPU features that its clones need; nodes of former versions do not say.
    #[serde(default)]
    pub cpu: Option<CpuFeatures>,
}

/// Where another host gets a template.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// The host that has it.
    pub host: String,
    /// Where its node listens.
    pub address: std::net::SocketAddr,
    /// The template's name, there and here.
    pub template: String,
    /// The hash of its content.
    pub id: String,
}

/// What the controller learns of a host in one go.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// What it has.
    pub capacity: Capacity,
    /// The layers that the jail of its VMs lacks.
    #[serde(default)]
    pub missing_jail_layers: Vec<MissingJailLayer>,
    /// Its VMs, those that ended since the journal forgot none of them included.
    pub vms: Vec<VmReport>,
    /// Standbys that are ready, by the template's name.
    pub ready: HashMap<String, u32>,
    /// The CPU features that clones can have on the host; nodes of former versions do not say.
    #[serde(default)]
    pub cpu: Option<CpuFeatures>,
}

/// What a host says of one VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub id: String,
    /// What it does.
    pub state: VmState,
    /// Why it is over.
    pub reason: Option<String>,
    /// Its memory, where it runs.
    pub memory: Option<VmMemory>,
}

/// Somebody uses a VM while this lives.
pub struct InUse(Option<Arc<AtomicU64>>);

impl InUse {
    /// Counts one use in `open` until this is dropped.
    pub fn count(open: Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Some(open))
    }

    /// For a VM of another process, which counts by itself.
    pub fn elsewhere() -> Self {
        Self(None)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(open) = &self.0 {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
