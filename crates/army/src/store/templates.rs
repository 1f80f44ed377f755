//! Templates that VMs can be made of.

use army_api::templates::Template;
use army_api::{Problem, ProblemKind};
use sqlx::any::AnyRow;

use super::{Change, Result, Store, is_taken, number, parse, query_failed, text, to_json};

impl Store {
    /// Takes up a template. Its figures of the moment (`ready`, `vms`) are not kept.
    pub async fn add_template(&self, template: &Template) -> Result<()> {
        let mut change = self.change().await?;
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
                let detail = format!("there is a template `{}` already", template.name);
                Problem::new(ProblemKind::Conflict, detail)
            }
            false => query_failed(error),
        })?;
        add_copy(&mut change, &template.name, &template.host).await?;
        let detail = format!("{} on {}", template.id, template.host);
        change
            .event("template.registered", &template.name, "", &detail)
            .await?;
        change.commit().await
    }

    /// Notes that a host has a template, too.
    pub async fn add_copy(&self, name: &str, host: &str) -> Result<()> {
        let mut change = self.change().await?;
        add_copy(&mut change, name, host).await?;
        change.event("template.copied", name, "", host).await?;
        change.commit().await
    }

    /// All templates, by name.
    pub async fn templates(&self) -> Result<Vec<Template>> {
        let rows = sqlx::query("SELECT * FROM templates ORDER BY name")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        let mut templates = Vec::with_capacity(rows.len());
        for row in &rows {
            templates.push(self.with_hosts(template(row)?).await?);
        }
        Ok(templates)
    }

    async fn with_hosts(&self, mut template: Template) -> Result<Template> {
        let query = "SELECT host FROM template_copies WHERE template = $1 ORDER BY host";
        let rows = sqlx::query(query)
            .bind(&template.name)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        template.hosts = rows
            .iter()
            .map(|row| text(row, "host"))
            .collect::<Result<_>>()?;
        Ok(template)
    }

    /// One template.
    pub async fn template(&self, name: &str) -> Result<Template> {
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

    /// How many clones of it are kept ready.
    pub async fn set_standbys(&self, name: &str, standbys: u32) -> Result<()> {
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

    /// Gives a template up.
    pub async fn remove_template(&self, name: &str) -> Result<()> {
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

async fn add_copy(change: &mut Change<'_>, template: &str, host: &str) -> Result<()> {
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

fn unknown(name: &str) -> Problem {
    let detail = format!("there is no template `{}`", name.escape_debug());
    Problem::new(ProblemKind::NotFound, detail)
}

fn template(row: &AnyRow) -> Result<Template> {
    let mut template: Template = parse(&text(row, "facts")?)?;
    template.standbys = number(row, "standbys")?.max(0) as u32;
    template.ready = 0;
    template.vms = 0;
    Ok(template)
}
