//! `army vm`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use agent_proto::text::printable;
use anyhow::Result;
use army_api::changes::ChangeVm;
use army_api::client::{Begun, segment};
use army_api::figures::{ConsolePart, VmFigures};
use army_api::templates::Template;
use army_api::vms::{
    Balloon, CreateVms, CreatedVms, Egress, ForkVm, IdleAction, IdlePolicy, NetworkPolicy,
    SetBalloon, SnapshotVm, Vm, VmFilter, VmPage, VmState,
};
use clone_api::Bytes;
use futures_util::StreamExt;
use reqwest::Method;

use super::checkpoints::{self, CheckpointArgs, RewindArgs};
use super::context::Context;
use super::moves::{self, MigrateArgs};
use super::operations;
use super::output::{bytes, ms, note, pair, print, table, word};
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
    /// Move a VM to another host while it runs.
    ///
    /// Its guest is paused for an instant only. Commands go on; terminals, forwarded ports and the
    /// guest's own connections through its host's network end.
    Migrate(MigrateArgs),
    /// Stop a VM's CPUs.
    Pause {
        /// The VM.
        vm: String,
    },
    /// Suspend a VM: keep its state on disk, so that it uses no memory.
    ///
    /// The next command, terminal, file or forwarded port wakes it, as `army vm resume` does.
    Suspend {
        /// The VM.
        vm: String,
    },
    /// Resume a paused or suspended VM.
    Resume {
        /// The VM.
        vm: String,
    },
    /// Take a checkpoint of a VM, list its checkpoints, or remove one.
    ///
    /// A checkpoint is a state of the VM that `army vm rewind` sets it back to: memory, CPUs, devices
    /// and disks. Checkpoints exist as long as the VM runs.
    Checkpoint(CheckpointArgs),
    /// Set a VM back to one of its checkpoints.
    ///
    /// What has happened since is lost. Commands and terminals of the VM end.
    Rewind(RewindArgs),
    /// Change a VM's time to live, idle policy, network policy or labels.
    Set(SetArgs),
    /// Show a VM's balloon, or set its target size.
    Balloon {
        /// The VM.
        vm: String,
        /// How much of the guest's memory the balloon should hold, as in 128M.
        size: Option<Bytes>,
    },
    /// Show a VM's addresses, processor time, traffic and memory.
    Figures {
        /// The VM.
        vm: String,
    },
    /// Print the end of what a VM's guest has written to its serial console.
    Console {
        /// The VM.
        vm: String,
        /// The number of bytes, at most 262144.
        #[arg(long)]
        bytes: Option<u32>,
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
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["suspend_idle", "destroy_idle"])]
    pause_idle: Option<u64>,
    /// Suspend a VM that was not used for this number of seconds; the next command wakes it.
    #[arg(long, value_name = "SECONDS", conflicts_with = "destroy_idle")]
    suspend_idle: Option<u64>,
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

/// `army vm set`.
#[derive(clap::Args)]
pub(super) struct SetArgs {
    /// The VM.
    vm: String,
    /// Destroy the VM after this number of seconds from now on.
    #[arg(long, value_name = "SECONDS", conflicts_with = "no_ttl")]
    ttl: Option<u64>,
    /// Remove the limit of the VM's lifetime.
    #[arg(long)]
    no_ttl: bool,
    /// Pause the VM when it was not used for this number of seconds; the next command resumes it.
    #[arg(long, value_name = "SECONDS",
        conflicts_with_all = ["suspend_idle", "destroy_idle", "no_idle"])]
    pause_idle: Option<u64>,
    /// Suspend the VM when it was not used for this number of seconds; the next command wakes it.
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["destroy_idle", "no_idle"])]
    suspend_idle: Option<u64>,
    /// Destroy the VM when it was not used for this number of seconds.
    #[arg(long, value_name = "SECONDS", conflicts_with = "no_idle")]
    destroy_idle: Option<u64>,
    /// Do nothing when the VM is not used.
    #[arg(long)]
    no_idle: bool,
    /// The destinations that the VM may send to: full, none, or IPv4 networks separated by commas.
    #[arg(long, value_name = "WHOM")]
    egress: Option<String>,
    /// A label, KEY=VALUE, where KEY= removes one; can be given several times.
    #[arg(long = "label", short, value_parser = pair)]
    labels: Vec<(String, String)>,
}

