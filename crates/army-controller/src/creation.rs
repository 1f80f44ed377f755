//! Creating VMs: they are placed, recorded, created by their hosts, and placed again where a host
//! turns out to be unable to run them.

mod placement;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use army_api::templates::Template;
use army_api::vms::{CreateVms, ForkTimes, ForkVm, MAX_SECONDS, Vm, VmFilter, VmState};
use army_node_api::requests::{
    CreateVmsRequest, CreateVmsResponse, CreatedVm, ForkVmRequest, VmSpec,
};
use army_node_api::time::now_ms;
use army_node_api::{NodeApi, validate};

use crate::admission::AdmittedRequest;
use crate::error::RETRY_S;
use crate::scheduler::{Need, UNKNOWN_COST};
use crate::store::vms::NewVms;
use crate::{Controller, Error, ErrorKind, Result, deadlines, random};

use placement::Placement;

/// The most VMs of one request.
const MAX_COUNT: u32 = 1000;
/// The most bytes of the names and values of a request's environment together.
const MAX_ENVIRONMENT: usize = 64 << 10;
/// The first part of the template name of a VM that was forked from a running VM.
const LIVE_PREFIX: &str = "vm:";

/// What became of a request for VMs.
#[derive(Debug)]
pub struct CreatedVms {
    /// The VMs that run, in the order of the request.
    pub vms: Vec<Vm>,
    /// The VMs that could not be created.
    pub failures: Vec<CreationFailure>,
}

/// A VM that could not be created.
#[derive(Debug)]
pub struct CreationFailure {
    /// The name of the VM.
    pub name: String,
    /// Why it could not be created.
    pub error: Error,
}

/// A request for VMs, whatever they are made of.
struct CreateRequest {
    origin: Origin,
    tenant: String,
    /// What the VMs' names begin with where the request does not name them.
    stem: String,
    idempotency_key: Option<String>,
    details: CreateVms,
}

/// What VMs are made of.
enum Origin {
    /// The template of this name.
    Template(String),
    /// The running VM with this id.
    RunningVm(String),
}

impl Origin {
    /// Has a node create VMs.
    async fn create(&self, node: &dyn NodeApi, vms: Vec<VmSpec>) -> Result<CreateVmsResponse> {
        let deadline = deadlines::creation(vms.len());
        let response = match self {
            Self::Template(template) => {
                let template = template.clone();
                let request = CreateVmsRequest { template, vms };
                node.create_vms(request, deadline).await
            }
            Self::RunningVm(parent) => {
                let parent = parent.clone();
                let request = ForkVmRequest { parent, vms };
                node.fork_vm(request, deadline).await
            }
        };
        Ok(response?)
    }
}

/// VMs with the results of their creation.
type Results = Vec<(Vm, Result<CreatedVm>)>;

/// The times of a fork, and its notices.
type Forked = (ForkTimes, Vec<String>);

impl Controller {
    /// Creates VMs from a template, and answers when they run.
    pub async fn create(
        &self,
        tenant: &str,
        details: CreateVms,
        idempotency_key: Option<&str>,
    ) -> Result<CreatedVms> {
        let start = Instant::now();
        check(&details)?;
        let template = self.store.template_or_tag(&details.template).await?;
        let request = CreateRequest {
            origin: Origin::Template(template.name.clone()),
            tenant: tenant.to_owned(),
            stem: template.name.clone(),
            idempotency_key: idempotency_key.map(str::to_owned),
            details: CreateVms {
                template: template.name.clone(),
                ..details
            },
        };
        let need = Need {
            cost_bytes: self.cost(&template.name).await?,
            // The template is copied to a host that has room.
            anywhere: true,
        };
        let admitted = self.admission.admit()?;
        let mut placement = Placement::new(self, &request, template, need, admitted);
        let hosts = placement.place(request.details.count).await?;
        let vms = self
            .record_vms(&request, hosts, &mut placement.admitted)
            .await?;
        self.create_on_hosts(&request, Some(placement), vms, start)
            .await
    }

    /// Creates forks of a running VM, which continues to run, on its own host.
    pub async fn fork_vm(
        &self,
        tenant: &str,
        parent: &Vm,
        fork: ForkVm,
        idempotency_key: Option<&str>,
    ) -> Result<CreatedVms> {
        let start = Instant::now();
        self.node_of(parent)?;
        let details = CreateVms {
            template: format!("{LIVE_PREFIX}{}", parent.id),
            count: fork.count,
            name: fork.name,
            labels: parent.labels.clone(),
            environment: self.store.environment(&parent.id).await?,
            network: parent.network.clone(),
            ..CreateVms::default()
        };
        check(&details)?;
        let request = CreateRequest {
            origin: Origin::RunningVm(parent.id.clone()),
            tenant: tenant.to_owned(),
            stem: parent.name.clone(),
            idempotency_key: idempotency_key.map(str::to_owned),
            details,
        };
        let mut admitted = self.admission.admit()?;
        let hosts = self.place_beside(parent, &request, &mut admitted).await?;
        let vms = self.record_vms(&request, hosts, &mut admitted).await?;
        self.create_on_hosts(&request, None, vms, start).await
    }

