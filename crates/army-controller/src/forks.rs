//! How new VMs are made by their hosts, and placed again where a host turns out to be unable to.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use army_api::templates::Template;
use army_api::vms::{CreatedVms, Failure, ForkTimes, IdlePolicy, Vm, VmState};
use army_api::{Problem, ProblemKind};

use super::making::Request;
use super::{Controller, Order};
use crate::scheduler::{HostView, Need};
use crate::store::Result;
use army_node_api::Made;
use army_node_api::VmSpec;
use army_node_api::blocking;
use army_node_api::host;

/// The hosts of the VMs of one request.
pub(super) struct Placement<'a> {
    controller: &'a Controller,
    labels: &'a BTreeMap<String, String>,
    template: Template,
    need: Need,
    pub(super) making: Request<'a>,
    /// What hosts said that cannot run the template.
    unable: BTreeMap<String, Problem>,
}

impl<'a> Placement<'a> {
    pub(super) fn new(
        controller: &'a Controller,
        order: &'a Order,
        template: Template,
        need: Need,
        making: Request<'a>,
    ) -> Self {
        Self {
            controller,
            labels: &order.details.host_labels,
            template,
            need,
            making,
            unable: BTreeMap::new(),
        }
    }

    /// Chooses a host for each of `count` VMs, none of those that turned out to be unable.
    pub(super) async fn place(&mut self, count: u32) -> Result<Vec<String>> {
        let views = self.controller.views(&self.template, self.labels).await?;
        let mut views: Vec<HostView> = views.into_iter().map(|it| self.judged(it)).collect();
        let chosen = self.making.place(&mut views, self.need, count)?;
        let hosts = chosen.into_iter().map(|index| views[index].name.clone());
        Ok(hosts.collect())
    }

    fn judged(&self, mut view: HostView) -> HostView {
        if let Some(problem) = self.unable.get(&view.name)
            && view.lacks.is_empty()
        {
            view.lacks = vec![format!("what it takes: {}", problem.detail)];
        }
        view
    }

    /// Places VMs again that their hosts cannot run. Gives back those that are to be made
    /// elsewhere, and the rest with what is wrong.
    async fn place_again(&mut self, refused: Vec<(Vm, Problem)>) -> Result<(Vec<Vm>, Results)> {
        for (vm, problem) in &refused {
            self.unable.insert(vm.host.clone(), problem.clone());
        }
        let hosts = match self.place(refused.len() as u32).await {
            Ok(hosts) => hosts,
            Err(problem) => {
                let failed = refused
                    .into_iter()
                    .map(|(vm, _)| (vm, Err(problem.clone())));
                return Ok((Vec::new(), failed.collect()));
            }
        };
        let (mut moved, mut rest) = (Vec::new(), Vec::new());
        for ((mut vm, problem), host) in refused.into_iter().zip(hosts) {
            let store = &self.controller.store;
            match store.move_vm(&vm.id, &host, &problem.detail).await? {
                true => {
                    vm.host = host;
                    moved.push(vm);
                }
                // It was destroyed meanwhile.
                false => rest.push((vm, Err(problem))),
            }
        }
        Ok((moved, rest))
    }
}

type Results = Vec<(Vm, Result<Made>)>;

/// The times of a fork, and its notices.
type Forked = (ForkTimes, Vec<String>);

/// How hosts are asked to make VMs.
pub(super) trait Make:
    Fn(&dyn host::Host, &[VmSpec]) -> Vec<Result<Made>> + Clone + Send + 'static
{
}

impl<F> Make for F where
    F: Fn(&dyn host::Host, &[VmSpec]) -> Vec<Result<Made>> + Clone + Send + 'static
{
}

