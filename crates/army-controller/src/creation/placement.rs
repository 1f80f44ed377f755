//! The hosts of the VMs of one request.

use std::collections::BTreeMap;

use army_api::templates::Template;
use army_api::vms::Vm;

use super::{CreateRequest, Results};
use crate::admission::AdmittedRequest;
use crate::scheduler::{HostView, Need};
use crate::{Controller, Error, Result};

/// Chooses the hosts of one request, and remembers those that turned out to be unable.
pub(super) struct Placement<'a> {
    controller: &'a Controller,
    labels: &'a BTreeMap<String, String>,
    pub(super) template: Template,
    need: Need,
    pub(super) admitted: AdmittedRequest<'a>,
    /// The errors of hosts that cannot run the template.
    unable: BTreeMap<String, Error>,
}

impl<'a> Placement<'a> {
    pub(super) fn new(
        controller: &'a Controller,
        request: &'a CreateRequest,
        template: Template,
        need: Need,
        admitted: AdmittedRequest<'a>,
    ) -> Self {
        Self {
            controller,
            labels: &request.details.host_labels,
            template,
            need,
            admitted,
            unable: BTreeMap::new(),
        }
    }

    /// Chooses a host for each of `count` VMs, except those that turned out to be unable.
    pub(super) async fn place(&mut self, count: u32) -> Result<Vec<String>> {
        let views = self
            .controller
            .host_views(&self.template, self.labels)
            .await?;
        let views = views.into_iter().map(|view| self.with_experience(view));
        let mut views: Vec<HostView> = views.collect();
        let chosen = self.admitted.place(&mut views, self.need, count)?;
        let hosts = chosen.into_iter().map(|index| views[index].name.clone());
        Ok(hosts.collect())
    }

    fn with_experience(&self, mut view: HostView) -> HostView {
        if let Some(error) = self.unable.get(&view.name)
            && view.lacks.is_empty()
        {
            view.lacks = vec![format!("what it takes: {}", error.message)];
        }
        view
    }

    /// Chooses other hosts for VMs that their hosts cannot run. Returns the VMs that are to be
    /// created elsewhere, and the results of the others.
    pub(super) async fn place_again(
        &mut self,
        refused: Vec<(Vm, Error)>,
    ) -> Result<(Vec<Vm>, Results)> {
        for (vm, error) in &refused {
            self.unable.insert(vm.host.clone(), error.clone());
        }
        let hosts = match self.place(refused.len() as u32).await {
            Ok(hosts) => hosts,
            Err(error) => {
                let failed = refused.into_iter().map(|(vm, _)| (vm, Err(error.clone())));
                return Ok((Vec::new(), failed.collect()));
            }
        };
        let (mut moved, mut rest) = (Vec::new(), Vec::new());
        for ((mut vm, error), host) in refused.into_iter().zip(hosts) {
            let store = &self.controller.store;
            match store.move_vm(&vm.id, &host, &error.message).await? {
                true => {
                    vm.host = host;
                    moved.push(vm);
                }
                // The VM was destroyed meanwhile.
                false => rest.push((vm, Err(error))),
            }
        }
        Ok((moved, rest))
    }
}
