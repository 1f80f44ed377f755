//! What the API asks for, done: placed, told to nodes, written down.
//!
//! [`fleet`] has what is done to hosts, [`templates`] what is done to templates, [`builds`] how they
//! are built of others, [`forks`] how VMs are placed and made, and all else of VMs is here.
//! The store holds what is wanted and what was last heard; [`reconcile`] goes over the difference.
//! HTTP, keys and roles are not known here.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod builds;
mod fleet;
mod forks;
pub mod guest;
mod making;
mod random;
pub mod reconcile;
mod renewal;
pub mod scheduler;
pub mod store;
mod templates;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use army_api::templates::Template;
use army_api::vms::{Balloon, CreateVms, CreatedVms, ForkVm, SnapshotVm, Vm, VmState};
use army_api::{Problem, ProblemKind};

use crate::scheduler::{Need, UNKNOWN_COST};
use crate::store::vms::NewVms;
use army_node_api::Report;
use army_node_api::VmSpec;
use army_node_api::host;
use army_node_api::policy;
use army_node_api::time::now_ms;

use crate::store::{Result, Store};
use army_node_api::blocking;

use army_node_api::remote::Remote;
use forks::Placement;
use making::Making;

/// The most VMs of one request.
const MAX_COUNT: u32 = 1000;
/// What a VM's template is called that was forked from a running one.
const LIVE_PREFIX: &str = "vm:";

/// Everything that a request needs.
pub struct Controller {
    /// What is remembered.
    pub store: Store,
    nodes: RwLock<BTreeMap<String, Node>>,
    heard: Mutex<HashMap<String, Heard>>,
    /// Hosts that were told to be unreachable.
    silent: Mutex<HashSet<String>>,
    /// VMs that this life is making: what it does not finish is taken up by what hosts say.
    making: Making,
    started: Instant,
    cluster: Option<Cluster>,
}

/// A host, near or far.
pub type Node = Arc<dyn host::Host>;

/// What it takes to have hosts elsewhere.
pub struct Cluster {
    /// How we connect to them.
    pub tls: rustls::ClientConfig,
    /// What our authority is known by.
    pub fingerprint: String,
}

/// What a node last said.
#[derive(Clone)]
struct Heard {
    report: Report,
    at: Instant,
}

/// VMs that are asked for, whatever they are made of.
struct Order {
    tenant: String,
    template: String,
    count: u32,
    name: Option<String>,
    stem: String,
    request: Option<String>,
    details: CreateVms,
}

impl Controller {
    /// A controller of one host, which is this one.
    pub fn alone(store: Store, node: Node) -> Self {
        Self::new(
            store,
            BTreeMap::from([(node.name().to_owned(), node)]),
            None,
        )
    }

    /// A controller of the hosts that have enrolled, and will.
    pub async fn of_cluster(store: Store, cluster: Cluster) -> Result<Self> {
        let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
        for host in store.hosts().await? {
            let Some(address) = host.address else {
                continue;
            };
            let remote = Remote::new(&host.name, address, cluster.tls.clone())?;
            nodes.insert(host.name, Arc::new(remote));
        }
        Ok(Self::new(store, nodes, Some(cluster)))
    }

    fn new(store: Store, nodes: BTreeMap<String, Node>, cluster: Option<Cluster>) -> Self {
        Self {
            store,
            nodes: RwLock::new(nodes),
            heard: Mutex::default(),
            silent: Mutex::default(),
            making: Making::default(),
            started: Instant::now(),
            cluster,
        }
    }

    /// The node of a VM that holds a place.
    pub fn node_of(&self, vm: &Vm) -> Result<Node> {
        if vm.state.is_alive() {
            return self.node(&vm.host);
        }
        let reason = vm.reason.as_deref().unwrap_or("the reason is unknown");
        let detail = format!("the VM {} has ended: {reason}", vm.name);
        Err(Problem::new(ProblemKind::Conflict, detail))
    }

