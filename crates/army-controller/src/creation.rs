//! Creating VMs: they are placed, recorded, created by their hosts, and placed again where a host
//! turns out to be unable to run them.

#[cfg(test)]
mod bursts;
mod check;
mod placement;
mod results;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use army_api::operations::OperationKind;
use army_api::templates::Template;
use army_api::vms::{CreateVms, ForkVm, Vm, VmState};
use army_node_api::NodeApi;
use army_node_api::requests::{
    CreateVmsRequest, CreateVmsResponse, CreatedVm, ForkVmRequest, VmSpec,
};
use army_node_api::time::now_ms;

use crate::changes::within;
use crate::operations::{Output, Requester, StartedOperation, detached, record_of_failures};
use crate::scheduler::UNKNOWN_COST;
use crate::store::creation::{ForkResult, LIVE_PREFIX, NewVms};
use crate::store::operations::End;
use crate::store::reservations::Reservation;
use crate::store::tenants::Nominal;
use crate::{Controller, Result, deadlines, random};

pub(crate) use check::check;
use placement::Placement;
pub use results::{CreatedVms, CreationFailure};
use results::{answer, created_vms, fork_result, micros, split};

/// A request for VMs, whatever they are made of.
struct CreateRequest {
    origin: Origin,
    tenant: String,
    /// What the VMs' names begin with where the request does not name them.
    stem: String,
    details: CreateVms,
    /// What each VM counts for in the quotas of its tenant.
    nominal: Nominal,
}

/// What VMs are made of.
enum Origin {
    /// The template that hosts store under this name.
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

impl Controller {
    /// Begins to create VMs from a template. Waits in a queue where hosts have room only by what
    /// was measured, and not by what is estimated.
    pub async fn create(
        self: &Arc<Self>,
        requester: &Requester,
        details: CreateVms,
    ) -> Result<StartedOperation> {
        let start = Instant::now();
        check(&details)?;
        let (controller, requester) = (Arc::clone(self), requester.clone());
        detached(async move { controller.begin_creation(&requester, details, start).await }).await
    }

    /// Creates VMs from a template, and waits until they run.
    pub async fn create_and_wait(
        self: &Arc<Self>,
        requester: &Requester,
        details: CreateVms,
    ) -> Result<CreatedVms> {
        let started = self.create(requester, details).await?;
        created_vms(self.outcome(started, None).await?)
    }

    async fn begin_creation(
        self: Arc<Self>,
        requester: &Requester,
        details: CreateVms,
        start: Instant,
    ) -> Result<StartedOperation> {
        let kind = OperationKind::CreateVms;
        let record = without_environment(&details);
        let request = self.new_request(requester, kind, &details.template, &details, &record)?;
        if let Some(known) = self.repeated(&request).await? {
            return Ok(known);
        }
        let mut creation = self.place_creation(requester, details).await?;
        let vms = creation.vms(Some(request.id()))?;
        let reservation = Reservation {
            vms: Some(&vms),
            ..Reservation::default()
        };
        if let Some(known) = self.begin(&request, reservation).await? {
            return Ok(known);
        }
        let id = request.id().to_owned();
        Ok(self.carry_out(id.clone(), async move {
            creation.carry_out(Some(&id), start).await.map(Output::Vms)
        }))
    }

    /// Chooses hosts for VMs of a template.
    pub(crate) async fn place_creation(
        self: &Arc<Self>,
        requester: &Requester,
        details: CreateVms,
    ) -> Result<Creation> {
        let caller = requester.template_caller();
        let template = self.store.find_template_or_tag(&details.template, caller);
        let template = self
            .with_disk_bytes(template.await?, &requester.tenant)
            .await?;
        let ceiling = self.store.tenant_network(&requester.tenant).await?;
        let request = CreateRequest {
            origin: Origin::Template(template.stored_as().to_owned()),
            tenant: requester.tenant.clone(),
            stem: template.name.clone(),
            details: CreateVms {
                network: within(details.network, ceiling.as_ref())?,
                template: template.full_name(),
                ..details
            },
            nominal: Nominal {
                memory_bytes: template.memory_bytes,
                vcpus: template.vcpus,
                disk_bytes: template.disk_bytes.unwrap_or(0),
            },
        };
        let admitted = self.admission.admit()?;
        let labels = request.details.host_labels.clone();
        let mut placement = Placement::new(Arc::clone(self), labels, template, admitted);
        let hosts = placement.place(request.details.count).await?;
        Creation::new(request, placement, hosts)
    }

    /// Begins to create forks of a running VM, which continues to run, on its own host.
    pub async fn fork_vm(
        self: &Arc<Self>,
        requester: &Requester,
        parent: &Vm,
        fork: ForkVm,
    ) -> Result<StartedOperation> {
        let start = Instant::now();
        self.node_of(parent)?;
        let ceiling = self.store.tenant_network(&parent.tenant).await?;
        let details = CreateVms {
            template: format!("{LIVE_PREFIX}{}", parent.id),
            count: fork.count,
            name: fork.name.clone(),
            labels: parent.labels.clone(),
            environment: self.store.environment(&parent.id).await?,
            network: within(parent.network.clone(), ceiling.as_ref())?,
            ..CreateVms::default()
        };
        check(&details)?;
        let (controller, requester) = (Arc::clone(self), requester.clone());
        let parent = parent.clone();
        detached(async move {
            controller
                .begin_fork(&requester, parent, fork, details, start)
                .await
        })
        .await
    }

