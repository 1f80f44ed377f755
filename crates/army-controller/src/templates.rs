//! Templates: which hosts have them, and how many standbys are kept of them.
//!
//! Making them is in `make`, and removing them in `removal`.

mod make;
mod removal;

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::templates::Template;
use army_node_api::chunks::ChunkReceiver;
use army_node_api::requests::{ExportTemplateRequest, SetStandbysRequest};

use crate::error::RETRY_S;
use crate::store::hosts::HostRow;
use crate::{Controller, Error, ErrorKind, Node, Result, deadlines};

impl Controller {
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
        let rows = self.host_rows().await?;
        Ok(self.with_counts(template, &used, &rows))
    }

    /// All templates, with their present numbers of VMs and standbys.
    pub async fn templates(&self) -> Result<Vec<Template>> {
        let used = self.store.vms_by_template().await?;
        let templates = self.store.templates().await?;
        let rows = self.host_rows().await?;
        let templates = templates.into_iter();
        let templates = templates.map(|it| self.with_counts(it, &used, &rows));
        Ok(templates.collect())
    }

    fn with_counts(
        &self,
        mut template: Template,
        used: &BTreeMap<String, u32>,
        rows: &[HostRow],
    ) -> Template {
        template.vms = used.get(&template.name).copied().unwrap_or(0);
        template.ready = self.ready_standbys(rows, &template.name);
        template
    }
}

fn no_host_answers(template: &Template) -> Error {
    let message = format!("no host that has the template `{}` answers", template.name);
    Error::new(ErrorKind::HostUnavailable, message).retry_after(RETRY_S)
}
