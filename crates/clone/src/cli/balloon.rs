//! `clone balloon`: shows a VM's balloon, or sets it.

use std::process::ExitCode;
use std::time::Duration;

use clone_api::control::BalloonStatus;
use clone_api::{Bytes, Client};
use clone_start::error::Result;

use super::Context;
use super::output::{control_error, human_bytes};

/// The time that a guest usually takes to answer.
const GUEST_TIME: Duration = Duration::from_millis(50);

/// Show how much of a VM's memory its balloon holds, or set its target size.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    name: String,
    /// How much memory the balloon should take from the guest, as in 128M; 0 returns all of it.
    size: Option<Bytes>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let vm = context.runtime()?.find(&args.name)?;
    let client = Client::new(vm.dir.control_socket());
    let status = match args.size {
        Some(size) => client.set_balloon(size),
        // The first call requests new statistics from the guest, the second returns them. If the
        // driver has not answered yet, it returns the previous ones.
        None => client.balloon().and_then(|_| {
            std::thread::sleep(GUEST_TIME);
            client.balloon()
        }),
    };
    let status = status.map_err(control_error(&args.name))?;
    context.output.print(&status, text);
    Ok(ExitCode::SUCCESS)
}

fn text(status: &BalloonStatus) -> String {
    let mut text = format!(
        "holds {} of the {} that it should",
        human_bytes(status.actual_bytes),
        human_bytes(status.target_bytes)
    );
    let guest = status.guest.unwrap_or_default();
    for (what, bytes) in [
        ("total", guest.total_bytes),
        ("free", guest.free_bytes),
        ("available", guest.available_bytes),
        ("caches", guest.disk_caches_bytes),
    ] {
        if let Some(bytes) = bytes {
            text += &format!("\nguest {what}: {}", human_bytes(bytes));
        }
    }
    text
}
