//! `army webhook`.

use std::process::ExitCode;

use agent_proto::text::printable;
use anyhow::Result;
use army_api::client::segment;
use army_api::webhooks::{CreateWebhook, NewWebhook, Webhook};
use reqwest::Method;

use super::context::Context;
use super::output::table;

/// Manage webhooks.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List webhooks.
    Ls,
    /// Send events from now on to a URL. The secret that they are signed with is shown once.
    Create {
        /// The URL.
        url: String,
        /// A kind of events, as in vm.running or vm.*; can be given several times. All by default.
        #[arg(long = "event", short)]
        events: Vec<String>,
    },
    /// Remove a webhook.
    Rm {
        /// The webhook's id.
        id: String,
    },
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    match command {
        Command::Ls => {
            let webhooks: Vec<Webhook> = client.get("/v1/webhooks", &()).await?;
            context.show(&webhooks, |webhooks| webhooks_table(webhooks))?;
        }
        Command::Create { url, events } => {
            let request = CreateWebhook {
                url,
                events,
                secret: None,
            };
            let path = "/v1/webhooks";
            let created: NewWebhook = client.send(Method::POST, path, &request).await?;
            context.show(&created, |it| it.secret.clone())?;
        }
        Command::Rm { id } => {
            let path = format!("/v1/webhooks/{}", segment(&id));
            client.plain(Method::DELETE, &path).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn webhooks_table(webhooks: &[Webhook]) -> String {
    let lines = webhooks.iter().map(|it| {
        let state = match (it.disabled, it.failures) {
            (true, _) => "disabled".to_owned(),
            (false, 0) => "works".to_owned(),
            (false, failures) => format!("failed {failures} times"),
        };
        vec![
            it.id.clone(),
            it.tenant.clone(),
            state,
            it.events.join(","),
            printable(&it.url),
            it.error.as_deref().map(printable).unwrap_or_default(),
        ]
    });
    let heads = ["ID", "TENANT", "STATE", "EVENTS", "URL", "ERROR"];
    table(&heads, lines.collect())
}
