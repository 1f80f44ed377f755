//! `army template`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use army_api::client::segment;
use army_api::templates::{
    ChangeTemplate, CopyTemplate, ImportTemplate, RegisterTemplate, SetTag, Template,
};
use reqwest::Method;

use super::build;
use super::context::Context;
use super::operations;
use super::output::{bytes, table};

/// Manage templates.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List templates.
    Ls,
    /// Build a template from another one, by running commands and writing files in a clone of it.
    Build(build::Args),
    /// Register a template from a host's store, where `clone snapshot` put it.
    Register {
        /// The template's name in the store.
        name: String,
        /// The host that has it.
        #[arg(long)]
        host: Option<String>,
        /// The number of standbys to keep ready.
        #[arg(long, default_value_t = 0)]
        standbys: u32,
    },
    /// Copy a template to another host.
    Copy {
        /// The template.
        name: String,
        /// The host.
        host: String,
    },
    /// Point a tag to a template; VMs can be created from a tag.
    Tag {
        /// The template.
        name: String,
        /// The tag. If it exists, it is moved.
        tag: String,
    },
    /// Remove a tag.
    Untag {
        /// The tag.
        tag: String,
    },
    /// Export a complete template to a file.
    Export {
        /// The template.
        name: String,
        /// The file.
        file: PathBuf,
    },
    /// Import a template from a file that `export` wrote.
    Import {
        /// The template's new name.
        name: String,
        /// The file.
        file: PathBuf,
        /// The host to import it to.
        #[arg(long)]
        host: Option<String>,
    },
    /// Set how many standbys are kept ready on each of the template's hosts.
    Standbys {
        /// The template.
        name: String,
        /// The number of standbys.
        count: u32,
    },
    /// Remove a template that is not in use, from its hosts as well.
    Rm {
        /// The template.
        name: String,
    },
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    let template: Template = match command {
        Command::Ls => {
            let templates: Vec<Template> = client.get("/v1/templates", &()).await?;
            context.show(&templates, |templates| templates_table(templates))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Build(args) => build::run(context, args).await?,
        Command::Register {
            name,
            host,
            standbys,
        } => {
            let request = RegisterTemplate {
                name,
                host,
                standbys,
            };
            client.send(Method::POST, "/v1/templates", &request).await?
        }
        Command::Copy { name, host } => {
            let request = CopyTemplate { host };
            let path = format!("/v1/templates/{}/copies", segment(&name));
            client.send(Method::POST, &path, &request).await?
        }
        Command::Tag { name, tag } => {
            let request = SetTag { template: name };
            let path = format!("/v1/tags/{}", segment(&tag));
            client.send(Method::PUT, &path, &request).await?
        }
        Command::Untag { tag } => {
            let path = format!("/v1/tags/{}", segment(&tag));
            client.plain(Method::DELETE, &path).await?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Export { name, file } => {
            let path = format!("/v1/templates/{}/content", segment(&name));
            super::files::receive(client.bytes(&path, &()).await?, &file).await?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Import { name, file, host } => {
            let path = format!("/v1/templates/{}/content", segment(&name));
            let body = super::files::open(&file).await?;
            client
                .put_bytes(&path, &ImportTemplate { host }, body)
                .await?;
            client
                .get(&format!("/v1/templates/{}", segment(&name)), &())
                .await?
        }
        Command::Standbys { name, count } => {
            let request = ChangeTemplate { standbys: count };
            let path = format!("/v1/templates/{}", segment(&name));
            client.send(Method::PATCH, &path, &request).await?
        }
        Command::Rm { name } => {
            let path = format!("/v1/templates/{}", segment(&name));
            if let Some(operation) = client.remove(&path).await? {
                operations::show(context, &operation)?;
            }
            return Ok(ExitCode::SUCCESS);
        }
    };
    context.show(&template, |it| templates_table(std::slice::from_ref(it)))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn templates_table(templates: &[Template]) -> String {
    let lines = templates.iter().map(|it| {
        vec![
            it.name.clone(),
            it.id.chars().take(12).collect(),
            it.tags.join(","),
            it.hosts.join(","),
            bytes(it.memory_bytes),
            bytes(it.data_bytes),
            it.vms.to_string(),
            format!("{}/{}", it.ready, it.standbys),
        ]
    });
    let heads = [
        "TEMPLATE", "ID", "TAGS", "HOSTS", "MEMORY", "DATA", "VMS", "READY",
    ];
    table(&heads, lines.collect())
}