    /// Makes VMs of a template.
    pub async fn create(
        &self,
        tenant: &str,
        details: CreateVms,
        request: Option<&str>,
    ) -> Result<CreatedVms> {
        let start = Instant::now();
        check(&details)?;
        let template = self.store.template_or_tag(&details.template).await?;
        let order = Order {
            tenant: tenant.to_owned(),
            template: template.name.clone(),
            count: details.count,
            name: details.name.clone(),
            stem: template.name.clone(),
            request: request.map(str::to_owned),
            details,
        };
        let need = Need {
            cost_bytes: self.cost(&template.name).await?,
            // It travels to where there is room.
            anywhere: true,
        };
        let making = self.making.request()?;
        let mut placement = Placement::new(self, &order, template.clone(), need, making);
        let hosts = placement.place(order.count).await?;
        let vms = self
            .write_down(&order, hosts, &mut placement.making)
            .await?;
        let make =
            move |node: &dyn host::Host, entries: &[VmSpec]| node.create(&template.name, entries);
        self.make(&order, Some(placement), vms, start, make).await
    }

    /// Forks a running VM, which goes on, on its own host.
    pub async fn fork_live(
        &self,
        tenant: &str,
        parent: &Vm,
        asked: ForkVm,
        request: Option<&str>,
    ) -> Result<CreatedVms> {
        let start = Instant::now();
        self.node_of(parent)?;
        let details = CreateVms {
            template: format!("{LIVE_PREFIX}{}", parent.id),
            count: asked.count,
            name: asked.name.clone(),
            labels: parent.labels.clone(),
            environment: self.store.environment(&parent.id).await?,
            network: parent.network.clone(),
            ..CreateVms::default()
        };
        check(&details)?;
        let order = Order {
            tenant: tenant.to_owned(),
            template: details.template.clone(),
            count: asked.count,
            name: asked.name,
            stem: parent.name.clone(),
            request: request.map(str::to_owned),
            details,
        };
        let hosts = vec![parent.host.clone(); order.count as usize];
        let mut making = self.making.request()?;
        let vms = self.write_down(&order, hosts, &mut making).await?;
        let id = parent.id.clone();
        let make = move |node: &dyn host::Host, entries: &[VmSpec]| node.fork_live(&id, entries);
        self.make(&order, None, vms, start, make).await
    }

    async fn write_down(
        &self,
        order: &Order,
        hosts: Vec<String>,
        making: &mut making::Request<'_>,
    ) -> Result<Vec<Vm>> {
        let names = names(order)?;
        let created_ms = now_ms();
        let mut vms = Vec::with_capacity(hosts.len());
        for (name, host) in names.into_iter().zip(hosts) {
            vms.push(Vm {
                id: random::hex::<6>()?,
                name,
                tenant: order.tenant.clone(),
                template: order.template.clone(),
                host,
                state: VmState::Creating,
                reason: None,
                labels: order.details.labels.clone(),
                created_ms,
                expires_ms: order
                    .details
                    .ttl_s
                    .map(|ttl| created_ms.saturating_add(ttl.saturating_mul(1000))),
                network: order.details.network.clone(),
                fork: None,
                notices: Vec::new(),
                memory: None,
            });
        }
        let new = NewVms {
            vms: &vms,
            environment: &order.details.environment,
            request: order.request.as_deref(),
        };
        // First, so that nobody finds them without a maker.
        making.name(vms.iter().map(|vm| vm.id.clone()));
        self.store.add_vms(&new).await?;
        Ok(vms)
    }

    /// Ends a VM. What is over already is answered as it is.
    pub async fn destroy(&self, vm: &Vm) -> Result<Vm> {
        if vm.state.is_alive() {
            self.store.unwant_vm(&vm.id).await?;
            // Where its host is not here now, it is told when it is.
            let node = self.node(&vm.host);
            let id = vm.id.clone();
            match blocking(move || node?.destroy(&id, "destroyed")).await {
                Ok(()) => {
                    let ids = [vm.id.clone()];
                    self.store
                        .set_vms(&ids, VmState::Ended, "destroyed")
                        .await?;
                }
                Err(problem) if problem.kind == ProblemKind::HostUnavailable => {}
                Err(problem) => return Err(problem),
            }
        }
        self.store.vm(&vm.id, None).await
    }

