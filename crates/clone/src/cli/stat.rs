//! `clone stat`: shows a VM's configuration, state and resource usage.

use std::process::ExitCode;

use clone_api::Client;
use clone_api::control::{VmInfo, VmStats};
use clone_api::jail::JailStatus;
use clone_start::error::Result;
use serde::Serialize;

use super::Context;
use super::output::{control_error, human_bytes, table};

/// Show a VM's configuration, state and resource usage.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    name: String,
}

#[derive(Serialize)]
struct Stat {
    info: VmInfo,
    stats: VmStats,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let vm = context.runtime()?.find(&args.name)?;
    let client = Client::new(vm.dir.control_socket());
    let to_api_error = control_error(&args.name);
    let mut info = client.info().map_err(&to_api_error)?;
    // The process may see another id of itself inside its jail, so the host's is shown.
    info.pid = vm.process.pid;
    let stats = client.stats().map_err(&to_api_error)?;
    context.output.print(&Stat { info, stats }, text);
    Ok(ExitCode::SUCCESS)
}

/// A row for each layer that the jail lacks.
fn jail_rows(jail: &JailStatus) -> Vec<(&'static str, String)> {
    match jail.missing.as_slice() {
        [] => vec![("jail", "complete".to_owned())],
        missing => missing
            .iter()
            .map(|missing| ("jail lacks", missing.to_string()))
            .collect(),
    }
}

fn text(stat: &Stat) -> String {
    let Stat { info, stats } = stat;
    let config = &info.config;
    let seconds = |us: u64| format!("{:.2} s", us as f64 / 1e6);
    let mut rows = vec![
        ("name", info.name.clone()),
        ("state", format!("{:?}", info.state).to_lowercase()),
        ("pid", info.pid.to_string()),
        ("kernel", config.kernel.display().to_string()),
        ("vcpus", config.vcpus.to_string()),
        ("memory", human_bytes(stats.memory.guest_bytes)),
        ("resident", human_bytes(stats.memory.resident_bytes)),
        ("private", human_bytes(stats.memory.private_bytes)),
    ];
    if let Some(pages) = &stats.memory.guest {
        rows.push(("guest private", human_bytes(pages.private_bytes)));
        rows.push(("guest swapped", human_bytes(pages.swapped_bytes)));
        for (number, layer) in pages.layers.iter().enumerate() {
            let (shared, changed) = (layer.shared_bytes, layer.private_bytes);
            rows.push((
                "layer",
                format!(
                    "{number}: {} shared, {} changed",
                    human_bytes(shared),
                    human_bytes(changed)
                ),
            ));
        }
    }
    rows.extend([
        ("user time", seconds(stats.cpu.user_us)),
        ("system time", seconds(stats.cpu.system_us)),
    ]);
    for disk in &config.disks {
        rows.push(("disk", disk.path.display().to_string()));
    }
    rows.extend(jail_rows(&info.jail));
    if let Some(balloon) = &stats.balloon {
        let (actual, target) = (balloon.actual_bytes, balloon.target_bytes);
        rows.push((
            "balloon",
            format!("{} of {}", human_bytes(actual), human_bytes(target)),
        ));
    }
    for (device, counters) in &stats.devices {
        let text: Vec<String> = counters.iter().map(|(k, v)| format!("{k} {v}")).collect();
        rows.push((device, text.join(", ")));
    }
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(key, value)| vec![key.to_owned(), value])
        .collect();
    table(&rows)
}

#[cfg(test)]
mod tests {
    use clone_api::jail::{JailLayer, MissingLayer};

    use super::*;

    #[test]
    fn every_missing_layer_of_the_jail_is_shown_with_its_reason() {
        let mut jail = JailStatus::default();
        assert_eq!(jail_rows(&jail), [("jail", "complete".to_owned())]);
        for layer in [JailLayer::Cgroup, JailLayer::Landlock] {
            let reason = "this host has none".to_owned();
            jail.missing.push(MissingLayer { layer, reason });
        }
        let rows = jail_rows(&jail);
        assert_eq!(rows.len(), 2);
        assert_eq!(
            rows[1],
            ("jail lacks", "landlock: this host has none".to_owned())
        );
    }
}
