//! Templates, their copies on hosts, and their tags.

use army_api::templates::Template;
use sqlx::any::AnyRow;

use super::{Change, Store, is_taken, number, parse, query_failed, readable, text, to_json};
use crate::{Error, ErrorKind, Result};

impl Store {
    /// Records a template. Its present counts (`ready`, `vms`) are not stored.
    pub(crate) async fn insert_template(&self, template: &Template) -> Result<()> {
        let mut change = self.change().await?;
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
    pub(crate) async fn insert_copy(&self, name: &str, host: &str) -> Result<()> {
        let mut change = self.change().await?;
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
        let query = "SELECT host FROM template_copies WHERE template = $1 ORDER BY host";
        template.hosts = self.texts(query, &template.name, "host").await?;
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
        if !is_there(&mut change, query, template).await? {
            return Err(unknown(template));
        }
        if is_there(&mut change, query, tag).await? {
            let message = format!("a template named `{tag}` exists: a tag needs another name");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
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

    /// Removes a template.
    pub(crate) async fn remove_template(&self, name: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("DELETE FROM template_copies WHERE template = $1")
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        let removed = sqlx::query("DELETE FROM templates WHERE name = $1")
            .bind(name)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if removed.rows_affected() == 0 {
            return Err(unknown(name));
        }
        change
            .event("template.removed", name, "", "removed")
            .await?;
        change.commit().await
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

fn template(row: &AnyRow) -> Result<Template> {
    let mut template: Template = parse(&text(row, "facts")?)?;
    template.standbys = number(row, "standbys")?.max(0) as u32;
    template.ready = 0;
    template.vms = 0;
    Ok(template)
}
