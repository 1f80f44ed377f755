//! Templates: who can use them, which hosts have them, and how many standbys are kept of them.
//!
//! Making them is in `make`, and removing them in `removal`.

mod make;
mod removal;

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::templates::{ChangeTemplate, Template, Visibility};
use army_node_api::chunks::ChunkReceiver;
use army_node_api::requests::{ExportTemplateRequest, SetStandbysRequest};
use clone_api::validate::is_valid_name;

use crate::error::RETRY_S;
use crate::store::hosts::HostRow;
use crate::store::template_names::{TemplateCaller, TemplateName};
use crate::{Controller, Error, ErrorKind, Node, Requester, Result, deadlines};

impl Controller {
    /// Opens the content of a template as a stream, from a host that has it. An error after the
    /// beginning is the last item of the stream.
    pub async fn export_template(
        &self,
        requester: &Requester,
        name: &str,
    ) -> Result<ChunkReceiver> {
        let caller = requester.template_caller();
        let template = self.store.find_template_or_tag(name, caller).await?;
        let node = template.hosts.iter().find_map(|host| self.find_node(host));
        let node = node.ok_or_else(|| no_host_answers(&template))?;
        let request = ExportTemplateRequest {
            template: template.stored_as().to_owned(),
        };
        Ok(node.export_template(request, deadlines::export()).await?)
    }

    async fn named_or_only_node(&self, host: Option<&str>) -> Result<Node> {
        if let Some(host) = host {
            return self.named_node(host).await;
        }
        match self.nodes().as_slice() {
            [only] => Ok(Arc::clone(only)),
            nodes => {
                let message = format!(
                    "`host` is required, because there are {} hosts",
                    nodes.len()
                );
                Err(Error::new(ErrorKind::InvalidRequest, message))
            }
        }
    }

    /// The node of a host that a client has named: an unknown host is not found, rather than
    /// unavailable.
    async fn named_node(&self, host: &str) -> Result<Node> {
        self.host(host).await?;
        self.node(host)
    }

    /// Changes the number of standbys of a template, which each host that has it keeps, and who can
    /// use it.
    ///
    /// # Errors
    /// [`ErrorKind::Forbidden`] where the caller does not own the template, or would make it public.
    pub async fn change_template(
        &self,
        requester: &Requester,
        name: &str,
        request: &ChangeTemplate,
    ) -> Result<Template> {
        let caller = requester.template_caller();
        let template = self.store.find_template(name, caller).await?;
        caller.check_may_change(&template)?;
        let stored_as = template.stored_as();
        if let Some((visibility, shared_with)) = new_visibility(&template, request, caller)? {
            let changed = self
                .store
                .set_visibility(stored_as, visibility, &shared_with);
            changed.await?;
        }
        match request.standbys {
            Some(standbys) => self.set_standbys(stored_as, standbys).await,
            None => self.stored_template(stored_as).await,
        }
    }

    /// Changes the number of standbys of a template, as hosts store it.
    pub(crate) async fn set_standbys(&self, store_name: &str, standbys: u32) -> Result<Template> {
        self.store.set_standbys(store_name, standbys).await?;
        let template = self.stored_template(store_name).await?;
        self.apply_standbys(&template).await?;
        Ok(template)
    }

    /// Has every host that has a template keep its standbys.
    pub(crate) async fn apply_standbys(&self, template: &Template) -> Result<()> {
        for host in &template.hosts {
            self.apply_standbys_on(&self.node(host)?, template).await?;
        }
        Ok(())
    }

    async fn apply_standbys_on(&self, node: &Node, template: &Template) -> Result<()> {
        let request = SetStandbysRequest {
            template: template.stored_as().to_owned(),
            standbys: template.standbys,
        };
        Ok(node.set_standbys(request, deadlines::operation()).await?)
    }

    /// Creates a tag that points to a template, or moves it there. The tag belongs to the tenant of
    /// the template.
    ///
    /// # Errors
    /// [`ErrorKind::Forbidden`] where the caller does not own the template.
    pub async fn tag(&self, requester: &Requester, tag: &str, template: &str) -> Result<Template> {
        let caller = requester.template_caller();
        let template = self.store.find_template(template, caller).await?;
        caller.check_may_change(&template)?;
        let TemplateName { owner, .. } = TemplateName::of(&template);
        let tag = TemplateName::new_tag(tag, &owner)?;
        self.store.tag(&tag, template.stored_as()).await?;
        self.stored_template(template.stored_as()).await
    }

    /// Removes a tag.
    ///
    /// # Errors
    /// [`ErrorKind::Forbidden`] where the caller does not own its template.
    pub async fn untag(&self, requester: &Requester, tag: &str) -> Result<()> {
        let caller = requester.template_caller();
        let (tag, template) = self.store.find_tag(tag, caller).await?;
        caller.check_may_change(&template)?;
        self.store.untag(&tag, template.stored_as()).await
    }

    /// The template that a caller means by its name or by a tag, with its present numbers of VMs and
    /// standbys.
    pub async fn template(&self, requester: &Requester, name: &str) -> Result<Template> {
        let caller = requester.template_caller();
        let template = self.store.find_template_or_tag(name, caller).await?;
        Ok(shown_to(caller, self.counted(template).await?))
    }

