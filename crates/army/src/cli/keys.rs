//! `army key`.

use std::process::ExitCode;

use agent_proto::text::printable;
use anyhow::Result;
use army_api::client::segment;
use army_api::keys::{CreateKey, Key, KeyScope, NewKey, Role};
use army_node_api::time::now_ms;
use clap::ValueEnum;
use reqwest::Method;

use super::context::Context;
use super::output::table;

/// Manage keys.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List keys.
    Ls,
    /// Make a key. Its secret is shown once.
    Create {
        /// The tenant that the key belongs to.
        tenant: String,
        /// The role of the key.
        #[arg(long, value_enum, default_value_t = RoleArg::User)]
        role: RoleArg,
        /// The maximum number of VMs that the tenant may have at a time.
        #[arg(long)]
        max_vms: Option<u32>,
        /// What the key is for, in words.
        #[arg(long)]
        name: Option<String>,
        /// The number of seconds for which the key is valid.
        #[arg(long, value_name = "SECONDS")]
        ttl: Option<u64>,
        /// Restrict the key to one VM, by its id.
        #[arg(long, value_name = "ID", group = "scope")]
        vm: Option<String>,
        /// Restrict the key to metrics.
        #[arg(long, group = "scope")]
        metrics: bool,
        /// Restrict the key to templates, tags and builds.
        #[arg(long, group = "scope")]
        templates: bool,
    },
    /// Revoke a key.
    Rm {
        /// The key's id.
        id: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum RoleArg {
    /// May only read.
    Viewer,
    /// May create and use VMs.
    User,
    /// May do everything, for all tenants.
    Admin,
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    match command {
        Command::Ls => {
            let keys: Vec<Key> = client.get("/v1/keys", &()).await?;
            context.show(&keys, |keys| {
                let lines = keys.iter().map(|key| {
                    let role = format!("{:?}", key.role).to_lowercase();
                    let scope = key.scope.as_ref().map(|scope| match scope {
                        KeyScope::Vm(id) => format!("vm {id}"),
                        KeyScope::Metrics => "metrics".to_owned(),
                        KeyScope::Templates => "templates".to_owned(),
                    });
                    let name = key.name.as_deref().map(printable);
                    vec![
                        key.id.clone(),
                        key.tenant.clone(),
                        role,
                        scope.unwrap_or_default(),
                        age(key.used_ms),
                        remaining(key.expires_ms),
                        name.unwrap_or_default(),
                    ]
                });
                let heads = ["ID", "TENANT", "ROLE", "SCOPE", "USED", "EXPIRES", "NAME"];
                table(&heads, lines.collect())
            })?;
        }
        Command::Create {
            tenant,
            role,
            max_vms,
            name,
            ttl,
            vm,
            metrics,
            templates,
        } => {
            let role = match role {
                RoleArg::Viewer => Role::Viewer,
                RoleArg::User => Role::User,
                RoleArg::Admin => Role::Admin,
            };
            let scope = vm.map(KeyScope::Vm);
            let scope = scope.or(metrics.then_some(KeyScope::Metrics));
            let request = CreateKey {
                tenant,
                role,
                max_vms,
                name,
                ttl_s: ttl,
                scope: scope.or(templates.then_some(KeyScope::Templates)),
            };
            let key: NewKey = client.send(Method::POST, "/v1/keys", &request).await?;
            context.show(&key, |key| key.secret.clone())?;
        }
        Command::Rm { id } => {
            client
                .plain(Method::DELETE, &format!("/v1/keys/{}", segment(&id)))
                .await?
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How long ago a time was, in words.
fn age(time_ms: Option<u64>) -> String {
    time_ms.map_or_else(
        || "never".to_owned(),
        |time| format!("{} ago", minutes(now_ms().saturating_sub(time))),
    )
}

/// How long it is until a time, in words.
fn remaining(time_ms: Option<u64>) -> String {
    time_ms.map_or_else(
        || "never".to_owned(),
        |time| match time.checked_sub(now_ms()) {
            Some(left) => format!("in {}", minutes(left)),
            None => "expired".to_owned(),
        },
    )
}

fn minutes(ms: u64) -> String {
    let minutes = ms / 60_000;
    match minutes {
        0..120 => format!("{minutes} min"),
        120..2880 => format!("{} h", minutes / 60),
        _ => format!("{} d", minutes / 1440),
    }
}
