//! `army vm`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use army_api::client::{Begun, segment};
use army_api::templates::Template;
use army_api::vms::{
    Balloon, CreateVms, CreatedVms, Egress, ForkVm, IdleAction, IdlePolicy, NetworkPolicy,
    SetBalloon, SnapshotVm, Vm, VmFilter, VmPage,
};
use clone_api::Bytes;
use reqwest::Method;

use super::context::Context;
use super::operations;
use super::output::{bytes, ms, note, pair, table, word};
use super::templates::templates_table;

/// Manage VMs.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Create VMs from a template.
    Create(CreateArgs),
    /// List VMs.
    Ls(ListArgs),
    /// Show one VM.
    Inspect {
        /// The VM: its id, its name, or TENANT/NAME for another tenant's.
        vm: String,
    },
    /// Fork a running VM, which continues to run.
    Fork {
        /// The VM.
        vm: String,
        /// The number of forks.
        #[arg(long, short, default_value_t = 1)]
        count: u32,
        /// The fork's name; several are called NAME-1, NAME-2 and so on.
        #[arg(long, short)]
        name: Option<String>,
    },
    /// Stop a VM's CPUs.
    Pause {
        /// The VM.
        vm: String,
    },
    /// Resume a paused VM.
    Resume {
        /// The VM.
        vm: String,
    },
    /// Show a VM's balloon, or set its target size.
    Balloon {
        /// The VM.
        vm: String,
        /// How much of the guest's memory the balloon should hold, as in 128M.
        size: Option<Bytes>,
    },
    /// Make a template of a VM, which continues to run.
    Snapshot {
        /// The VM.
        vm: String,
        /// The template's name.
        template: String,
        /// Store only the changes since the VM's template.
        #[arg(long)]
        diff: bool,
    },
    /// Destroy VMs.
    Rm {
        /// The VMs.
        #[arg(required = true)]
        vms: Vec<String>,
    },
}

/// `army vm create`.
#[derive(clap::Args)]
pub(super) struct CreateArgs {
    /// The template, or a tag.
    template: String,
    /// The number of VMs.
    #[arg(long, short, default_value_t = 1)]
    count: u32,
    /// The VM's name; several are called NAME-1, NAME-2 and so on.
    #[arg(long, short)]
    name: Option<String>,
    /// Use only hosts with this label, KEY=VALUE; can be given several times.
    #[arg(long = "on", value_name = "KEY=VALUE", value_parser = pair)]
    host_labels: Vec<(String, String)>,
    /// A label, KEY=VALUE; can be given several times.
    #[arg(long = "label", short, value_parser = pair)]
    labels: Vec<(String, String)>,
    /// An environment variable for commands, KEY=VALUE; can be given several times.
    #[arg(long = "env", short, value_parser = pair)]
    environment: Vec<(String, String)>,
    /// Destroy the VMs after this number of seconds.
    #[arg(long, value_name = "SECONDS")]
    ttl: Option<u64>,
    /// Pause a VM that was not used for this number of seconds; the next command resumes it.
    #[arg(long, value_name = "SECONDS", conflicts_with = "destroy_idle")]
    pause_idle: Option<u64>,
    /// Destroy a VM that was not used for this number of seconds.
    #[arg(long, value_name = "SECONDS")]
    destroy_idle: Option<u64>,
    /// The destinations that the VMs may send to: full, none, or IPv4 networks separated by commas,
    /// as in 10.0.0.0/8,192.0.2.7. The template's setting by default.
    #[arg(long, value_name = "WHOM")]
    egress: Option<String>,
    /// A request that is sent again with the same key is not executed again.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Do not wait for the VMs: show the operation that creates them (army operation wait).
    #[arg(long)]
    no_wait: bool,
}

/// `army vm ls`.
#[derive(clap::Args)]
pub(super) struct ListArgs {
    /// List only the VMs of this template.
    #[arg(long)]
    template: Option<String>,
    /// List only the VMs on this host.
    #[arg(long)]
    host: Option<String>,
    /// List only the VMs with this label, KEY=VALUE.
    #[arg(long, short)]
    label: Option<String>,
    /// List ended VMs, too.
    #[arg(long, short)]
    all: bool,
}

