//! `army events`.

use std::process::ExitCode;

use anyhow::Result;
use army_api::events::Event;
use futures_util::StreamExt;

use super::context::Context;

/// `army events`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Begin after the event with this id; 0 begins with the oldest one that is kept.
    #[arg(long)]
    after: Option<i64>,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let events = context.client()?.events(args.after).await?;
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        let event: Event = event?;
        let line = |event: &Event| {
            format!(
                "{} {} {} {} {}",
                event.id, event.time_ms, event.kind, event.subject, event.detail
            )
        };
        context.show(&event, line)?;
    }
    anyhow::bail!("the server went away")
}