impl From<SetArgs> for ChangeVm {
    fn from(args: SetArgs) -> Self {
        let labels = args.labels.into_iter();
        let labels = labels.map(|(key, value)| (key, (!value.is_empty()).then_some(value)));
        Self {
            ttl_s: args.ttl.map(Some).or(args.no_ttl.then_some(None)),
            idle: idle(args.pause_idle, args.suspend_idle, args.destroy_idle)
                .map(Some)
                .or(args.no_idle.then_some(None)),
            network: args.egress.as_deref().map(network),
            labels: labels.collect(),
        }
    }
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
    /// List only the VMs with this label, KEY=VALUE or KEY; can be given several times.
    #[arg(long, short)]
    label: Vec<String>,
    /// List only the VMs in this state, as in running; can be given several times.
    #[arg(long, value_parser = state)]
    state: Vec<VmState>,
    /// List ended VMs, too.
    #[arg(long, short)]
    all: bool,
}

fn state(text: &str) -> std::result::Result<VmState, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

fn idle(pause: Option<u64>, suspend: Option<u64>, destroy: Option<u64>) -> Option<IdlePolicy> {
    let policy = |action| move |after_s| IdlePolicy { after_s, action };
    let pause = pause.map(policy(IdleAction::Pause));
    let suspend = suspend.map(policy(IdleAction::Suspend));
    pause
        .or(suspend)
        .or(destroy.map(policy(IdleAction::Destroy)))
}

pub(super) fn network(text: &str) -> NetworkPolicy {
    let egress = match text {
        "full" => Egress::Full,
        "none" => Egress::None,
        networks => Egress::Allow(networks.split(',').map(str::to_owned).collect()),
    };
    let host = false;
    NetworkPolicy { egress, host }
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    let vm: Vm = match command {
        Command::Create(args) => {
            let request = CreateVms {
                template: args.template,
                count: args.count,
                name: args.name,
                labels: args.labels.into_iter().collect::<BTreeMap<_, _>>(),
                host_labels: args.host_labels.into_iter().collect(),
                environment: args.environment.into_iter().collect(),
                ttl_s: args.ttl,
                idle: idle(args.pause_idle, args.suspend_idle, args.destroy_idle),
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
                state: args.state,
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
        Command::Checkpoint(args) => return checkpoints::checkpoint(context, args).await,
        Command::Migrate(args) => return moves::migrate(context, args).await,
        Command::Rewind(args) => return checkpoints::rewind(context, args).await,
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
        Command::Figures { vm } => {
            let path = format!("/v1/vms/{}/figures", segment(&vm));
            let figures: VmFigures = client.get(&path, &()).await?;
            context.show(&figures, figures_table)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Console { vm, bytes } => {
            let path = format!("/v1/vms/{}/console", segment(&vm));
            let mut pieces = Box::pin(client.bytes(&path, &ConsolePart { bytes }).await?);
            let mut text = Vec::new();
            while let Some(piece) = pieces.next().await {
                text.extend(piece?);
            }
            // A guest's control characters are not this terminal's.
            let text = String::from_utf8_lossy(&text);
            for line in text.lines() {
                print(&printable(line));
            }
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
        Command::Set(args) => {
            let path = format!("/v1/vms/{}", segment(&args.vm));
            let request = ChangeVm::from(args);
            client.send(Method::PATCH, &path, &request).await?
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
        Command::Suspend { vm } => {
            client
                .send(
                    Method::POST,
                    &format!("/v1/vms/{}/suspend", segment(&vm)),
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

fn figures_table(figures: &VmFigures) -> String {
    let seconds = |us: u64| format!("{:.1} s", us as f64 / 1e6);
    let traffic = |one: u64, other: u64| format!("{} / {}", bytes(one), bytes(other));
    let heads = [
        "ADDRESS",
        "CPU",
        "SYSTEM",
        "DISK READ/WRITTEN",
        "NET IN/OUT",
        "OWN",
        "SHARED",
    ];
    let line = vec![
        figures.addresses.join(","),
        seconds(figures.cpu_user_us),
        seconds(figures.cpu_system_us),
        traffic(figures.disk_read_bytes, figures.disk_written_bytes),
        traffic(figures.network_received_bytes, figures.network_sent_bytes),
        bytes(figures.memory.private_bytes),
        bytes(figures.memory.shared_bytes),
    ];
    table(&heads, vec![line])
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