fn network(text: &str) -> NetworkPolicy {
    let egress = match text {
        "full" => Egress::Full,
        "none" => Egress::None,
        networks => Egress::Allow(networks.split(',').map(str::to_owned).collect()),
    };
    NetworkPolicy { egress }
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    let vm: Vm = match command {
        Command::Create(args) => {
            let idle = |after_s, action| IdlePolicy { after_s, action };
            let request = CreateVms {
                template: args.template,
                count: args.count,
                name: args.name,
                labels: args.labels.into_iter().collect::<BTreeMap<_, _>>(),
                host_labels: args.host_labels.into_iter().collect(),
                environment: args.environment.into_iter().collect(),
                ttl_s: args.ttl,
                idle: args
                    .pause_idle
                    .map(|after| idle(after, IdleAction::Pause))
                    .or(args
                        .destroy_idle
                        .map(|after| idle(after, IdleAction::Destroy))),
                network: args.egress.as_deref().map(network),
            };
            let key = args.idempotency_key.as_deref();
            if args.no_wait {
                return match client.begin("/v1/vms", &request, key, 0).await? {
                    Begun::Made(created) => created_vms(context, &created),
                    Begun::InProgress(operation) => {
                        operations::show(context, &operation)?;
                        Ok(ExitCode::SUCCESS)
                    }
                };
            }
            let created: CreatedVms = client.create("/v1/vms", &request, key).await?;
            return created_vms(context, &created);
        }
        Command::Fork { vm, count, name } => {
            let path = format!("/v1/vms/{}/fork", segment(&vm));
            let created: CreatedVms = client
                .send(Method::POST, &path, &ForkVm { count, name })
                .await?;
            return created_vms(context, &created);
        }
        Command::Ls(args) => {
            let mut filter = VmFilter {
                template: args.template,
                host: args.host,
                label: args.label,
                all: args.all,
                ..VmFilter::default()
            };
            let mut vms = Vec::new();
            loop {
                let page: VmPage = client.get("/v1/vms", &filter).await?;
                vms.extend(page.vms);
                filter.after = page.next;
                if filter.after.is_none() {
                    break;
                }
            }
            context.show(&vms, |vms| vms_table(vms))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Balloon { vm, size } => {
            let path = format!("/v1/vms/{}/balloon", segment(&vm));
            let balloon: Balloon = match size {
                Some(Bytes(bytes)) => {
                    client
                        .send(Method::PUT, &path, &SetBalloon { bytes })
                        .await?
                }
                None => client.get(&path, &()).await?,
            };
            context.show(&balloon, |it| {
                let held = bytes(it.actual_bytes);
                format!(
                    "holds {held} of the {} that it should",
                    bytes(it.target_bytes)
                )
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Snapshot { vm, template, diff } => {
            let path = format!("/v1/vms/{}/snapshot", segment(&vm));
            let request = SnapshotVm { template, diff };
            let template: Template = client.send(Method::POST, &path, &request).await?;
            context.show(&template, |it| templates_table(std::slice::from_ref(it)))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Rm { vms } => {
            for vm in vms {
                client
                    .plain(Method::DELETE, &format!("/v1/vms/{}", segment(&vm)))
                    .await?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Command::Inspect { vm } => {
            client
                .get(&format!("/v1/vms/{}", segment(&vm)), &())
                .await?
        }
        Command::Pause { vm } => {
            client
                .send(
                    Method::POST,
                    &format!("/v1/vms/{}/pause", segment(&vm)),
                    &(),
                )
                .await?
        }
        Command::Resume { vm } => {
            client
                .send(
                    Method::POST,
                    &format!("/v1/vms/{}/resume", segment(&vm)),
                    &(),
                )
                .await?
        }
    };
    context.show(&vm, |vm| vms_table(std::slice::from_ref(vm)))?;
    Ok(ExitCode::SUCCESS)
}

fn created_vms(context: &Context, created: &CreatedVms) -> Result<ExitCode> {
    context.show(created, |created| {
        let lines = created.vms.iter().map(|vm| {
            let times = vm.fork.unwrap_or_default();
            let from = if times.warm { "standby" } else { "start" };
            vec![
                vm.name.clone(),
                vm.id.clone(),
                vm.host.clone(),
                from.to_owned(),
                ms(times.running_us),
                ms(times.identity_us),
                ms(times.total_us),
            ]
        });
        let heads = ["VM", "ID", "HOST", "FROM", "RUNNING", "IDENTITY", "ALL"];
        table(&heads, lines.collect())
    })?;
    for vm in &created.vms {
        for notice in &vm.notices {
            note(&format!("{}: {notice}", vm.name));
        }
    }
    for failure in &created.failures {
        note(&format!("{}: {}", failure.name, failure.problem.detail));
    }
    Ok(match created.failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn vms_table(vms: &[Vm]) -> String {
    let lines = vms.iter().map(|vm| {
        let memory = vm.memory.unwrap_or_default();
        vec![
            vm.name.clone(),
            vm.id.clone(),
            vm.template.clone(),
            vm.host.clone(),
            word(&vm.state),
            bytes(memory.private_bytes),
            bytes(memory.shared_bytes),
            vm.reason.clone().unwrap_or_default(),
        ]
    });
    let heads = [
        "VM", "ID", "TEMPLATE", "HOST", "STATE", "OWN", "SHARED", "REASON",
    ];
    table(&heads, lines.collect())
}
