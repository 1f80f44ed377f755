//! Templates: where they are, and what is kept ready of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::templates::{RegisterTemplate, Template};
use army_api::{Problem, ProblemKind};

use super::{Controller, Node};
use crate::store::Result;
use army_node_api::Origin;
use army_node_api::TemplateFacts;
use army_node_api::blocking;
use army_node_api::pipe::{Pieces, Sender};

impl Controller {
    /// Takes up a template that a host has.
    pub async fn register(&self, asked: &RegisterTemplate) -> Result<Template> {
        let node = self.named_or_only(asked.host.as_deref()).await?;
        let (host, name) = (node.name().to_owned(), asked.name.clone());
        let facts = blocking(move || node.template(&name)).await?;
        self.take_up(&asked.name, &host, asked.standbys, facts)
            .await
    }

    /// Takes a template from a stream to a host, and takes it up.
    pub async fn import(&self, name: &str, host: Option<&str>, pieces: Pieces) -> Result<Template> {
        match self.store.template_or_tag(name).await {
            Err(problem) if problem.kind == ProblemKind::NotFound => {}
            Err(problem) => return Err(problem),
            Ok(_) => {
                let detail = format!("a template or a tag named `{name}` already exists");
                return Err(Problem::new(ProblemKind::Conflict, detail));
            }
        }
        let node = self.named_or_only(host).await?;
        let (host, taken) = (node.name().to_owned(), name.to_owned());
        let facts = blocking(move || node.receive_template(&taken, pieces)).await?;
        self.take_up(name, &host, 0, facts).await
    }

    /// Sends all of a template, from a host that has it and answers. What goes wrong before the
    /// first piece is the result, and later a piece.
    pub async fn export(&self, name: &str, sender: Sender) -> Result<()> {
        let template = self.store.template(name).await?;
        let node = template.hosts.iter().find_map(|host| self.find_node(host));
        let node = node.ok_or_else(|| absent(&template))?;
        blocking(move || node.send_template(&template.name, sender)).await
    }

    async fn named_or_only(&self, host: Option<&str>) -> Result<Node> {
        if let Some(host) = host {
            return self.known(host).await;
        }
        match self.nodes().as_slice() {
            [only] => Ok(Arc::clone(only)),
            nodes => {
                let detail = format!(
                    "`host` is required, because there are {} hosts",
                    nodes.len()
                );
                Err(Problem::new(ProblemKind::InvalidRequest, detail))
            }
        }
    }

    /// The host of a name that a client gave: one that there is not is not one that is away.
    async fn known(&self, host: &str) -> Result<Node> {
        self.host(host).await?;
        self.node(host)
    }

    pub(super) async fn take_up(
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
    pub(super) async fn keep(&self, template: &Template) -> Result<()> {
        for host in &template.hosts {
            self.keep_on(&self.node(host)?, template).await?;
        }
        Ok(())
    }

    pub(super) async fn keep_on(&self, node: &Node, template: &Template) -> Result<()> {
        let node = Arc::clone(node);
        let (name, standbys) = (template.name.clone(), template.standbys);
        blocking(move || node.keep(&name, standbys)).await
    }

    /// Takes a template to another host, so that VMs start there as fast as here.
    pub async fn copy_template(&self, name: &str, host: &str) -> Result<Template> {
        let template = self.store.template(name).await?;
        self.bring(&self.known(host).await?, &template).await?;
        self.template(name).await
    }

    /// Takes a template to `node`, unless it has it.
    pub(super) async fn bring(&self, node: &Node, template: &Template) -> Result<()> {
        if template.hosts.iter().any(|host| host == node.name()) {
            return Ok(());
        }
        let mut answer = Err(absent(template));
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
            let detail = format!("{} VMs use the template `{name}`", template.vms);
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .advise("destroy them first: they share its memory"));
        }
        if let Some(tag) = template.tags.first() {
            let detail = format!("the tag `{tag}` points to the template `{name}`");
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .advise("move the tag to another template, or remove it: army template untag"));
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

    /// Lets a tag point to a template from now on, wherever it pointed before.
    pub async fn tag(&self, tag: &str, template: &str) -> Result<Template> {
        if !clone_api::validate::is_valid_name(tag) {
            let detail = format!("invalid tag name `{}`", tag.escape_debug());
            return Err(Problem::new(ProblemKind::InvalidRequest, detail));
        }
        self.store.tag(tag, template).await?;
        self.template(template).await
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

    pub(super) fn with_figures(
        &self,
        mut template: Template,
        used: &BTreeMap<String, u32>,
    ) -> Template {
        template.vms = used.get(&template.name).copied().unwrap_or(0);
        let heard = self.heard();
        let ready = template.hosts.iter().filter_map(|host| {
            let ready = &heard.get(host)?.report.ready;
            ready.get(&template.name)
        });
        template.ready = ready.sum();
        template
    }
}

fn absent(template: &Template) -> Problem {
    let detail = format!("no host that has the template `{}` answers", template.name);
    Problem::new(ProblemKind::HostUnavailable, detail).retry_after(5)
}