    /// Stops a VM's CPUs, or sets them going again.
    pub async fn set_paused(&self, vm: &Vm, paused: bool) -> Result<Vm> {
        let node = self.node_of(vm)?;
        let id = vm.id.clone();
        blocking(move || match paused {
            true => node.pause(&id),
            false => node.resume(&id),
        })
        .await?;
        let state = match paused {
            true => VmState::Paused,
            false => VmState::Running,
        };
        self.store
            .set_vms(std::slice::from_ref(&vm.id), state, "")
            .await?;
        self.store.vm(&vm.id, None).await
    }

    /// A VM's balloon; with `bytes` after asking for that size.
    pub async fn balloon(&self, vm: &Vm, bytes: Option<u64>) -> Result<Balloon> {
        let node = self.node_of(vm)?;
        let id = vm.id.clone();
        blocking(move || node.balloon(&id, bytes)).await
    }

    /// Makes a template of a VM, which goes on, and takes it up.
    pub async fn snapshot(&self, vm: &Vm, asked: SnapshotVm) -> Result<Template> {
        let node = self.node_of(vm)?;
        let (id, name) = (vm.id.clone(), asked.template.clone());
        let facts = blocking(move || node.snapshot(&id, &name, asked.diff)).await?;
        self.take_up(&asked.template, &vm.host, 0, facts).await
    }

    /// What a clone of a template costs, by those that there are.
    async fn cost(&self, template: &str) -> Result<u64> {
        let filter = army_api::vms::VmFilter {
            template: Some(template.to_owned()),
            limit: Some(100),
            ..Default::default()
        };
        let page = self.store.vms(&filter, None).await?;
        let measured: Vec<u64> = page
            .vms
            .iter()
            .filter_map(|vm| Some(vm.memory?.private_bytes))
            .collect();
        Ok(match measured.len() as u64 {
            0 => UNKNOWN_COST,
            count => measured.iter().sum::<u64>() / count,
        })
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, HashMap<String, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(details: &CreateVms) -> Result<()> {
    let invalid = |detail: String| Err(Problem::new(ProblemKind::InvalidRequest, detail));
    if !(1..=MAX_COUNT).contains(&details.count) {
        return invalid(format!(
            "`count` must be 1 to {MAX_COUNT}, not {}",
            details.count
        ));
    }
    if details.ttl_s == Some(0) || details.idle.is_some_and(|idle| idle.after_s == 0) {
        return invalid("`ttl_s` and `idle.after_s` must be at least 1".to_owned());
    }
    if let Some(name) = &details.name
        && !clone_api::validate::is_valid_name(&format!("{name}-{}", details.count))
    {
        return invalid(format!("invalid VM name `{}`", name.escape_debug()));
    }
    if let Some(network) = &details.network {
        policy::egress(network)?;
    }
    for (key, value) in &details.environment {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return invalid(format!(
                "invalid environment variable `{}`",
                key.escape_debug()
            ));
        }
    }
    Ok(())
}

fn names(order: &Order) -> Result<Vec<String>> {
    let stem = match (&order.name, order.count) {
        (Some(name), 1) => return Ok(vec![name.clone()]),
        (Some(name), _) => name.clone(),
        (None, _) => {
            let stem: String = order.stem.chars().take(30).collect();
            format!("{stem}-{}", random::hex::<3>()?)
        }
    };
    if order.name.is_none() && order.count == 1 {
        return Ok(vec![stem]);
    }
    Ok((1..=order.count)
        .map(|number| format!("{stem}-{number}"))
        .collect())
}
