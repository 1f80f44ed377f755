//! `clone fork`: makes clones of a template, or of a VM that continues to run.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clone_api::control::SnapshotTimes;
use clone_api::{ApiError, ErrorCode};
use clone_host::launch::fork::{self, Forked, Overrides, Source};
use clone_start::error::Result;
use clone_template::Store;
use serde::Serialize;

use super::args::{JailArgs, NetArg, ShareArg, fork_share_parser, net_parser};
use super::output::table;
use super::{Context, exit};

/// Make clones of a template, or of a running VM.
///
/// Each clone resumes where the template was taken, with its own name, addresses, machine id, keys
/// and random numbers. Its disk writes are removed with it unless --disk keeps them in a file.
/// Clones are taken from the standbys of `clone template serve`, where there are any.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The template: a name in the store, or a path with a `/`.
    #[arg(required_unless_present = "from", conflicts_with = "from")]
    template: Option<String>,
    /// Fork this running VM; both continue, each with its own memory and disks from this instant.
    #[arg(long, value_name = "VM")]
    from: Option<String>,
    /// The number of clones.
    #[arg(long, short, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// The clone's name; several are called NAME-1, NAME-2 and so on.
    #[arg(long, short)]
    name: Option<String>,
    /// The network of an interface, as for `clone run`; give it once for each interface of the
    /// template. By default all are `nat`, and those of a live fork are connected as the VM's are.
    /// The template's own limits apply in any case.
    #[arg(long = "net", value_name = "NET", value_parser = net_parser())]
    nets: Vec<NetArg>,
    /// Keep a clone's writes to a disk in a file: N=FILE, where N is the disk's index (0 is vda).
    #[arg(long = "disk", value_name = "N=FILE", value_parser = kept_disk_parser())]
    disks: Vec<KeptDisk>,
    /// The directory of a share, which each clone gets for itself: TAG=PATH[,ro][,owner=USER[.GROUP]].
    /// Those of a template must all be given; those of a live fork are the VM's by default.
    #[arg(long = "share", value_name = "TAG=PATH", value_parser = fork_share_parser())]
    shares: Vec<ShareArg>,
    /// Do not give the clones an identity: they keep the template's host name, addresses and clock
    /// until these are changed in the guest.
    #[arg(long)]
    no_identity: bool,
    #[command(flatten)]
    jail: JailArgs,
}

/// `--disk`.
#[derive(Debug, Clone)]
struct KeptDisk(usize, PathBuf);

impl KeptDisk {
    /// Parses N=FILE; FILE is everything after the first `=`.
    fn parse(text: &OsStr) -> std::result::Result<Self, String> {
        let bytes = text.as_bytes();
        let equals = bytes.iter().position(|&byte| byte == b'=');
        let equals = equals.ok_or("write it as N=FILE")?;
        let place = String::from_utf8_lossy(&bytes[..equals]);
        let place = place
            .parse()
            .map_err(|_| format!("`{place}` is no number"))?;
        let file = OsStr::from_bytes(&bytes[equals + 1..]);
        let file = std::path::absolute(file).map_err(|error| error.to_string())?;
        match file.to_str() {
            Some(_) => Ok(Self(place, file)),
            None => Err(format!("{file:?} is not UTF-8: choose another name")),
        }
    }
}

fn kept_disk_parser() -> impl TypedValueParser<Value = KeptDisk> {
    OsStringValueParser::new().try_map(|text| KeptDisk::parse(&text))
}

/// The output of `clone fork --json`.
#[derive(Serialize)]
struct Report {
    clones: Vec<Outcome>,
    /// The times of the snapshot that a live fork takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotTimes>,
}

/// The result for one clone: the running clone, or an error.
#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Runs(Forked),
    Failed { name: String, error: ApiError },
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let runtime = context.runtime()?.requiring(args.jail.required());
    if args.count > 1 && !args.disks.is_empty() {
        let message = "--disk keeps the writes of one clone, and several were asked for";
        return Err(ApiError::new(ErrorCode::InvalidConfig, message));
    }
    let overrides = Overrides {
        net: (!args.nets.is_empty())
            .then(|| args.nets.iter().map(|net| net.config().clone()).collect()),
        overlays: args.disks.iter().map(|d| (d.0, d.1.clone())).collect(),
        shares: args.shares.iter().map(|it| it.config().clone()).collect(),
        egress: None,
        reach_host: None,
        host_names: Vec::new(),
    };
    let (source, of, snapshot) = match (&args.from, &args.template) {
        (Some(vm), _) => {
            let vm = runtime.find(vm)?;
            let (source, taken) = Source::live(&runtime, &vm)?;
            (source, vm.dir.name(), Some(taken.times))
        }
        (None, template) => {
            let name = template.as_deref().unwrap_or_default();
            let template = Store::from_env()?.open(name)?;
            let of = template.dir().file_name().unwrap_or_default();
            let of = of.to_string_lossy().into_owned();
            (Source::template(&template, &runtime)?, of, None)
        }
    };
    let names = fork::names(args.name.as_deref(), &of, args.count as usize)?;
    let results = fork::fork(&runtime, &source, &names, &overrides, !args.no_identity);
    let clones = names.into_iter().zip(results);
    let clones = clones.map(|(name, result)| match result {
        Ok(forked) => Outcome::Runs(forked),
        Err(error) => Outcome::Failed { name, error },
    });
    let report = Report {
        clones: clones.collect(),
        snapshot,
    };
    finish(context, &report)
}

fn finish(context: &Context, report: &Report) -> Result<ExitCode> {
    let mut failures = 0;
    for outcome in &report.clones {
        match outcome {
            Outcome::Failed { name, error } => {
                failures += 1;
                // A single failed fork is reported as a failed command, with its exit code.
                if report.clones.len() == 1 {
                    return Err(error.clone());
                }
                context
                    .output
                    .note(&format!("clone: {name}: {}", error.message));
            }
            Outcome::Runs(forked) => {
                for notice in &forked.notices {
                    context
                        .output
                        .note(&format!("[clone: {}: {notice}]", forked.name));
                }
            }
        }
    }
    context.output.print(report, text);
    Ok(match failures {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(exit::FAILURE),
    })
}

fn text(report: &Report) -> String {
    let cells = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
    let mut lines = vec![cells(["NAME", "FROM", "RUNNING", "IDENTITY"])];
    let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
    for outcome in &report.clones {
        if let Outcome::Runs(forked) = outcome {
            let identity = forked.identity_us.map_or("-".to_owned(), ms);
            let from = if forked.warm { "standby" } else { "start" };
            lines.push(cells([
                &forked.name,
                from,
                &ms(forked.running_us),
                &identity,
            ]));
        }
    }
    let mut text = table(&lines);
    if let Some(times) = report.snapshot {
        text += &format!("the VM was paused for {}\n", ms(times.pause_us));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_are_part_of_a_fork_s_result() {
        let forked = |notices| {
            Outcome::Runs(Forked {
                name: "c".into(),
                pid: 7,
                warm: true,
                running_us: 1,
                identity_us: None,
                notices,
            })
        };
        let report = |notices| Report {
            clones: vec![forked(notices)],
            snapshot: None,
        };
        let json = serde_json::to_value(report(vec!["no disk".into()])).unwrap();
        assert_eq!(json["clones"][0]["notices"][0], "no disk");
        let json = serde_json::to_value(report(Vec::new())).unwrap();
        assert!(json["clones"][0].get("notices").is_none());
    }
}
