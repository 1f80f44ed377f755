//! What the API asks for, done: placed, told to nodes, written down.
//!
//! The store holds what is wanted and what was last heard; [`reconcile`] goes over the difference.
//! HTTP, keys and roles are not known here.

pub mod host;
pub mod reconcile;
pub mod remote;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use army_api::hosts::{Host, HostState};
use army_api::templates::{RegisterTemplate, Template};
use army_api::vms::{
    Balloon, CreateVms, CreatedVms, Failure, ForkTimes, ForkVm, SnapshotVm, Vm, VmState,
};
use army_api::{Problem, ProblemKind};

use crate::cluster::enrol::Token;
use crate::node::journal::Entry;
use crate::node::supervise::now_ms;
use crate::node::{Made, Report, TemplateFacts};
use crate::scheduler::{self, HostView, Need, UNKNOWN_COST};
use crate::store::vms::NewVms;
use crate::store::{Result, Store};
use crate::{blocking, random};

use host::Origin;
use remote::Remote;

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
    /// Memory given away since then.
    promised: u64,
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
            cluster,
        }
    }

    fn nodes(&self) -> Vec<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.values().cloned().collect()
    }

    fn find_node(&self, host: &str) -> Option<Node> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(host).cloned()
    }

    fn node(&self, host: &str) -> Result<Node> {
        self.find_node(host).ok_or_else(|| {
            let detail = format!("the host {host} is not here");
            Problem::new(ProblemKind::HostUnavailable, detail).retry_after(5)
        })
    }

    fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().ok_or_else(|| {
            let detail = "this Army has one host only: `army dev` serves it";
            Problem::new(ProblemKind::Conflict, detail)
                .advise("run `army controller` and an `army node` on each host")
        })
    }

    /// Takes up a host that has just enrolled.
    pub fn connect(&self, host: &str, address: SocketAddr) -> Result<()> {
        let remote = Remote::new(host, address, self.cluster()?.tls.clone())?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.insert(host.to_owned(), Arc::new(remote));
        Ok(())
    }

    /// A token that a host joins with, once, within `minutes`; and when it ends, in milliseconds
    /// since 1970.
    pub async fn token(&self, minutes: u32) -> Result<(Token, u64)> {
        let cluster = self.cluster()?;
        let token = Token {
            secret: random::hex::<32>()?,
            fingerprint: cluster.fingerprint.clone(),
        };
        let expires_ms = now_ms() + u64::from(minutes) * 60_000;
        self.store.add_token(&token.secret, expires_ms).await?;
        Ok((token, expires_ms))
    }

    /// Gives a host up. One that answers and has VMs keeps them, and stays.
    pub async fn remove_host(&self, name: &str) -> Result<()> {
        self.cluster()?;
        let host = self.host(name).await?;
        if host.state != HostState::Unreachable && host.vms > 0 {
            let detail = format!("the host {name} has {} VMs", host.vms);
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .advise("drain it, and destroy them or let them end"));
        }
        self.store.remove_host(name).await?;
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.remove(name);
        drop(nodes);
        self.heard().remove(name);
        Ok(())
    }

    /// The node of a VM that holds a place.
    pub fn node_of(&self, vm: &Vm) -> Result<Node> {
        if vm.state.is_alive() {
            return self.node(&vm.host);
        }
        let reason = vm.reason.as_deref().unwrap_or("it ended");
        let detail = format!("the VM {} is over: {reason}", vm.name);
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
        let template = self.store.template(&details.template).await?;
        let order = Order {
            tenant: tenant.to_owned(),
            template: template.name.clone(),
            count: details.count,
            name: details.name.clone(),
            stem: template.name.clone(),
            request: request.map(str::to_owned),
            details,
        };
        let mut views = self.views(Some(&template)).await?;
        let need = Need {
            cost_bytes: self.cost(&template.name).await?,
            // It travels to where there is room.
            anywhere: true,
        };
        let chosen = scheduler::place(&mut views, need, order.count)?;
        self.charge(&views, &chosen, need);
        let hosts = chosen.iter().map(|index| views[*index].name.clone());
        let vms = self.write_down(&order, hosts.collect()).await?;
        let made = template.clone();
        self.make(&order, Some(&template), vms, start, move |node, entries| {
            node.create(&made.name, entries)
        })
        .await
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
        let vms = self.write_down(&order, hosts).await?;
        let id = parent.id.clone();
        self.make(&order, None, vms, start, move |node, entries| {
            node.fork_live(&id, entries)
        })
        .await
    }

    async fn write_down(&self, order: &Order, hosts: Vec<String>) -> Result<Vec<Vm>> {
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
                fork: None,
                memory: None,
            });
        }
        let new = NewVms {
            vms: &vms,
            environment: &order.details.environment,
            request: order.request.as_deref(),
        };
        self.store.add_vms(&new).await?;
        Ok(vms)
    }

    /// Tells each host to make its share, side by side, and writes down how it went. A host
    /// without the template gets it first.
    async fn make(
        &self,
        order: &Order,
        template: Option<&Template>,
        vms: Vec<Vm>,
        start: Instant,
        make: impl Fn(&dyn host::Host, &[Entry]) -> Vec<Result<Made>> + Clone + Send + 'static,
    ) -> Result<CreatedVms> {
        let mut shares: BTreeMap<String, Vec<Vm>> = BTreeMap::new();
        let ids: Vec<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        for vm in vms {
            shares.entry(vm.host.clone()).or_default().push(vm);
        }
        let placement_us = micros(start);
        let mut work = Vec::new();
        for (host, share) in shares {
            let node = self.node(&host);
            let make = make.clone();
            let idle = order.details.idle;
            work.push(async move {
                let entries: Vec<Entry> = share.iter().map(|vm| entry(vm, idle)).collect();
                let results = async {
                    let node = node?;
                    if let Some(template) = template {
                        self.bring(&node, template).await?;
                    }
                    blocking(move || Ok(make(node.as_ref(), &entries))).await
                };
                let results = results.await;
                let results = results
                    .unwrap_or_else(|problem| share.iter().map(|_| Err(problem.clone())).collect());
                share.into_iter().zip(results).collect::<Vec<_>>()
            });
        }
        let mut made = HashMap::new();
        for (vm, result) in futures_util::future::join_all(work)
            .await
            .into_iter()
            .flatten()
        {
            let times = result.map(|made| ForkTimes {
                warm: made.warm,
                placement_us,
                running_us: made.running_us,
                identity_us: made.identity_us,
                total_us: micros(start),
            });
            self.store.made_vm(&vm.id, &times).await?;
            made.insert(vm.id.clone(), (vm, times));
        }
        let mut created = CreatedVms {
            vms: Vec::new(),
            failures: Vec::new(),
        };
        for id in ids {
            match made.remove(&id) {
                Some((mut vm, Ok(times))) => {
                    vm.state = VmState::Running;
                    vm.fork = Some(times);
                    created.vms.push(vm);
                }
                Some((vm, Err(problem))) => created.failures.push(Failure {
                    name: vm.name,
                    problem,
                }),
                None => {}
            }
        }
        // The only one that was asked for fails as the request does.
        if created.vms.is_empty() && created.failures.len() == 1 {
            return Err(created.failures.remove(0).problem);
        }
        Ok(created)
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

    /// Takes up a template that a host has.
    pub async fn register(&self, asked: &RegisterTemplate) -> Result<Template> {
        let host = match (&asked.host, self.nodes().as_slice()) {
            (Some(host), _) => host.clone(),
            (None, [only]) => only.name().to_owned(),
            (None, nodes) => {
                let detail = format!("say which host has the template: there are {}", nodes.len());
                return Err(Problem::new(ProblemKind::InvalidRequest, detail));
            }
        };
        let node = self.node(&host)?;
        let name = asked.name.clone();
        let facts = blocking(move || node.template(&name)).await?;
        self.take_up(&asked.name, &host, asked.standbys, facts)
            .await
    }

    async fn take_up(
        &self,
        name: &str,
        host: &str,
        standbys: u32,
        facts: TemplateFacts,
    ) -> Result<Template> {
        let template = Template {
            name: name.to_owned(),
            id: facts.id,
            parent: facts.parent,
            host: host.to_owned(),
            hosts: vec![host.to_owned()],
            memory_bytes: facts.memory_bytes,
            data_bytes: facts.data_bytes,
            vcpus: facts.vcpus,
            taken_ms: facts.taken_ms,
            standbys,
            ready: 0,
            vms: 0,
        };
        self.store.add_template(&template).await?;
        self.keep(&template).await?;
        Ok(template)
    }

    /// Changes how many clones of a template are kept ready.
    pub async fn set_standbys(&self, name: &str, standbys: u32) -> Result<Template> {
        self.store.set_standbys(name, standbys).await?;
        let template = self.template(name).await?;
        self.keep(&template).await?;
        Ok(template)
    }

    /// Has clones of a template kept ready on every host that has it.
    async fn keep(&self, template: &Template) -> Result<()> {
        for host in &template.hosts {
            self.keep_on(&self.node(host)?, template).await?;
        }
        Ok(())
    }

    async fn keep_on(&self, node: &Node, template: &Template) -> Result<()> {
        let node = Arc::clone(node);
        let (name, standbys) = (template.name.clone(), template.standbys);
        blocking(move || node.keep(&name, standbys)).await
    }

    /// Takes a template to another host, so that VMs start there as fast as here.
    pub async fn copy_template(&self, name: &str, host: &str) -> Result<Template> {
        let template = self.store.template(name).await?;
        self.host(host).await?;
        self.bring(&self.node(host)?, &template).await?;
        self.template(name).await
    }

    /// Takes a template to `node`, unless it has it.
    async fn bring(&self, node: &Node, template: &Template) -> Result<()> {
        if template.hosts.iter().any(|host| host == node.name()) {
            return Ok(());
        }
        let mut answer = Err(Problem::new(
            ProblemKind::HostUnavailable,
            format!("no host that has the template `{}` answers", template.name),
        ));
        for host in &template.hosts {
            let Some(address) = self.find_node(host).and_then(|node| node.address()) else {
                continue;
            };
            let origin = Origin {
                host: host.clone(),
                address,
                template: template.name.clone(),
                id: template.id.clone(),
            };
            let node = Arc::clone(node);
            answer = blocking(move || node.fetch(&origin)).await;
            match &answer {
                Err(problem) if problem.kind == ProblemKind::HostUnavailable => {}
                _ => break,
            }
        }
        answer?;
        self.store.add_copy(&template.name, node.name()).await?;
        self.keep_on(node, template).await
    }

    /// Removes a template that nobody uses, from its hosts too.
    pub async fn remove_template(&self, name: &str) -> Result<()> {
        let template = self.template(name).await?;
        if template.vms > 0 {
            let detail = format!("{} VMs were made of the template `{name}`", template.vms);
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .advise("destroy them first: they lie on its memory"));
        }
        for host in template.hosts {
            let node = self.node(&host)?;
            let on_host = name.to_owned();
            match blocking(move || node.remove_template(&on_host)).await {
                // It was removed before all were asked, or by hand.
                Err(problem) if problem.kind == ProblemKind::NotFound => {}
                removed => removed?,
            }
        }
        self.store.remove_template(name).await
    }

    /// A template with its figures of the moment.
    pub async fn template(&self, name: &str) -> Result<Template> {
        let template = self.store.template(name).await?;
        let used = self.store.vms_by_template().await?;
        Ok(self.with_figures(template, &used))
    }

    /// All templates with their figures of the moment.
    pub async fn templates(&self) -> Result<Vec<Template>> {
        let used = self.store.vms_by_template().await?;
        let templates = self.store.templates().await?;
        let templates = templates.into_iter();
        Ok(templates.map(|it| self.with_figures(it, &used)).collect())
    }

    fn with_figures(&self, mut template: Template, used: &BTreeMap<String, u32>) -> Template {
        template.vms = used.get(&template.name).copied().unwrap_or(0);
        let heard = self.heard();
        let ready = template.hosts.iter().filter_map(|host| {
            let ready = &heard.get(host)?.report.ready;
            ready.get(&template.name)
        });
        template.ready = ready.sum();
        template
    }

    /// One host.
    pub async fn host(&self, name: &str) -> Result<Host> {
        let hosts = self.hosts().await?;
        hosts
            .into_iter()
            .find(|host| host.name == name)
            .ok_or_else(|| {
                let detail = format!("there is no host `{}`", name.escape_debug());
                Problem::new(ProblemKind::NotFound, detail)
            })
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<Host>> {
        let counts = self.store.vms_by_host().await?;
        let rows = self.store.hosts().await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let here = self.find_node(&row.name).is_some();
                let fresh = now_ms().saturating_sub(row.seen_ms) < reconcile::SILENCE_MS;
                let (state, reason) = match (here && fresh, row.draining) {
                    (false, _) => (
                        HostState::Unreachable,
                        Some("nothing was heard of it for a while".to_owned()),
                    ),
                    (true, true) => (HostState::Draining, None),
                    (true, false) => (HostState::Ready, None),
                };
                Host {
                    vms: counts.get(&row.name).copied().unwrap_or(0),
                    name: row.name,
                    state,
                    reason,
                    labels: row.labels,
                    seen_ms: row.seen_ms,
                    capacity: row.capacity,
                }
            })
            .collect())
    }

    async fn views(&self, template: Option<&Template>) -> Result<Vec<HostView>> {
        let hosts = self.hosts().await?;
        let heard = self.heard();
        let views = hosts.into_iter().map(|host| {
            let heard = heard.get(&host.name);
            let ready = template.and_then(|it| heard?.report.ready.get(&it.name).copied());
            HostView {
                open: host.state == HostState::Ready,
                cpus: host.capacity.cpus,
                load_milli: host.capacity.load_milli,
                memory_bytes: host.capacity.memory_bytes,
                available_bytes: host
                    .capacity
                    .available_bytes
                    .saturating_sub(heard.map_or(0, |heard| heard.promised)),
                vms: host.vms,
                has_template: template.is_some_and(|it| it.hosts.contains(&host.name)),
                ready: ready.unwrap_or(0),
                name: host.name,
            }
        });
        Ok(views.collect())
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

    fn charge(&self, views: &[HostView], chosen: &[usize], need: Need) {
        let mut heard = self.heard();
        for index in chosen {
            if let Some(heard) = heard.get_mut(&views[*index].name) {
                heard.promised += need.cost_bytes;
            }
        }
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, HashMap<String, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}

fn entry(vm: &Vm, idle: Option<army_api::vms::IdlePolicy>) -> Entry {
    let mut entry = Entry::new(vm.id.clone(), 1, vm.name.clone());
    entry.expires_ms = vm.expires_ms;
    entry.idle = idle;
    entry
}

fn check(details: &CreateVms) -> Result<()> {
    let invalid = |detail: String| Err(Problem::new(ProblemKind::InvalidRequest, detail));
    if !(1..=MAX_COUNT).contains(&details.count) {
        return invalid(format!(
            "`count` is 1 to {MAX_COUNT}, not {}",
            details.count
        ));
    }
    if details.ttl_s == Some(0) || details.idle.is_some_and(|idle| idle.after_s == 0) {
        return invalid("a time of 0 seconds would end the VMs at once".to_owned());
    }
    if let Some(name) = &details.name
        && !clone_api::validate::is_valid_name(&format!("{name}-{}", details.count))
    {
        return invalid(format!("`{}` is no name of a VM", name.escape_debug()));
    }
    for (key, value) in &details.environment {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return invalid(format!("`{}` is no variable", key.escape_debug()));
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