    /// Admits live forks to the host of their parent, by the same rules as any VM is admitted to a
    /// host: it must accept VMs and have memory for them.
    async fn place_beside(
        &self,
        parent: &Vm,
        request: &CreateRequest,
        admitted: &mut AdmittedRequest<'_>,
    ) -> Result<Vec<String>> {
        // What the forks are made of is on that host alone.
        let origin = Template {
            hosts: vec![parent.host.clone()],
            ..Template::default()
        };
        let mut views = self.host_views(&origin, &BTreeMap::new()).await?;
        views.retain(|view| view.name == parent.host);
        if !views.iter().any(|view| view.open) {
            let message = format!(
                "the host {} takes no VMs now, and a live fork is on its parent's host: it is \
                 drained, or does not answer",
                parent.host
            );
            return Err(Error::new(ErrorKind::Busy, message)
                .advise("make a template of the VM, and create VMs from it")
                .retry_after(RETRY_S));
        }
        let need = Need {
            cost_bytes: self.cost(&request.details.template).await?,
            anywhere: false,
        };
        let chosen = admitted.place(&mut views, need, request.details.count)?;
        Ok(vec![parent.host.clone(); chosen.len()])
    }

    /// Records VMs that are about to be created, one on each of `hosts`.
    async fn record_vms(
        &self,
        request: &CreateRequest,
        hosts: Vec<String>,
        admitted: &mut AdmittedRequest<'_>,
    ) -> Result<Vec<Vm>> {
        let names = request.names()?;
        let created_ms = now_ms();
        let details = &request.details;
        let expires_ms = details
            .ttl_s
            .map(|ttl| created_ms.saturating_add(ttl.saturating_mul(1000)));
        let mut vms = Vec::with_capacity(hosts.len());
        for (name, host) in names.into_iter().zip(hosts) {
            vms.push(Vm {
                id: random::hex::<6>()?,
                name,
                tenant: request.tenant.clone(),
                template: details.template.clone(),
                host,
                state: VmState::Creating,
                reason: None,
                labels: details.labels.clone(),
                created_ms,
                expires_ms,
                network: details.network.clone(),
                fork: None,
                notices: Vec::new(),
                memory: None,
            });
        }
        let new = NewVms {
            vms: &vms,
            environment: &details.environment,
            request: request.idempotency_key.as_deref(),
        };
        // This comes first, so that no report finds VMs in the database that nobody creates.
        admitted.add_vms(vms.iter().map(|vm| vm.id.clone()));
        self.store.insert_vms(&new).await?;
        Ok(vms)
    }

