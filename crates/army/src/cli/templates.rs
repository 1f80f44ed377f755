//! `army template`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use army_api::client::segment;
use army_api::templates::{
    ChangeTemplate, CopyTemplate, ImportTemplate, RegisterTemplate, SetTag, Template, Visibility,
};
use reqwest::Method;

use super::build;
use super::context::Context;
use super::operations;
use super::output::{bytes, table};

/// Manage templates.
///
/// A template belongs to a tenant. A bare name means one of the own tenant, or else one of the
/// administrators; TENANT/NAME means another tenant's, and /NAME one of the administrators.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List the templates that you can use.
    Ls,
    /// Show a template.
    Show {
        /// The template, or a tag.
        name: String,
    },
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
    /// Let other tenants use a template, in place of those that it was shared with before.
    Share {
        /// The template.
        name: String,
        /// The tenants.
        #[arg(required = true)]
        tenants: Vec<String>,
    },
    /// Let nobody use a template but its own tenant and administrators.
    Unshare {
        /// The template.
        name: String,
    },
    /// Let all tenants use a template; only administrators may.
    Publish {
        /// The template.
        name: String,
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
        Command::Show { name } => client.get(&template_path(&name), &()).await?,
        Command::Build(args) => build::run(context, args).await?,
        Command::Share { name, tenants } => {
            let request = ChangeTemplate {
                visibility: Some(Visibility::Shared),
                shared_with: Some(tenants),
                ..ChangeTemplate::default()
            };
            let path = template_path(&name);
            client.send(Method::PATCH, &path, &request).await?
        }
        Command::Unshare { name } => set_visibility(context, &name, Visibility::Private).await?,
        Command::Publish { name } => set_visibility(context, &name, Visibility::Public).await?,
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
            client.get(&template_path(&name), &()).await?
        }
        Command::Standbys { name, count } => {
            let request = ChangeTemplate {
                standbys: Some(count),
                ..ChangeTemplate::default()
            };
            let path = template_path(&name);
            client.send(Method::PATCH, &path, &request).await?
        }
        Command::Rm { name } => {
            let removed = client.remove(&template_path(&name)).await?;
            if let Some(operation) = removed {
                operations::show(context, &operation)?;
            }
            return Ok(ExitCode::SUCCESS);
        }
    };
    context.show(&template, |it| templates_table(std::slice::from_ref(it)))?;
    Ok(ExitCode::SUCCESS)
}

fn template_path(name: &str) -> String {
    format!("/v1/templates/{}", segment(name))
}

async fn set_visibility(context: &Context, name: &str, visibility: Visibility) -> Result<Template> {
    let request = ChangeTemplate {
        visibility: Some(visibility),
        ..ChangeTemplate::default()
    };
    let client = context.client()?;
    let path = template_path(name);
    Ok(client.send(Method::PATCH, &path, &request).await?)
}

/// Who can use a template, in words.
fn visible_to(template: &Template) -> String {
    match template.visibility {
        Visibility::Private => "private".to_owned(),
        Visibility::Public => "public".to_owned(),
        Visibility::Shared if template.shared_with.is_empty() => "shared".to_owned(),
        Visibility::Shared => format!("shared: {}", template.shared_with.join(",")),
    }
}

pub(super) fn templates_table(templates: &[Template]) -> String {
    let lines = templates.iter().map(|it| {
        vec![
            it.full_name(),
            it.id.chars().take(12).collect(),
            it.tags.join(","),
            visible_to(it),
            it.hosts.join(","),
            bytes(it.memory_bytes),
            bytes(it.data_bytes),
            it.vms.to_string(),
            format!("{}/{}", it.ready, it.standbys),
        ]
    });
    let heads = [
        "TEMPLATE",
        "ID",
        "TAGS",
        "VISIBILITY",
        "HOSTS",
        "MEMORY",
        "DATA",
        "VMS",
        "READY",
    ];
    table(&heads, lines.collect())
}
