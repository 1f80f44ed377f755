//! Operations that make templates, or copies of them.

use std::sync::Arc;

use army_api::operations::OperationKind;
use army_api::templates::{RegisterTemplate, Template};
use army_api::vms::{SnapshotVm, Vm};
use army_node_api::chunks::ChunkReceiver;
use army_node_api::requests::{
    AdmitFetchRequest, FetchTemplateRequest, ImportTemplateRequest, InspectTemplateRequest,
    RemoveTemplateRequest, SnapshotVmRequest, TemplateFacts,
};
use army_node_api::validate::check_template_name;

use super::no_host_answers;
use crate::operations::{
    HostRecord, Outcome, Output, RegisterRecord, Requester, StartedOperation, detached,
};
use crate::store::reservations::Reservation;
use crate::store::template_names::{ADMINISTRATORS, TemplateKey, TemplateName};
use crate::{Controller, Error, ErrorKind, Node, Result, deadlines, random};

/// How long a node may begin to fetch a template from another one, in seconds.
const TICKET_VALID_S: u64 = 300;

impl Controller {
    /// Begins to register a template that is in a host's store.
    pub async fn register_template(
        self: &Arc<Self>,
        requester: &Requester,
        request: RegisterTemplate,
    ) -> Result<StartedOperation> {
        let node = self.named_or_only_node(request.host.as_deref()).await?;
        let (host, standbys) = (node.name().to_owned(), request.standbys);
        check_template_name(&request.name)?;
        // It has the same name on the host, so it belongs to the administrators.
        let template = TemplateKey::recorded(&request.name, None);
        // A template that the host does not have is no operation.
        self.inspect(&node, &template.store_name).await?;
        let kind = OperationKind::RegisterTemplate;
        let record = RegisterRecord {
            host: host.clone(),
            standbys,
        };
        let new = self.new_request(requester, kind, &request.name, &request, &record)?;
        let controller = Arc::clone(self);
        detached(async move {
            let reservation = Reservation {
                new_template: Some(&template.clone()),
                ..Reservation::default()
            };
            let id = new.id().to_owned();
            let work = |controller: Arc<Self>| async move {
                controller
                    .register_from(&id, &template, &host, standbys)
                    .await
            };
            controller.begin_and_carry_out(new, reservation, work).await
        })
        .await
    }

    /// Registers a template that a host has in its store.
    pub(crate) async fn register_from(
        &self,
        operation: &str,
        template: &TemplateKey,
        host: &str,
        standbys: u32,
    ) -> Outcome {
        let facts = self
            .inspect(&self.node(host)?, &template.store_name)
            .await?;
        self.register(operation, template, host, standbys, facts)
            .await
            .map(output)
    }

    /// Begins to receive a template as a stream for a host.
    pub async fn import_template(
        self: &Arc<Self>,
        requester: &Requester,
        name: &str,
        host: Option<&str>,
        content: ChunkReceiver,
    ) -> Result<StartedOperation> {
        let node = self.named_or_only_node(host).await?;
        let caller = requester.template_caller();
        let name = TemplateName::new(name, caller, caller.own())?;
        let template = TemplateKey::new(name)?;
        let record = HostRecord {
            host: node.name().to_owned(),
            store_name: template.other_store_name(),
        };
        let (kind, subject) = (OperationKind::ImportTemplate, template.name.to_string());
        let content_of = (&subject, &record.host);
        let new = self.new_request(requester, kind, &subject, &content_of, &record)?;
        if let Some(known) = self.repeated(&new).await? {
            return Ok(known);
        }
        self.check_store_lacks(&node, &template.store_name).await?;
        let controller = Arc::clone(self);
        detached(async move {
            let reservation = Reservation {
                new_template: Some(&template.clone()),
                ..Reservation::default()
            };
            let id = new.id().to_owned();
            let work = |controller: Arc<Self>| async move {
                let request = ImportTemplateRequest {
                    template: template.store_name.clone(),
                };
                let deadline = deadlines::transfer();
                let facts = node.import_template(request, content, deadline).await?;
                let host = node.name();
                let registered = controller.register(&id, &template, host, 0, facts).await;
                registered.map(output)
            };
            controller.begin_and_carry_out(new, reservation, work).await
        })
        .await
    }