    /// The templates that a caller can see, with their present numbers of VMs and standbys.
    pub async fn templates(&self, requester: &Requester) -> Result<Vec<Template>> {
        let caller = requester.template_caller();
        let templates = self.counted_templates(caller).await?.into_iter();
        Ok(templates.map(|it| shown_to(caller, it)).collect())
    }

    /// All templates, with their present numbers of VMs and standbys.
    pub async fn all_templates(&self) -> Result<Vec<Template>> {
        self.counted_templates(TemplateCaller::ALL).await
    }

    async fn counted_templates(&self, caller: TemplateCaller<'_>) -> Result<Vec<Template>> {
        let used = self.store.vms_by_template().await?;
        let templates = self.store.templates(caller).await?;
        let rows = self.host_rows().await?;
        let templates = templates.into_iter();
        let templates = templates.map(|it| self.with_counts(it, &used, &rows));
        Ok(templates.collect())
    }

    /// The template that hosts store under this name, with its present numbers of VMs and standbys.
    pub(crate) async fn stored_template(&self, store_name: &str) -> Result<Template> {
        self.counted(self.store.template(store_name).await?).await
    }

    /// The template with the full name that an operation has recorded.
    pub(crate) async fn recorded_template(&self, full_name: &str) -> Result<Template> {
        let place = TemplateName::recorded(full_name).place();
        let template = self
            .store
            .find_template(&place, TemplateCaller::ALL)
            .await?;
        self.counted(template).await
    }

    /// A template as a caller may see it; `None` where they may not.
    pub(crate) async fn visible_template(
        &self,
        template: Template,
        caller: TemplateCaller<'_>,
    ) -> Result<Option<Template>> {
        let place = TemplateName::of(&template).place();
        match self.store.find_template(&place, caller).await {
            Ok(_) => Ok(Some(shown_to(caller, template))),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A template with the sizes of its writable disks, where a quota of the tenant needs to know of
    /// them. Where a former release has not recorded them, a host that has the template is asked once.
    pub(crate) async fn with_disk_bytes(
        &self,
        mut template: Template,
        tenant: &str,
    ) -> Result<Template> {
        if template.disk_bytes.is_some() || !self.store.has_disk_quota(tenant).await? {
            return Ok(template);
        }
        let node = template.hosts.iter().find_map(|host| self.find_node(host));
        let Some(node) = node else {
            return Ok(template);
        };
        let facts = self.inspect(&node, template.stored_as()).await;
        // A node of a former release does not say them. One that does not answer is asked again.
        if let Ok(facts) = facts
            && facts.disk_bytes.is_some()
        {
            template.disk_bytes = facts.disk_bytes;
            self.store.record_disk_bytes(&template).await?;
        }
        Ok(template)
    }

    async fn counted(&self, template: Template) -> Result<Template> {
        let used = self.store.vms_by_template().await?;
        let rows = self.host_rows().await?;
        Ok(self.with_counts(template, &used, &rows))
    }

    fn with_counts(
        &self,
        mut template: Template,
        used: &BTreeMap<String, u32>,
        rows: &[HostRow],
    ) -> Template {
        template.vms = used.get(template.stored_as()).copied().unwrap_or(0);
        template.ready = self.ready_standbys(rows, template.stored_as());
        template
    }
}

/// A template without what only those who may change it see.
fn shown_to(caller: TemplateCaller<'_>, template: Template) -> Template {
    if caller.check_may_change(&template).is_ok() {
        return template;
    }
    Template {
        shared_with: Vec::new(),
        ..template
    }
}

/// Who can use a template after a change of it; `None` where the request says nothing about that.
fn new_visibility(
    template: &Template,
    request: &ChangeTemplate,
    caller: TemplateCaller<'_>,
) -> Result<Option<(Visibility, Vec<String>)>> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidRequest, message));
    let (visibility, tenants) = match (request.visibility, &request.shared_with) {
        (None, None) => return Ok(None),
        (Some(Visibility::Shared), None) => (Visibility::Shared, template.shared_with.clone()),
        (Some(visibility), None) => (visibility, Vec::new()),
        (None | Some(Visibility::Shared), Some(tenants)) => (Visibility::Shared, tenants.clone()),
        (Some(_), Some(_)) => {
            return invalid("`shared_with` requires the visibility `shared`".to_owned());
        }
    };
    if let Some(wrong) = tenants.iter().find(|it| !is_valid_name(it)) {
        return invalid(format!("invalid tenant name `{}`", wrong.escape_debug()));
    }
    let becomes_public = visibility == Visibility::Public && template.visibility != visibility;
    if becomes_public && !caller.is_administrator {
        let message = "only administrators make a template public";
        return Err(Error::new(ErrorKind::Forbidden, message)
            .advise("share it with named tenants: army template share"));
    }
    Ok(Some((visibility, tenants)))
}

fn no_host_answers(template: &Template) -> Error {
    let name = template.full_name();
    let message = format!("no host that has the template `{name}` answers");
    Error::new(ErrorKind::HostUnavailable, message).retry_after(RETRY_S)
}
