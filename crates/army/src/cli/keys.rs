//! `army key`.

use std::process::ExitCode;

use anyhow::Result;
use army_api::client::segment;
use army_api::keys::{CreateKey, Key, NewKey, Role};
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
                    vec![key.id.clone(), key.tenant.clone(), role]
                });
                table(&["ID", "TENANT", "ROLE"], lines.collect())
            })?;
        }
        Command::Create {
            tenant,
            role,
            max_vms,
        } => {
            let role = match role {
                RoleArg::Viewer => Role::Viewer,
                RoleArg::User => Role::User,
                RoleArg::Admin => Role::Admin,
            };
            let request = CreateKey {
                tenant,
                role,
                max_vms,
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