impl Controller {
    /// Has each host make its share, side by side, and writes down how it went. With a placement,
    /// VMs that their host cannot run are made by another.
    pub(super) async fn make(
        &self,
        order: &Order,
        mut placement: Option<Placement<'_>>,
        vms: Vec<Vm>,
        start: Instant,
        make: impl Make,
    ) -> Result<CreatedVms> {
        let ids: Vec<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        let placement_us = micros(start);
        let mut made = HashMap::new();
        let mut left = vms;
        while !left.is_empty() {
            let template = placement.as_ref().map(|it| it.template.clone());
            let results = self
                .make_shares(order, template.as_ref(), left, &make)
                .await;
            let (refused, mut rest) = split(results, placement.is_some());
            left = Vec::new();
            if let Some(placement) = &mut placement
                && !refused.is_empty()
            {
                let (moved, failed) = placement.place_again(refused).await?;
                left = moved;
                rest.extend(failed);
            }
            for (vm, result) in rest {
                let forked = result.map(|made| fork_result(made, placement_us, start));
                self.store.made_vm(&vm.id, &forked).await?;
                made.insert(vm.id.clone(), (vm, forked));
            }
        }
        answer(ids, made)
    }

    /// Has each host make its share once. A host without the template gets it first.
    async fn make_shares(
        &self,
        order: &Order,
        template: Option<&Template>,
        vms: Vec<Vm>,
        make: &impl Make,
    ) -> Results {
        let mut shares: BTreeMap<String, Vec<Vm>> = BTreeMap::new();
        for vm in vms {
            shares.entry(vm.host.clone()).or_default().push(vm);
        }
        let shares = shares.into_iter();
        let work = shares.map(|(host, share)| self.make_share(order, template, host, share, make));
        let results = futures_util::future::join_all(work).await;
        results.into_iter().flatten().collect()
    }

    async fn make_share(
        &self,
        order: &Order,
        template: Option<&Template>,
        host: String,
        share: Vec<Vm>,
        make: &impl Make,
    ) -> Results {
        let idle = order.details.idle;
        let ttl_ms = order.details.ttl_s.map(|ttl| ttl.saturating_mul(1000));
        let entries: Vec<VmSpec> = share.iter().map(|vm| spec(vm, idle, ttl_ms)).collect();
        let heard = self.heard().get(&host).map(|it| it.report.capacity.cpus);
        let make = make.clone();
        let results = async {
            let node = self.node(&host)?;
            if let Some(template) = template {
                self.bring(&node, template).await?;
            }
            let _turn = self.making.turn(&host, heard.unwrap_or(1)).await;
            blocking(move || Ok(make(node.as_ref(), &entries))).await
        };
        let results = results
            .await
            .unwrap_or_else(|problem| share.iter().map(|_| Err(problem.clone())).collect());
        share.into_iter().zip(results).collect()
    }
}

/// Parts the VMs that another host may be able to run from the rest.
fn split(results: Results, may_move: bool) -> (Vec<(Vm, Problem)>, Results) {
    let (mut refused, mut rest) = (Vec::new(), Vec::new());
    for (vm, result) in results {
        match result {
            Err(problem) if may_move && problem.kind == ProblemKind::HostUnsupported => {
                refused.push((vm, problem));
            }
            result => rest.push((vm, result)),
        }
    }
    (refused, rest)
}

/// What the client is answered, in the order of the request.
fn answer(ids: Vec<String>, mut made: HashMap<String, (Vm, Result<Forked>)>) -> Result<CreatedVms> {
    let mut created = CreatedVms {
        vms: Vec::new(),
        failures: Vec::new(),
    };
    for id in ids {
        match made.remove(&id) {
            Some((mut vm, Ok((times, notices)))) => {
                vm.state = VmState::Running;
                vm.fork = Some(times);
                vm.notices = notices;
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

/// The times of a fork, and its notices.
fn fork_result(made: Made, placement_us: u64, start: Instant) -> Forked {
    let times = ForkTimes {
        warm: made.warm,
        placement_us,
        running_us: made.running_us,
        identity_us: made.identity_us,
        total_us: micros(start),
    };
    (times, made.notices)
}

fn micros(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}

fn spec(vm: &Vm, idle: Option<IdlePolicy>, ttl_ms: Option<u64>) -> VmSpec {
    VmSpec {
        expires_ms: vm.expires_ms,
        ttl_ms,
        idle,
        network: vm.network.clone(),
        ..VmSpec::new(vm.id.clone(), 1, vm.name.clone())
    }
}
