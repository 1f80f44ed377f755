//! The hosts of the VMs of one request.

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::templates::Template;
use army_api::vms::Vm;

use super::{LIVE_PREFIX, Results};
use crate::admission::{AdmittedRequest, Queue, Refusal, WAIT};
use crate::error::RETRY_S;
use crate::scheduler::{HostView, Need};
use crate::{Controller, Error, ErrorKind, Result};

/// Chooses the hosts of one request, and remembers those that turned out to be unable.
pub(super) struct Placement {
    pub(super) controller: Arc<Controller>,
    /// The labels that hosts must have.
    labels: BTreeMap<String, String>,
    origin: Origin,
    pub(super) admitted: AdmittedRequest,
    /// The errors of hosts that cannot run the template.
    unable: BTreeMap<String, Error>,
}

/// What VMs are made of, for their placement.
enum Origin {
    /// A template, which is copied to a host that has room.
    Template(Template),
    /// A running VM, whose host is the only one for its forks. What the forks are made of is described
    /// like a template of that host.
    RunningVm(Template),
}

impl Placement {
    /// The placement of clones of a template.
    pub(super) fn new(
        controller: Arc<Controller>,
        labels: BTreeMap<String, String>,
        template: Template,
        admitted: AdmittedRequest,
    ) -> Self {
        Self {
            controller,
            labels,
            origin: Origin::Template(template),
            admitted,
            unable: BTreeMap::new(),
        }
    }

    /// The placement of live forks on the host of their parent.
    pub(super) fn beside(
        controller: Arc<Controller>,
        parent: &Vm,
        admitted: AdmittedRequest,
    ) -> Self {
        let origin = Template {
            name: format!("{LIVE_PREFIX}{}", parent.id),
            host: parent.host.clone(),
            hosts: vec![parent.host.clone()],
            memory_bytes: parent.memory.unwrap_or_default().guest_bytes,
            ..Template::default()
        };
        Self {
            controller,
            labels: BTreeMap::new(),
            origin: Origin::RunningVm(origin),
            admitted,
            unable: BTreeMap::new(),
        }
    }

    /// The template that hosts must have before they create the VMs.
    pub(super) fn template(&self) -> Option<&Template> {
        match &self.origin {
            Origin::Template(template) => Some(template),
            Origin::RunningVm(_) => None,
        }
    }

    /// Whether another host can create the VMs.
    pub(super) fn may_move(&self) -> bool {
        self.template().is_some()
    }

    /// Chooses a host for each of `count` VMs, except those that turned out to be unable. Waits where
    /// there is room only by what was measured.
    pub(super) async fn place(&mut self, count: u32) -> Result<Vec<String>> {
        let Self {
            controller,
            labels,
            origin,
            admitted,
            unable,
        } = self;
        let (template, anywhere) = match origin {
            Origin::Template(template) => (&*template, true),
            Origin::RunningVm(template) => (&*template, false),
        };
        let queue = Queue {
            template: template.stored_as().to_owned(),
            labels: labels.clone(),
        };
        // The attempts are made one after the other.
        let admitted = tokio::sync::Mutex::new(admitted);
        let attempt = || async {
            let mut views = controller.host_views(template, labels).await?;
            if !anywhere {
                views.retain(|view| view.name == template.host);
                check_open(&views, &template.host)?;
            }
            let views = views.into_iter().map(|view| with_experience(view, unable));
            let need = Need {
                cost_bytes: controller
                    .cost(template.stored_as(), template.memory_bytes)
                    .await?,
                nominal_bytes: template.memory_bytes,
                template_bytes: template.data_bytes,
                anywhere,
            };
            let mut admitted = admitted.lock().await;
            let placed: std::result::Result<_, Refusal> =
                admitted.place(views.collect(), template.stored_as(), need, count);
            Ok(placed)
        };
        controller
            .admission
            .place_in_turn(queue, WAIT, attempt)
            .await
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

/// Checks that the only host for live forks accepts VMs.
fn check_open(views: &[HostView], host: &str) -> Result<()> {
    if views.iter().any(|view| view.open) {
        return Ok(());
    }
    let message = format!(
        "the host {host} takes no VMs now, and a live fork is on its parent's host: it is drained, \
         or does not answer"
    );
    Err(Error::new(ErrorKind::Busy, message)
        .advise("make a template of the VM, and create VMs from it")
        .retry_after(RETRY_S))
}

fn with_experience(mut view: HostView, unable: &BTreeMap<String, Error>) -> HostView {
    if let Some(error) = unable.get(&view.name)
        && view.lacks.is_empty()
    {
        view.lacks = vec![format!("what it takes: {}", error.message)];
    }
    view
}
