//! `army tenant`.

use std::process::ExitCode;

use anyhow::Result;
use army_api::client::segment;
use army_api::tenants::{ChangeTenant, Tenant};
use army_api::vms::{Egress, NetworkPolicy};
use clone_api::Bytes;
use reqwest::Method;

use super::context::Context;
use super::output::{bytes, table};
use super::vms::network;

/// Manage tenants, their quotas and network policies.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List tenants.
    Ls,
    /// Show a tenant.
    Show {
        /// The tenant.
        tenant: String,
    },
    /// Change the quotas and the network policy of a tenant, for VMs that are created from now on.
    Set(SetArgs),
}

/// `army tenant set`.
#[derive(clap::Args)]
pub(super) struct SetArgs {
    /// The tenant.
    tenant: String,
    /// The number of VMs that it may have at a time, or `none` for unlimited.
    #[arg(long, value_parser = limit::<u32>)]
    max_vms: Option<Limit<u32>>,
    /// The memory of the guests of all its VMs together, as in 64G, or `none`.
    #[arg(long, value_name = "SIZE", value_parser = limit::<Bytes>)]
    max_memory: Option<Limit<Bytes>>,
    /// The CPUs of all its VMs together, or `none`.
    #[arg(long, value_parser = limit::<u32>)]
    max_cpus: Option<Limit<u32>>,
    /// The sizes of the writable disks of all its VMs together, as in 500G, or `none`.
    #[arg(long, value_name = "SIZE", value_parser = limit::<Bytes>)]
    max_disk: Option<Limit<Bytes>>,
    /// The number of templates that it may own, or `none`.
    #[arg(long, value_parser = limit::<u32>)]
    max_templates: Option<Limit<u32>>,
    /// The standbys that its own templates may keep on each host together, or `none`. It is 0 for a
    /// new tenant.
    #[arg(long, value_parser = limit::<u32>)]
    max_standbys: Option<Limit<u32>>,
    /// The destinations that its VMs may send to at the most: full, none, or IPv4 networks separated
    /// by commas; `any` for no policy.
    #[arg(long, value_name = "WHOM")]
    egress: Option<String>,
    /// Let its VMs open connections to the own addresses of their hosts, where egress permits them.
    #[arg(long, requires = "egress")]
    open_host: bool,
}

/// A quota, or none.
#[derive(Clone, Copy)]
struct Limit<T>(Option<T>);

fn limit<T: std::str::FromStr>(text: &str) -> Result<Limit<T>, String>
where
    T::Err: std::fmt::Display,
{
    match text {
        "none" => Ok(Limit(None)),
        number => {
            let number = number.parse().map_err(|error: T::Err| error.to_string())?;
            Ok(Limit(Some(number)))
        }
    }
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    let path = |tenant: &str| format!("/v1/tenants/{}", segment(tenant));
    let tenants: Vec<Tenant> = match command {
        Command::Ls => client.get("/v1/tenants", &()).await?,
        Command::Show { tenant } => vec![client.get(&path(&tenant), &()).await?],
        Command::Set(args) => {
            let policy = |whom: &str| {
                (whom != "any").then(|| NetworkPolicy {
                    host: args.open_host,
                    ..network(whom)
                })
            };
            let request = ChangeTenant {
                network: args.egress.as_deref().map(policy),
                max_vms: args.max_vms.map(|it| it.0),
                max_memory_bytes: args.max_memory.map(|it| it.0.map(|Bytes(bytes)| bytes)),
                max_vcpus: args.max_cpus.map(|it| it.0),
                max_disk_bytes: args.max_disk.map(|it| it.0.map(|Bytes(bytes)| bytes)),
                max_templates: args.max_templates.map(|it| it.0),
                max_standbys: args.max_standbys.map(|it| it.0),
            };
            let path = path(&args.tenant);
            vec![client.send(Method::PATCH, &path, &request).await?]
        }
    };
    context.show(&tenants, |tenants| tenants_table(tenants))?;
    Ok(ExitCode::SUCCESS)
}

fn egress(policy: &NetworkPolicy) -> String {
    match &policy.egress {
        Egress::Full => "full".to_owned(),
        Egress::None => "none".to_owned(),
        Egress::Allow(networks) => networks.join(","),
    }
}

fn tenants_table(tenants: &[Tenant]) -> String {
    let of = |used: String, most: Option<String>| match most {
        Some(most) => format!("{used} of {most}"),
        None => used,
    };
    let lines = tenants.iter().map(|tenant| {
        let (used, quotas) = (tenant.used, tenant.quotas);
        vec![
            tenant.name.clone(),
            of(
                used.vms.to_string(),
                quotas.max_vms.map(|it| it.to_string()),
            ),
            of(bytes(used.memory_bytes), quotas.max_memory_bytes.map(bytes)),
            of(
                used.vcpus.to_string(),
                quotas.max_vcpus.map(|it| it.to_string()),
            ),
            of(bytes(used.disk_bytes), quotas.max_disk_bytes.map(bytes)),
            of(
                used.templates.to_string(),
                quotas.max_templates.map(|it| it.to_string()),
            ),
            of(
                used.standbys.to_string(),
                quotas.max_standbys.map(|it| it.to_string()),
            ),
            tenant.network.as_ref().map_or("any".to_owned(), egress),
        ]
    });
    let heads = [
        "TENANT",
        "VMS",
        "MEMORY",
        "CPUS",
        "DISK",
        "TEMPLATES",
        "STANDBYS",
        "EGRESS",
    ];
    table(&heads, lines.collect())
}
