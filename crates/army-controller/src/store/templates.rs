//! Templates, their copies on hosts, and their tags.

use std::collections::{BTreeMap, HashMap};

use army_api::templates::{Template, TemplateState};
use sqlx::any::AnyRow;

use super::operations::End;
use super::{
    Change, Store, from_word, is_taken, number, optional_text, parse, query_failed, readable, text,
    to_json,
};
use crate::{Error, ErrorKind, Result};

impl Store {
    /// Records a template that `operation` has made, where it was made by one. Its present counts
    /// (`ready`, `vms`) are not stored.
    pub(crate) async fn insert_template(
        &self,
        template: &Template,
        operation: Option<&str>,
    ) -> Result<()> {
        let mut change = self.change().await?;
        change.check_nobody_makes(&template.name, operation).await?;
        let query = "SELECT tag FROM template_tags WHERE tag = $1";
        if is_there(&mut change, query, &template.name).await? {
            let message = format!("a tag named `{}` already exists", template.name);
            return Err(Error::new(ErrorKind::Conflict, message)
                .advise("give the template another name, or remove the tag: army template untag"));
        }
        sqlx::query(
            "INSERT INTO templates (name, id, host, standbys, facts) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(&template.name)
        .bind(&template.id)
        .bind(&template.host)
        .bind(i64::from(template.standbys))
        .bind(to_json(template)?)
        .execute(change.connection())
        .await
        .map_err(|error| match is_taken(&error) {
            true => {
                let message = format!("a template named `{}` already exists", template.name);
                Error::new(ErrorKind::Conflict, message)
            }
            false => query_failed(error),
        })?;
        insert_copy(&mut change, &template.name, &template.host).await?;
        let detail = format!("{} on {}", template.id, template.host);
        change
            .event("template.registered", &template.name, "", &detail)
            .await?;
        change.commit().await
    }

    /// Records that another host has a template.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] or [`ErrorKind::NotFound`] where the template is in removal, or was
    /// removed. Then the host must not keep the copy.
    pub(crate) async fn insert_copy(&self, name: &str, host: &str) -> Result<()> {
        let mut change = self.change().await?;
        change.check_template_is_ready(name).await?;
        insert_copy(&mut change, name, host).await?;
        change.event("template.copied", name, "", host).await?;
        change.commit().await
    }

    /// All templates, by name.
    pub(crate) async fn templates(&self) -> Result<Vec<Template>> {
        let rows = sqlx::query("SELECT * FROM templates ORDER BY name")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        let mut templates = Vec::with_capacity(rows.len());
        for template in readable(&rows, "templates", template) {
            templates.push(self.with_hosts(template).await?);
        }
        Ok(templates)
    }

    async fn with_hosts(&self, mut template: Template) -> Result<Template> {
        // As one text: a template may be on every host of a large fleet, and rows are slow.
        let query = match self.is_postgres {
            true => {
                "SELECT CAST(COALESCE(json_agg(host), '[]') AS TEXT) AS hosts \
                 FROM template_copies WHERE template = $1"
            }
            false => {
                "SELECT CAST(json_group_array(host) AS TEXT) AS hosts \
                 FROM template_copies WHERE template = $1"
            }
        };
        let hosts = self.texts(query, &template.name, "hosts").await?;
        template.hosts = parse(hosts.first().map_or("[]", String::as_str))?;
        template.hosts.sort_unstable();
        let query = "SELECT tag FROM template_tags WHERE template = $1 ORDER BY tag";
        template.tags = self.texts(query, &template.name, "tag").await?;
        Ok(template)
    }

    async fn texts(&self, query: &'static str, of: &str, column: &str) -> Result<Vec<String>> {
        let rows = sqlx::query(query)
            .bind(of)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        rows.iter().map(|row| text(row, column)).collect()
    }

    /// The template of this name, or that a tag of this name points to.
    pub(crate) async fn template_or_tag(&self, name: &str) -> Result<Template> {
        let query = "SELECT template FROM template_tags WHERE tag = $1";
        match self.texts(query, name, "template").await?.first() {
            Some(tagged) => self.template(tagged).await,
            None => self.template(name).await,
        }
    }

    /// Creates a tag that points to a template, or moves it there.
    pub(crate) async fn tag(&self, tag: &str, template: &str) -> Result<()> {
        let mut change = self.change().await?;
        let query = "SELECT name FROM templates WHERE name = $1";
        change.check_template_is_ready(template).await?;
        if is_there(&mut change, query, tag).await? {
            let message = format!("a template named `{tag}` exists: a tag needs another name");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        change.check_nobody_makes(tag, None).await?;
        sqlx::query(
            "INSERT INTO template_tags (tag, template) VALUES ($1, $2) \
             ON CONFLICT (tag) DO UPDATE SET template = $2",
        )
        .bind(tag)
        .bind(template)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change.event("template.tagged", template, "", tag).await?;
        change.commit().await
    }

    /// Removes a tag.
    pub(crate) async fn untag(&self, tag: &str) -> Result<()> {
        let mut change = self.change().await?;
        let removed = sqlx::query("DELETE FROM template_tags WHERE tag = $1")
            .bind(tag)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if removed.rows_affected() == 0 {
            let message = format!("tag `{}` not found", tag.escape_debug());
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        change
            .event("template.untagged", tag, "", "removed")
            .await?;
        change.commit().await
    }

    /// One template.
    pub(crate) async fn template(&self, name: &str) -> Result<Template> {
        let row = sqlx::query("SELECT * FROM templates WHERE name = $1")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        match row {
            Some(row) => self.with_hosts(template(&row)?).await,
            None => Err(unknown(name)),
        }
    }

    /// Changes the number of standbys of a template.
    pub(crate) async fn set_standbys(&self, name: &str, standbys: u32) -> Result<()> {
        let mut change = self.change().await?;
        let changed = sqlx::query("UPDATE templates SET standbys = $1 WHERE name = $2")
            .bind(i64::from(standbys))
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if changed.rows_affected() == 0 {
            return Err(unknown(name));
        }
        change.commit().await
    }

    /// The numbers of standbys that hosts should keep, by host and template.
    pub(crate) async fn standbys_by_host(&self) -> Result<HashMap<String, BTreeMap<String, u32>>> {
        let rows = sqlx::query(
            "SELECT template_copies.host AS host, name, standbys FROM templates \
             JOIN template_copies ON template_copies.template = templates.name \
             WHERE standbys > 0",
        )
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        let mut hosts: HashMap<String, BTreeMap<String, u32>> = HashMap::new();
        for row in &rows {
            let standbys = number(row, "standbys")?.max(0) as u32;
            let host = hosts.entry(text(row, "host")?).or_default();
            host.insert(text(row, "name")?, standbys);
        }
        Ok(hosts)
    }

    /// The numbers of standbys that a host should keep, by template.
    pub(crate) async fn standbys_of_host(&self, host: &str) -> Result<BTreeMap<String, u32>> {
        let rows = sqlx::query(
            "SELECT name, standbys FROM template_copies \
             JOIN templates ON template_copies.template = templates.name \
             WHERE template_copies.host = $1",
        )
        .bind(host)
        .fetch_all(&self.pool)
        .await
        .map_err(query_failed)?;
        let standbys = |row| Ok((text(row, "name")?, number(row, "standbys")?.max(0) as u32));
        rows.iter().map(standbys).collect()
    }

    /// Records that a host has no copy of a template any more.
    pub(crate) async fn remove_copy(&self, name: &str, host: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("DELETE FROM template_copies WHERE template = $1 AND host = $2")
            .bind(name)
            .bind(host)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// The hosts that have a copy of a template.
    pub(crate) async fn copies(&self, name: &str) -> Result<Vec<String>> {
        let query = "SELECT host FROM template_copies WHERE template = $1 ORDER BY host";
        self.texts(query, name, "host").await
    }

    /// Removes a template in removal of which no host has a copy any more, and ends the operation
    /// that has removed it. Returns false where a host has a copy.
    pub(crate) async fn finish_removal(&self, name: &str, operation: &str) -> Result<bool> {
        let mut change = self.change().await?;
        let removed = sqlx::query(
            "DELETE FROM templates WHERE name = $1 AND state = 'removing' \
             AND NOT EXISTS (SELECT host FROM template_copies WHERE template = $1)",
        )
        .bind(name)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        let is_removed = removed.rows_affected() > 0;
        if is_removed {
            let end = End::Succeeded("{}".to_owned());
            change.end_operation(operation, &end).await?;
            change
                .event("template.removed", name, "", "removed")
                .await?;
        }
        change.commit().await?;
        Ok(is_removed)
    }
}

impl Change<'_> {
    /// Checks that a template is there and not in removal. Transactions of all controllers come one
    /// after the other, so that holds until this one ends.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], and [`ErrorKind::Conflict`] where it is in removal.
    pub(super) async fn check_template_is_ready(&mut self, name: &str) -> Result<()> {
        let row = sqlx::query("SELECT state FROM templates WHERE name = $1")
            .bind(name)
            .fetch_optional(self.connection())
            .await
            .map_err(query_failed)?;
        let Some(row) = row else {
            return Err(unknown(name));
        };
        match from_word(&text(&row, "state")?)? {
            TemplateState::Ready => Ok(()),
            TemplateState::Removing => Err(in_removal(name)),
        }
    }

    /// Lets a template be in removal from now on: nothing new can use it.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where VMs, a tag or a copy in progress use it.
    pub(super) async fn begin_removal(&mut self, name: &str) -> Result<()> {
        let begun = sqlx::query("UPDATE templates SET state = 'removing' WHERE name = $1")
            .bind(name)
            .execute(self.connection())
            .await
            .map_err(query_failed)?;
        if begun.rows_affected() == 0 {
            return Err(unknown(name));
        }
        let conflict = |message: String| Error::new(ErrorKind::Conflict, message);
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM vms WHERE template = $1 AND alive = 1) AS vms, \
             (SELECT MIN(tag) FROM template_tags WHERE template = $1) AS tag, \
             (SELECT COUNT(*) FROM operations WHERE kind = 'copy_template' AND subject = $1 \
             AND state = 'running') AS copies",
        )
        .bind(name)
        .fetch_one(self.connection())
        .await
        .map_err(query_failed)?;
        let vms = number(&row, "vms")?;
        if vms > 0 {
            let message = format!("{vms} VMs use the template `{name}`");
            return Err(conflict(message).advise("destroy them first: they share its memory"));
        }
        if let Some(tag) = optional_text(&row, "tag")? {
            let message = format!("the tag `{tag}` points to the template `{name}`");
            return Err(conflict(message)
                .advise("move the tag to another template, or remove it: army template untag"));
        }
        if number(&row, "copies")? > 0 {
            let message = format!("the template `{name}` is being copied to another host");
            return Err(conflict(message).advise("try again when the copy is complete"));
        }
        Ok(())
    }

    /// Checks that neither a template nor a tag has this name.
    pub(super) async fn check_template_name_is_free(&mut self, name: &str) -> Result<()> {
        for query in [
            "SELECT name FROM templates WHERE name = $1",
            "SELECT tag FROM template_tags WHERE tag = $1",
        ] {
            if is_there(self, query, name).await? {
                let message = format!("a template or a tag named `{name}` already exists");
                return Err(Error::new(ErrorKind::Conflict, message));
            }
        }
        Ok(())
    }
}

async fn is_there(change: &mut Change<'_>, query: &'static str, name: &str) -> Result<bool> {
    let row = sqlx::query(query)
        .bind(name)
        .fetch_optional(change.connection())
        .await;
    Ok(row.map_err(query_failed)?.is_some())
}

async fn insert_copy(change: &mut Change<'_>, template: &str, host: &str) -> Result<()> {
    sqlx::query(
        "INSERT INTO template_copies (template, host) VALUES ($1, $2) \
         ON CONFLICT (template, host) DO NOTHING",
    )
    .bind(template)
    .bind(host)
    .execute(change.connection())
    .await
    .map(drop)
    .map_err(query_failed)
}

fn unknown(name: &str) -> Error {
    let message = format!("template `{}` not found", name.escape_debug());
    Error::new(ErrorKind::NotFound, message)
}

fn in_removal(name: &str) -> Error {
    let message = format!("the template `{}` is being removed", name.escape_debug());
    Error::new(ErrorKind::Conflict, message).advise("use another template")
}

fn template(row: &AnyRow) -> Result<Template> {
    let mut template: Template = parse(&text(row, "facts")?)?;
    template.standbys = number(row, "standbys")?.max(0) as u32;
    template.state = from_word::<TemplateState>(&text(row, "state")?)?;
    template.ready = 0;
    template.vms = 0;
    Ok(template)
}
