//! Templates, their copies on hosts, and their tags.
//!
//! Functions here name a template as hosts store it. The names that callers use are in
//! `template_names`.

use std::collections::{BTreeMap, HashMap};

use army_api::templates::{Template, TemplateState, Visibility};

use super::operations::End;
use super::template_names::{TemplateKey, TemplateName, template, unknown};
use super::{
    Change, Store, from_word, is_taken, number, optional_text, parse, query_failed, text, to_json,
    word,
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
        let TemplateKey { name, store_name } = TemplateKey::of(template);
        change
            .check_nobody_makes(&name.to_string(), operation)
            .await?;
        if change.is_tag(&name).await? {
            let message = format!("a tag named `{name}` already exists");
            return Err(Error::new(ErrorKind::Conflict, message)
                .advise("give the template another name, or remove the tag: army template untag"));
        }
        sqlx::query(
            "INSERT INTO templates (name, id, host, standbys, facts, tenant, given_name, visibility) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&store_name)
        .bind(&template.id)
        .bind(&template.host)
        .bind(i64::from(template.standbys))
        .bind(to_json(template)?)
        .bind(&name.owner)
        .bind(&name.name)
        .bind(word(&template.visibility)?)
        .execute(change.connection())
        .await
        .map_err(|error| match is_taken(&error) {
            true => {
                let message = format!("a template named `{name}` already exists");
                Error::new(ErrorKind::Conflict, message)
            }
            false => query_failed(error),
        })?;
        insert_copy(&mut change, &store_name, &template.host).await?;
        let detail = format!("{} on {}", template.id, template.host);
        change
            .template_event("template.registered", &store_name, &detail)
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
        change.template_event("template.copied", name, host).await?;
        change.commit().await
    }

    /// A template with what other tables have of it.
    pub(super) async fn with_hosts(&self, mut template: Template) -> Result<Template> {
        let stored_as = template.stored_as().to_owned();
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
        let hosts = self.texts(query, &stored_as, "hosts").await?;
        template.hosts = parse(hosts.first().map_or("[]", String::as_str))?;
        template.hosts.sort_unstable();
        let query = "SELECT tag FROM tags WHERE template = $1 ORDER BY tag";
        template.tags = self.texts(query, &stored_as, "tag").await?;
        if template.visibility == Visibility::Shared {
            let query = "SELECT tenant FROM template_shares WHERE template = $1 ORDER BY tenant";
            template.shared_with = self.texts(query, &stored_as, "tenant").await?;
        }
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

    /// Creates a tag that points to a template of the same tenant, or moves it there.
    pub(crate) async fn tag(&self, tag: &TemplateName, template: &str) -> Result<()> {
        let mut change = self.change().await?;
        change.check_template_is_ready(template).await?;
        if change.is_template(tag).await? {
            let message = format!("a template named `{tag}` exists: a tag needs another name");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        change.check_nobody_makes(&tag.to_string(), None).await?;
        sqlx::query(
            "INSERT INTO tags (tenant, tag, template) VALUES ($1, $2, $3) \
             ON CONFLICT (tenant, tag) DO UPDATE SET template = $3",
        )
        .bind(&tag.owner)
        .bind(&tag.name)
        .bind(template)
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        change
            .template_event("template.tagged", template, &tag.name)
            .await?;
        change.commit().await
    }

    /// Removes a tag of a template.
    pub(crate) async fn untag(&self, tag: &TemplateName, template: &str) -> Result<()> {
        let mut change = self.change().await?;
        let removed =
            sqlx::query("DELETE FROM tags WHERE tenant = $1 AND tag = $2 AND template = $3")
                .bind(&tag.owner)
                .bind(&tag.name)
                .bind(template)
                .execute(change.connection())
                .await
                .map_err(query_failed)?;
        if removed.rows_affected() == 0 {
            let message = format!("the tag `{tag}` was moved or removed meanwhile");
            return Err(Error::new(ErrorKind::Conflict, message).advise("try again"));
        }
        change
            .template_event("template.untagged", template, &tag.name)
            .await?;
        change.commit().await
    }

    /// The template that hosts store under this name.
    pub(crate) async fn template(&self, store_name: &str) -> Result<Template> {
        let row = sqlx::query("SELECT * FROM templates WHERE name = $1")
            .bind(store_name)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        match row {
            Some(row) => self.with_hosts(template(&row)?).await,
            None => Err(unknown(store_name)),
        }
    }

    /// Changes the number of standbys of a template.
    ///
    /// # Errors
    /// [`ErrorKind::QuotaExceeded`] by the quota of the tenant that owns it.
    pub(crate) async fn set_standbys(&self, name: &str, standbys: u32) -> Result<()> {
        let mut change = self.change().await?;
        change.check_standby_quota(name, standbys).await?;
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

    /// Records the sizes of a template's writable disks, which a former release did not record.
    pub(crate) async fn record_disk_bytes(&self, template: &Template) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE templates SET facts = $1 WHERE name = $2")
            .bind(to_json(template)?)
            .bind(template.stored_as())
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
    }

    /// Changes who can use a template.
    pub(crate) async fn set_visibility(
        &self,
        name: &str,
        visibility: Visibility,
        shared_with: &[String],
    ) -> Result<()> {
        let mut change = self.change().await?;
        let changed = sqlx::query("UPDATE templates SET visibility = $1 WHERE name = $2")
            .bind(word(&visibility)?)
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if changed.rows_affected() == 0 {
            return Err(unknown(name));
        }
        change.remove_shares(name).await?;
        for tenant in shared_with {
            sqlx::query(
                "INSERT INTO template_shares (template, tenant) VALUES ($1, $2) \
                 ON CONFLICT (template, tenant) DO NOTHING",
            )
            .bind(name)
            .bind(tenant)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        }
        let detail = match visibility {
            Visibility::Shared => format!("shared with {}", shared_with.join(", ")),
            other => word(&other)?,
        };
        change
            .template_event("template.shared", name, &detail)
            .await?;
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
        let row = sqlx::query(
            "SELECT name FROM templates WHERE name = $1 AND state = 'removing' \
             AND NOT EXISTS (SELECT host FROM template_copies WHERE template = $1)",
        )
        .bind(name)
        .fetch_optional(change.connection())
        .await
        .map_err(query_failed)?;
        if row.is_none() {
            change.commit().await?;
            return Ok(false);
        }
        let end = End::Succeeded("{}".to_owned());
        change.end_operation(operation, &end).await?;
        change
            .template_event("template.removed", name, "removed")
            .await?;
        change.remove_shares(name).await?;
        sqlx::query("DELETE FROM templates WHERE name = $1")
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await?;
        Ok(true)
    }
}

impl Change<'_> {
    /// Checks that a template is there and not in removal. Transactions of all controllers come one
    /// after the other, so that holds until this one ends.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], and [`ErrorKind::Conflict`] where it is in removal.
    pub(super) async fn check_template_is_ready(&mut self, name: &str) -> Result<()> {
        let row = sqlx::query("SELECT state, tenant, given_name FROM templates WHERE name = $1")
            .bind(name)
            .fetch_optional(self.connection())
            .await
            .map_err(query_failed)?;
        let Some(row) = row else {
            return Err(unknown(name));
        };
        match from_word(&text(&row, "state")?)? {
            TemplateState::Ready => Ok(()),
            TemplateState::Removing => {
                let name = TemplateName {
                    owner: text(&row, "tenant")?,
                    name: text(&row, "given_name")?,
                };
                let message = format!("the template `{name}` is being removed");
                Err(Error::new(ErrorKind::Conflict, message).advise("use another template"))
            }
        }
    }

    /// Lets a template be in removal from now on: nothing new can use it.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where VMs, a tag or a copy in progress use it.
    pub(super) async fn begin_removal(&mut self, template: &TemplateKey) -> Result<()> {
        let (full_name, name) = (template.name.to_string(), &template.store_name);
        let begun = sqlx::query("UPDATE templates SET state = 'removing' WHERE name = $1")
            .bind(name)
            .execute(self.connection())
            .await
            .map_err(query_failed)?;
        if begun.rows_affected() == 0 {
            return Err(unknown(&full_name));
        }
        let conflict = |message: String| Error::new(ErrorKind::Conflict, message);
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM vms WHERE template = $1 AND alive = 1) AS vms, \
             (SELECT MIN(tag) FROM tags WHERE template = $1) AS tag, \
             (SELECT COUNT(*) FROM operations WHERE kind = 'copy_template' AND subject = $2 \
             AND state = 'running') AS copies",
        )
        .bind(name)
        .bind(&full_name)
        .fetch_one(self.connection())
        .await
        .map_err(query_failed)?;
        let vms = number(&row, "vms")?;
        if vms > 0 {
            let message = format!("{vms} VMs use the template `{full_name}`");
            return Err(conflict(message).advise("destroy them first: they share its memory"));
        }
        if let Some(tag) = optional_text(&row, "tag")? {
            let message = format!("the tag `{tag}` points to the template `{full_name}`");
            return Err(conflict(message)
                .advise("move the tag to another template, or remove it: army template untag"));
        }
        if number(&row, "copies")? > 0 {
            let message = format!("the template `{full_name}` is being copied to another host");
            return Err(conflict(message).advise("try again when the copy is complete"));
        }
        Ok(())
    }

    /// Checks that neither a template nor a tag has the name of a new template, and that hosts store
    /// no other under its name there.
    pub(super) async fn check_template_name_is_free(&mut self, new: &TemplateKey) -> Result<()> {
        let query = "SELECT name FROM templates WHERE name = $1";
        let is_taken = self.is_template(&new.name).await?
            || self.is_tag(&new.name).await?
            || self.is_there(query, [&new.store_name]).await?;
        if is_taken {
            let message = format!("a template or a tag named `{}` already exists", new.name);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        Ok(())
    }

    async fn is_template(&mut self, name: &TemplateName) -> Result<bool> {
        let query = "SELECT name FROM templates WHERE tenant = $1 AND given_name = $2";
        self.is_there(query, [&name.owner, &name.name]).await
    }

    async fn is_tag(&mut self, name: &TemplateName) -> Result<bool> {
        let query = "SELECT tag FROM tags WHERE tenant = $1 AND tag = $2";
        self.is_there(query, [&name.owner, &name.name]).await
    }

    async fn is_there<const N: usize>(
        &mut self,
        query: &'static str,
        values: [&String; N],
    ) -> Result<bool> {
        let mut query = sqlx::query(query);
        for value in values {
            query = query.bind(value.clone());
        }
        let row = query.fetch_optional(self.connection()).await;
        Ok(row.map_err(query_failed)?.is_some())
    }

    async fn remove_shares(&mut self, template: &str) -> Result<()> {
        sqlx::query("DELETE FROM template_shares WHERE template = $1")
            .bind(template)
            .execute(self.connection())
            .await
            .map(drop)
            .map_err(query_failed)
    }
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