    async fn begin_fork(
        self: Arc<Self>,
        requester: &Requester,
        parent: Vm,
        fork: ForkVm,
        details: CreateVms,
        start: Instant,
    ) -> Result<StartedOperation> {
        let kind = OperationKind::ForkVm;
        let content = (&parent.id, &fork);
        let request = self.new_request(requester, kind, &parent.id, &content, &fork)?;
        if let Some(known) = self.repeated(&request).await? {
            return Ok(known);
        }
        let count = details.count;
        let plan = CreateRequest {
            origin: Origin::RunningVm(parent.id.clone()),
            tenant: parent.tenant.clone(),
            stem: parent.name.clone(),
            details,
            nominal: self.store.nominal(&parent.id).await?,
        };
        let admitted = self.admission.admit()?;
        let mut placement = Placement::beside(Arc::clone(&self), &parent, admitted);
        let hosts = placement.place(count).await?;
        let mut creation = Creation::new(plan, placement, hosts)?;
        let vms = creation.vms(Some(request.id()))?;
        let reservation = Reservation {
            vms: Some(&vms),
            ..Reservation::default()
        };
        if let Some(known) = self.begin(&request, reservation).await? {
            return Ok(known);
        }
        let id = request.id().to_owned();
        Ok(self.carry_out(id.clone(), async move {
            creation.carry_out(Some(&id), start).await.map(Output::Vms)
        }))
    }

    /// What a clone of a template, as hosts store it, costs by what is recorded of some, in bytes. A
    /// controller needs it as long as none of its own hosts has reported one.
    async fn recorded_cost(&self, template: &str) -> Result<Option<u64>> {
        let measured = self.store.measured_memory(template).await?;
        let count = measured.len() as u64;
        Ok((count > 0).then(|| measured.iter().sum::<u64>() / count))
    }

    /// What a clone of a template is expected to cost, in bytes: what clones that run cost, or what
    /// others have cost before, or a guess.
    async fn cost(&self, template: &str, nominal_bytes: u64) -> Result<u64> {
        if let Some(measured) = self.admission.measured_cost(template) {
            return Ok(measured);
        }
        let guess = match nominal_bytes {
            0 => UNKNOWN_COST,
            nominal => UNKNOWN_COST.min(nominal),
        };
        Ok(self.recorded_cost(template).await?.unwrap_or(guess))
    }
}

/// VMs that were placed and are being created.
pub(crate) struct Creation {
    request: CreateRequest,
    placement: Placement,
    /// The VMs, all in state [`VmState::Creating`].
    vms: Vec<Vm>,
}

impl Creation {
    /// VMs that are about to be created, one on each of `hosts`.
    fn new(request: CreateRequest, placement: Placement, hosts: Vec<String>) -> Result<Self> {
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
                idle: details.idle,
                fork: None,
                addresses: Vec::new(),
                notices: Vec::new(),
                memory: None,
            });
        }
        Ok(Self {
            request,
            placement,
            vms,
        })
    }

    /// The host of each VM.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = &str> {
        self.vms.iter().map(|vm| vm.host.as_str())
    }

    /// The VMs as they are recorded. From now on they are in creation, so that no report finds VMs in
    /// the database that nobody creates.
    pub(crate) fn vms<'a>(&'a mut self, operation: Option<&'a str>) -> Result<NewVms<'a>> {
        let ids = self.vms.iter().map(|vm| vm.id.clone());
        self.placement.admitted.add_vms(ids);
        let template = match &self.request.origin {
            Origin::Template(store_name) => Some(store_name.as_str()),
            Origin::RunningVm(_) => None,
        };
        Ok(NewVms {
            vms: &self.vms,
            template,
            environment: &self.request.details.environment,
            host_labels: &self.request.details.host_labels,
            operation,
            nominal: self.request.nominal,
        })
    }

    /// Has all hosts create their VMs at the same time, and records the results, and the end of
    /// `operation` with them. VMs that their host cannot run are created by another one.
    pub(crate) async fn carry_out(
        self,
        operation: Option<&str>,
        start: Instant,
    ) -> Result<CreatedVms> {
        let Self {
            request,
            mut placement,
            vms,
        } = self;
        let controller = Arc::clone(&placement.controller);
        let ids: Vec<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        let placement_us = micros(start);
        let mut finished = HashMap::new();
        let mut remaining = vms;
        loop {
            let template = placement.template();
            let results = controller.create_once(&request, template, remaining).await;
            let (refused, mut rest) = split(results, placement.may_move());
            remaining = Vec::new();
            if !refused.is_empty() {
                let (moved, failed) = placement.place_again(refused).await?;
                remaining = moved;
                rest.extend(failed);
            }
            let rest = rest.into_iter().map(|(vm, result)| {
                let forked = result.map(|created| fork_result(created, placement_us, start));
                (vm, forked)
            });
            let rest: Vec<(Vm, ForkResult)> = rest.collect();
            let recorded = rest.iter().map(|(vm, forked)| (vm.id.as_str(), forked));
            let recorded: Vec<(&str, &ForkResult)> = recorded.collect();
            if !remaining.is_empty() {
                controller
                    .store
                    .record_fork_results(&recorded, None)
                    .await?;
                finished.extend(rest.into_iter().map(|it| (it.0.id.clone(), it)));
                continue;
            }
            let all = rest.iter().map(|it| (it.0.id.clone(), it.clone()));
            finished.extend(all);
            let created = answer(&ids, finished);
            let end = match &created {
                Ok(created) => End::Succeeded(record_of_failures(&created.failures)?),
                Err(error) => End::Failed(error.clone()),
            };
            let end = operation.map(|operation| (operation, &end));
            controller.store.record_fork_results(&recorded, end).await?;
            return created;
        }
    }
}

impl Controller {
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
                format!("{stem}-{}", random::hex::<5>()?)
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

/// What is kept of a request: the environment is kept with the VMs only.
pub(crate) fn without_environment(details: &CreateVms) -> CreateVms {
    CreateVms {
        environment: BTreeMap::new(),
        ..details.clone()
    }
}
