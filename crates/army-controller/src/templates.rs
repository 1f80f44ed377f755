//! Templates: which hosts have them, and how many standbys are kept of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::templates::{RegisterTemplate, Template};
use army_node_api::chunks::ChunkReceiver;
use army_node_api::requests::{
    ExportTemplateRequest, FetchTemplateRequest, ImportTemplateRequest, InspectTemplateRequest,
    RemoveTemplateRequest, SetStandbysRequest, TemplateFacts,
};

use crate::error::RETRY_S;
use crate::{Controller, Error, ErrorKind, Node, Result, deadlines};

impl Controller {
    /// Registers a template that is in a host's store.
    pub async fn register_template(&self, request: &RegisterTemplate) -> Result<Template> {
        let node = self.named_or_only_node(request.host.as_deref()).await?;
        let inspect = InspectTemplateRequest {
            template: request.name.clone(),
        };
        let facts = node
            .inspect_template(inspect, deadlines::operation())
            .await?;
        self.register(&request.name, node.name(), request.standbys, facts)
            .await
    }

    /// Sends a template as a stream to a host, and registers it.
    pub async fn import_template(
        &self,
        name: &str,
        host: Option<&str>,
        content: ChunkReceiver,
    ) -> Result<Template> {
        self.check_name_is_free(name).await?;
        let node = self.named_or_only_node(host).await?;
        let request = ImportTemplateRequest {
            template: name.to_owned(),
        };
        let facts = node
            .import_template(request, content, deadlines::transfer())
            .await?;
        self.register(name, node.name(), 0, facts).await
    }

    /// Opens the content of a template as a stream, from a host that has it. An error after the
    /// beginning is the last item of the stream.
    pub async fn export_template(&self, name: &str) -> Result<ChunkReceiver> {
        let template = self.store.template(name).await?;
        let node = template.hosts.iter().find_map(|host| self.find_node(host));
        let node = node.ok_or_else(|| no_host_answers(&template))?;
        let request = ExportTemplateRequest {
            template: template.name,
        };
        Ok(node.export_template(request, deadlines::export()).await?)
    }

    /// Checks that neither a template nor a tag has this name.
    pub(crate) async fn check_name_is_free(&self, name: &str) -> Result<()> {
        match self.store.template_or_tag(name).await {
            Ok(_) => {
                let message = format!("a template or a tag named `{name}` already exists");
                Err(Error::new(ErrorKind::Conflict, message))
            }
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
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

    /// Records a template that is in the store of `host`.
    pub(crate) async fn register(
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
            tags: Vec::new(),
            memory_bytes: facts.memory_bytes,
            data_bytes: facts.data_bytes,
            vcpus: facts.vcpus,
            taken_ms: facts.taken_ms,
            cpu: facts.cpu,
            standbys,
            ready: 0,
            vms: 0,
        };
        self.store.insert_template(&template).await?;
        self.apply_standbys(&template).await?;
        Ok(template)
    }

    /// Changes the number of standbys of a template, which each host that has it keeps.
    pub async fn set_standbys(&self, name: &str, standbys: u32) -> Result<Template> {
        self.store.set_standbys(name, standbys).await?;
        let template = self.template(name).await?;
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
            template: template.name.clone(),
            standbys: template.standbys,
        };
        Ok(node.set_standbys(request, deadlines::operation()).await?)
    }

    /// Copies a template to another host.
    pub async fn copy_template(&self, name: &str, host: &str) -> Result<Template> {
        let template = self.store.template(name).await?;
        self.ensure_template(&self.named_node(host).await?, &template)
            .await?;
        self.template(name).await
    }

    /// Copies a template to the host of `node`, unless it is there.
    pub(crate) async fn ensure_template(&self, node: &Node, template: &Template) -> Result<()> {
        if template.hosts.iter().any(|host| host == node.name()) {
            return Ok(());
        }
        let mut fetched = Err(no_host_answers(template));
        for host in &template.hosts {
            let Some(address) = self.find_node(host).and_then(|node| node.address()) else {
                continue;
            };
            let request = FetchTemplateRequest {
                host: host.clone(),
                address,
                template: template.name.clone(),
                id: template.id.clone(),
            };
            let result = node.fetch_template(request, deadlines::transfer()).await;
            fetched = result.map_err(Error::from);
            match &fetched {
                Err(error) if error.kind == ErrorKind::HostUnavailable => {}
                _ => break,
            }
        }
        fetched?;
        self.store.insert_copy(&template.name, node.name()).await?;
        self.apply_standbys_on(node, template).await
    }

    /// Removes a template that no VM uses, also from its hosts.
    pub async fn remove_template(&self, name: &str) -> Result<()> {
        let template = self.template(name).await?;
        if template.vms > 0 {
            let message = format!("{} VMs use the template `{name}`", template.vms);
            return Err(Error::new(ErrorKind::Conflict, message)
                .advise("destroy them first: they share its memory"));
        }
        if let Some(tag) = template.tags.first() {
            let message = format!("the tag `{tag}` points to the template `{name}`");
            return Err(Error::new(ErrorKind::Conflict, message)
                .advise("move the tag to another template, or remove it: army template untag"));
        }
        for host in template.hosts {
            let request = RemoveTemplateRequest {
                template: name.to_owned(),
            };
            let node = self.node(&host)?;
            let removed = node.remove_template(request, deadlines::operation()).await;
            match removed.map_err(Error::from) {
                // An earlier attempt did not reach all hosts, or the template was removed by hand.
                Err(error) if error.kind == ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        self.store.remove_template(name).await
    }

    /// Creates a tag that points to a template, or moves it there.
    pub async fn tag(&self, tag: &str, template: &str) -> Result<Template> {
        if !clone_api::validate::is_valid_name(tag) {
            let message = format!("invalid tag name `{}`", tag.escape_debug());
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        self.store.tag(tag, template).await?;
        self.template(template).await
    }

    /// Removes a tag.
    pub async fn untag(&self, tag: &str) -> Result<()> {
        self.store.untag(tag).await
    }

    /// One template, with its present numbers of VMs and standbys.
    pub async fn template(&self, name: &str) -> Result<Template> {
        let template = self.store.template(name).await?;
        let used = self.store.vms_by_template().await?;
        Ok(self.with_counts(template, &used))
    }

    /// All templates, with their present numbers of VMs and standbys.
    pub async fn templates(&self) -> Result<Vec<Template>> {
        let used = self.store.vms_by_template().await?;
        let templates = self.store.templates().await?;
        let templates = templates.into_iter();
        Ok(templates.map(|it| self.with_counts(it, &used)).collect())
    }

    fn with_counts(&self, mut template: Template, used: &BTreeMap<String, u32>) -> Template {
        template.vms = used.get(&template.name).copied().unwrap_or(0);
        let reports = self.reports();
        let ready = template.hosts.iter().filter_map(|host| {
            let ready = &reports.get(host)?.report.ready;
            ready.get(&template.name)
        });
        template.ready = ready.sum();
        template
    }
}

fn no_host_answers(template: &Template) -> Error {
    let message = format!("no host that has the template `{}` answers", template.name);
    Error::new(ErrorKind::HostUnavailable, message).retry_after(RETRY_S)
}