    /// The memory that a clone of a template is expected to cost, by those that were measured.
    async fn cost(&self, template: &str) -> Result<u64> {
        let filter = VmFilter {
            template: Some(template.to_owned()),
            limit: Some(100),
            ..VmFilter::default()
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

    /// Has all hosts create their VMs at the same time, and records the results. With a placement,
    /// VMs that their host cannot run are created by another one.
    async fn create_on_hosts(
        &self,
        request: &CreateRequest,
        mut placement: Option<Placement<'_>>,
        vms: Vec<Vm>,
        start: Instant,
    ) -> Result<CreatedVms> {
        let ids: Vec<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        let placement_us = micros(start);
        let mut finished = HashMap::new();
        let mut remaining = vms;
        while !remaining.is_empty() {
            let template = placement.as_ref().map(|it| &it.template);
            let results = self.create_once(request, template, remaining).await;
            let (refused, mut rest) = split(results, placement.is_some());
            remaining = Vec::new();
            if let Some(placement) = &mut placement
                && !refused.is_empty()
            {
                let (moved, failed) = placement.place_again(refused).await?;
                remaining = moved;
                rest.extend(failed);
            }
            for (vm, result) in rest {
                let forked = result.map(|created| fork_result(created, placement_us, start));
                self.store.record_fork_result(&vm.id, &forked).await?;
                finished.insert(vm.id.clone(), (vm, forked));
            }
        }
        answer(ids, finished)
    }

    /// Has each host create its VMs once.
    async fn create_once(
        &self,
        request: &CreateRequest,
        template: Option<&Template>,
        vms: Vec<Vm>,
    ) -> Results {
        let mut shares: BTreeMap<String, Vec<Vm>> = BTreeMap::new();
        for vm in vms {
            shares.entry(vm.host.clone()).or_default().push(vm);
        }
        let shares = shares.into_iter();
        let work = shares.map(|(host, vms)| self.create_share(request, template, host, vms));
        let results = futures_util::future::join_all(work).await;
        results.into_iter().flatten().collect()
    }

    async fn create_share(
        &self,
        request: &CreateRequest,
        template: Option<&Template>,
        host: String,
        vms: Vec<Vm>,
    ) -> Results {
        let specs = vms.iter().map(|vm| request.spec(vm)).collect();
        let cpus = self.reports().get(&host).map(|it| it.report.capacity.cpus);
        let results = async {
            let node = self.node(&host)?;
            if let Some(template) = template {
                self.ensure_template(&node, template).await?;
            }
            let _permit = self.admission.fork_permit(&host, cpus.unwrap_or(1)).await;
            request.origin.create(node.as_ref(), specs).await
        };
        let results: Vec<Result<CreatedVm>> = match results.await {
            Ok(response) => {
                let results = response.results.into_iter();
                results.map(|result| Ok(result?)).collect()
            }
            Err(error) => vms.iter().map(|_| Err(error.clone())).collect(),
        };
        vms.into_iter().zip(results).collect()
    }
}

impl CreateRequest {
    /// A VM as its node is to create it.
    fn spec(&self, vm: &Vm) -> VmSpec {
        VmSpec {
            expires_ms: vm.expires_ms,
            ttl_ms: self.details.ttl_s.map(|ttl| ttl.saturating_mul(1000)),
            idle: self.details.idle,
            network: vm.network.clone(),
            ..VmSpec::new(vm.id.clone(), 1, vm.name.clone())
        }
    }

    /// The names of the VMs.
    fn names(&self) -> Result<Vec<String>> {
        let count = self.details.count;
        let stem = match (&self.details.name, count) {
            (Some(name), 1) => return Ok(vec![name.clone()]),
            (Some(name), _) => name.clone(),
            (None, _) => {
                let stem: String = self.stem.chars().take(30).collect();
                format!("{stem}-{}", random::hex::<3>()?)
            }
        };
        if self.details.name.is_none() && count == 1 {
            return Ok(vec![stem]);
        }
        Ok((1..=count)
            .map(|number| format!("{stem}-{number}"))
            .collect())
    }
}

/// Checks what can be checked before anything is done.
fn check(details: &CreateVms) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidRequest, message));
    if !(1..=MAX_COUNT).contains(&details.count) {
        return invalid(format!(
            "`count` must be 1 to {MAX_COUNT}, not {}",
            details.count
        ));
    }
    let times = [details.ttl_s, details.idle.map(|idle| idle.after_s)];
    let is_invalid = |seconds: u64| !(1..=MAX_SECONDS).contains(&seconds);
    if times.into_iter().flatten().any(is_invalid) {
        return invalid(format!(
            "`ttl_s` and `idle.after_s` must be 1 to {MAX_SECONDS}"
        ));
    }
    if let Some(name) = &details.name
        && !clone_api::validate::is_valid_name(&format!("{name}-{}", details.count))
    {
        return invalid(format!("invalid VM name `{}`", name.escape_debug()));
    }
    if let Some(network) = &details.network {
        validate::egress(network)?;
    }
    let size = |(key, value): (&String, &String)| key.len() + value.len();
    if details.environment.iter().map(size).sum::<usize>() > MAX_ENVIRONMENT {
        return invalid(format!(
            "`environment` exceeds {MAX_ENVIRONMENT} bytes of names and values together"
        ));
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

/// Separates the VMs that another host may be able to run from the others.
fn split(results: Results, may_move: bool) -> (Vec<(Vm, Error)>, Results) {
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
fn answer(
    ids: Vec<String>,
    mut finished: HashMap<String, (Vm, Result<Forked>)>,
) -> Result<CreatedVms> {
    let mut created = CreatedVms {
        vms: Vec::new(),
        failures: Vec::new(),
    };
    for id in ids {
        match finished.remove(&id) {
            Some((mut vm, Ok((times, notices)))) => {
                vm.state = VmState::Running;
                vm.fork = Some(times);
                vm.notices = notices;
                created.vms.push(vm);
            }
            Some((vm, Err(error))) => created.failures.push(CreationFailure {
                name: vm.name,
                error,
            }),
            None => {}
        }
    }
    // A request for one VM fails as its creation does.
    if created.vms.is_empty() && created.failures.len() == 1 {
        return Err(created.failures.remove(0).error);
    }
    Ok(created)
}

fn fork_result(created: CreatedVm, placement_us: u64, start: Instant) -> Forked {
    let times = ForkTimes {
        warm: created.warm,
        placement_us,
        running_us: created.running_us,
        identity_us: created.identity_us,
        total_us: micros(start),
    };
    (times, created.notices)
}

fn micros(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}