    /// Begins to create a template from a VM, which continues to run.
    pub async fn snapshot(
        self: &Arc<Self>,
        requester: &Requester,
        vm: &Vm,
        request: SnapshotVm,
    ) -> Result<StartedOperation> {
        let caller = requester.template_caller();
        // What is in the memory of another tenant's VM stays with that tenant.
        let owner = match vm.tenant == requester.tenant {
            true => caller.own(),
            false => &vm.tenant,
        };
        let template = TemplateKey::new(TemplateName::new(&request.template, caller, owner)?)?;
        let (kind, subject) = (OperationKind::SnapshotVm, template.name.to_string());
        let record = HostRecord {
            host: vm.host.clone(),
            store_name: template.other_store_name(),
        };
        let content = (&vm.id, &request);
        let new = self.new_request(requester, kind, &subject, &content, &record)?;
        if let Some(known) = self.repeated(&new).await? {
            return Ok(known);
        }
        let node = self.node_of(vm)?;
        self.check_store_lacks(&node, &template.store_name).await?;
        let (controller, vm) = (Arc::clone(self), vm.clone());
        detached(async move {
            let reservation = Reservation {
                new_template: Some(&template.clone()),
                ..Reservation::default()
            };
            let id = new.id().to_owned();
            let work = |controller: Arc<Self>| async move {
                let taken = controller.take_snapshot(&id, &vm, &template, request.diff);
                taken.await.map(output)
            };
            controller.begin_and_carry_out(new, reservation, work).await
        })
        .await
    }

    /// Creates a template from a VM for an operation that has reserved its name, and registers it.
    pub(crate) async fn take_snapshot(
        &self,
        operation: &str,
        vm: &Vm,
        template: &TemplateKey,
        diff: bool,
    ) -> Result<Template> {
        let node = self.node_of(vm)?;
        let request = SnapshotVmRequest {
            vm: vm.id.clone(),
            template: template.store_name.clone(),
            diff,
        };
        let facts = node.snapshot_vm(request, deadlines::transfer()).await?;
        self.register(operation, template, &vm.host, 0, facts).await
    }

    /// Begins to copy a template to another host.
    pub async fn copy_template(
        self: &Arc<Self>,
        requester: &Requester,
        name: &str,
        host: &str,
    ) -> Result<StartedOperation> {
        let host = self.named_node(host).await?.name().to_owned();
        let caller = requester.template_caller();
        let template = self.store.find_template(name, caller).await?;
        let TemplateKey { name, store_name } = TemplateKey::of(&template);
        let record = HostRecord {
            host,
            store_name: Some(store_name.clone()),
        };
        let (kind, subject) = (OperationKind::CopyTemplate, name.to_string());
        let content = (&subject, &record.host);
        let new = self.new_request(requester, kind, &subject, &content, &record)?;
        let controller = Arc::clone(self);
        detached(async move {
            let reservation = Reservation {
                template: Some(&store_name.clone()),
                ..Reservation::default()
            };
            let work = |controller: Arc<Self>| async move {
                controller.copy_to(&store_name, &record.host).await
            };
            controller.begin_and_carry_out(new, reservation, work).await
        })
        .await
    }

    /// Copies a template to a host, unless it is there.
    pub(crate) async fn copy_to(&self, store_name: &str, host: &str) -> Outcome {
        let template = self.store.template(store_name).await?;
        self.ensure_template(&self.node(host)?, &template).await?;
        self.stored_template(store_name).await.map(output)
    }

