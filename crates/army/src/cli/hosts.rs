//! `army host`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use army_api::client::segment;
use army_api::hosts::{Capacity, ChangeHost, CreateJoinToken, Host, JoinToken};
use reqwest::Method;

use super::context::Context;
use super::moves::{self, EvacuateArgs};
use super::output::{bytes, pair, table, word};

/// Manage hosts.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List hosts.
    Ls,
    /// Place no new VMs on a host; its VMs keep running.
    Drain {
        /// The host.
        name: String,
    },
    /// Place VMs on a drained host again.
    Undrain {
        /// The host.
        name: String,
    },
    /// Move all VMs of a host to other hosts, and place no new ones on it.
    ///
    /// The VMs go on running; a few are moved at a time. `army host undrain` opens the host again.
    Evacuate(EvacuateArgs),
    /// Label a host with KEY=VALUE; KEY= removes a label. VMs can be restricted to labelled hosts.
    Label {
        /// The host.
        name: String,
        /// The labels.
        #[arg(required = true, value_parser = pair)]
        labels: Vec<(String, String)>,
    },
    /// Make a token with which one host can join (army node --token).
    Token {
        /// The number of minutes for which the token is valid.
        #[arg(long)]
        minutes: Option<u32>,
    },
    /// Remove a host that has no VMs, or that does not answer.
    Rm {
        /// The host.
        name: String,
    },
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    let (name, what) = match command {
        Command::Ls => {
            let hosts: Vec<Host> = client.get("/v1/hosts", &()).await?;
            context.show(&hosts, |hosts| hosts_table(hosts))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Token { minutes } => {
            let request = CreateJoinToken { minutes };
            let made: JoinToken = client
                .send(Method::POST, "/v1/join-tokens", &request)
                .await?;
            context.show(&made, |it| it.token.clone())?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Label { name, labels } => {
            let labels = labels.into_iter();
            let request = ChangeHost {
                labels: labels
                    .map(|(key, value)| (key, (!value.is_empty()).then_some(value)))
                    .collect(),
            };
            let path = format!("/v1/hosts/{}", segment(&name));
            let host: Host = client.send(Method::PATCH, &path, &request).await?;
            context.show(&host, |host| hosts_table(std::slice::from_ref(host)))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Rm { name } => {
            client
                .plain(Method::DELETE, &format!("/v1/hosts/{}", segment(&name)))
                .await?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Evacuate(args) => {
            if let Some(host) = moves::evacuate(context, args).await? {
                context.show(&host, |host| hosts_table(std::slice::from_ref(host)))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Command::Drain { name } => (name, "drain"),
        Command::Undrain { name } => (name, "undrain"),
    };
    let path = format!("/v1/hosts/{}/{}", segment(&name), what);
    let host: Host = client.send(Method::POST, &path, &()).await?;
    context.show(&host, |host| hosts_table(std::slice::from_ref(host)))?;
    Ok(ExitCode::SUCCESS)
}

fn hosts_table(hosts: &[Host]) -> String {
    let lines = hosts.iter().map(|host| {
        // Users do not see these.
        let size = |value: fn(&Capacity) -> u64| match &host.capacity {
            Some(capacity) => bytes(value(capacity)),
            None => "-".to_owned(),
        };
        vec![
            host.name.clone(),
            word(&host.state),
            host.vms.map_or("-".to_owned(), |vms| vms.to_string()),
            size(|it| it.memory_bytes),
            size(|it| it.available_bytes),
            size(|it| it.private_bytes),
            size(|it| it.promised_bytes),
            labels(&host.labels),
        ]
    });
    let heads = [
        "HOST",
        "STATE",
        "VMS",
        "MEMORY",
        "AVAILABLE",
        "USED BY VMS",
        "PROMISED",
        "LABELS",
    ];
    let mut text = table(&heads, lines.collect());
    for host in hosts {
        for notice in &host.notices {
            text += &format!("warning: {}: {notice}\n", host.name);
        }
        for missing in &host.missing_jail_layers {
            let (name, layer, reason) = (&host.name, &missing.layer, &missing.reason);
            text +=
                &format!("warning: the jail of VMs on {name} lacks a layer: {layer}: {reason}\n");
        }
    }
    text
}

fn labels(labels: &BTreeMap<String, String>) -> String {
    let labels: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    labels.join(",")
}