    /// Copies a template to the host of `node`, unless it is there.
    pub(crate) async fn ensure_template(&self, node: &Node, template: &Template) -> Result<()> {
        if template.hosts.iter().any(|host| host == node.name()) {
            return Ok(());
        }
        let mut fetched = Err(no_host_answers(template));
        for host in &template.hosts {
            let Some(origin) = self.find_node(host) else {
                continue;
            };
            let Some(address) = origin.address() else {
                continue;
            };
            let ticket = random::hex::<32>()?;
            let admit = AdmitFetchRequest {
                ticket: ticket.clone(),
                template: template.stored_as().to_owned(),
                id: template.id.clone(),
                host: node.name().to_owned(),
                valid_s: TICKET_VALID_S,
            };
            if let Err(error) = origin.admit_fetch(admit, deadlines::operation()).await {
                // A node of a former release knows no tickets, and needs none.
                tracing::warn!(%host, %error, "cannot announce a copy of a template");
            }
            let request = FetchTemplateRequest {
                host: host.clone(),
                address,
                template: template.stored_as().to_owned(),
                id: template.id.clone(),
                ticket: Some(ticket),
            };
            let result = node.fetch_template(request, deadlines::transfer()).await;
            fetched = result.map_err(Error::from);
            match &fetched {
                Err(error) if error.kind == ErrorKind::HostUnavailable => {}
                _ => break,
            }
        }
        fetched?;
        self.record_copy(node, template).await?;
        self.apply_standbys_on(node, template).await
    }

    /// Records that a host has a copy. Where the template is being removed, so is the copy.
    async fn record_copy(&self, node: &Node, template: &Template) -> Result<()> {
        let stored_as = template.stored_as();
        let recorded = self.store.insert_copy(stored_as, node.name()).await;
        let Err(error) = recorded else {
            return Ok(());
        };
        if matches!(error.kind, ErrorKind::Conflict | ErrorKind::NotFound) {
            let request = RemoveTemplateRequest {
                template: stored_as.to_owned(),
            };
            let removed = node.remove_template(request, deadlines::operation()).await;
            if let Err(error) = removed {
                let (template, host) = (stored_as, node.name());
                tracing::warn!(template, host, %error, "a copy of a removed template is left");
            }
        }
        Err(error)
    }

    /// Describes a template in a host's store, by its name there.
    pub(super) async fn inspect(&self, node: &Node, name: &str) -> Result<TemplateFacts> {
        let request = InspectTemplateRequest {
            template: name.to_owned(),
        };
        let inspected = node.inspect_template(request, deadlines::operation()).await;
        Ok(inspected?)
    }

    /// Checks that a host's store has no template of a name that is about to be made there: what is
    /// there afterwards has been made by the operation.
    pub(crate) async fn check_store_lacks(&self, node: &Node, name: &str) -> Result<()> {
        match self.inspect(node, name).await {
            Ok(_) => {
                let host = node.name();
                let message = format!("the store of {host} already has a template named `{name}`");
                Err(Error::new(ErrorKind::Conflict, message)
                    .advise("use another name, or register it: army template register"))
            }
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Records a template that is in the store of `host`, and that `operation` has made.
    pub(crate) async fn register(
        &self,
        operation: &str,
        template: &TemplateKey,
        host: &str,
        standbys: u32,
        facts: TemplateFacts,
    ) -> Result<Template> {
        let owner = &template.name.owner;
        let template = Template {
            name: template.name.name.clone(),
            tenant: (owner != ADMINISTRATORS).then(|| owner.clone()),
            visibility: template.first_visibility(),
            store_name: template.other_store_name(),
            id: facts.id,
            parent: facts.parent,
            host: host.to_owned(),
            hosts: vec![host.to_owned()],
            memory_bytes: facts.memory_bytes,
            data_bytes: facts.data_bytes,
            vcpus: facts.vcpus,
            disk_bytes: facts.disk_bytes,
            taken_ms: facts.taken_ms,
            cpu: facts.cpu,
            standbys,
            ..Template::default()
        };
        self.store
            .insert_template(&template, Some(operation))
            .await?;
        self.apply_standbys(&template).await?;
        Ok(template)
    }
}

fn output(template: Template) -> Output {
    Output::Template(Box::new(template))
}
