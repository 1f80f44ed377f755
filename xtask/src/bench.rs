//! Benchmarks: builds what is measured, runs the measuring program (`crates/bench`) where guests
//! run, and has it make a report. What is measured, and how, is that crate's.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::process::{cargo, output, run as run_command};
use crate::testbed::{self, Size, Testbed};
use crate::{guest, host, kvm, paths, static_program};

/// How `clone` and the measuring program are built: optimised as a release, quicker to build.
const PROFILE: &str = "measure";

/// Benches that need no guests, and run here.
const WITHOUT_GUESTS: [&str; 3] = ["list", "place", "fleet"];

#[derive(Args)]
pub(crate) struct Options {
    /// The benches; all where none is named. `--list` tells them.
    names: Vec<String>,
    /// Print the benches and end.
    #[arg(long)]
    list: bool,
    /// Take fewer samples: all benches in some minutes.
    #[arg(long)]
    quick: bool,
    /// Start so many machines of each kind, in benches that start many.
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// Compare with another VMM too: firecracker=PATH or cloud-hypervisor=PATH of its binary.
    #[arg(long = "peer", value_name = "NAME=PATH")]
    peers: Vec<String>,
    /// Use the testbed even where hardware KVM would do.
    #[arg(long)]
    testbed: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    host::install_packages()?;
    let needs_guests = options.names.is_empty()
        || options
            .names
            .iter()
            .any(|name| !WITHOUT_GUESTS.contains(&name.as_str()));
    let mut built = vec![
        "build",
        "--quiet",
        "--profile",
        PROFILE,
        "-p",
        "clone-bench",
    ];
    if needs_guests {
        built.extend(["-p", "clone"]);
    }
    let build = || run_command(&mut cargo(&built)).context("cannot build what is measured");
    if options.list {
        build()?;
        run_command(Command::new(binary("clone-bench")).arg("list"))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("building what is measured, and the measuring programs (profile {PROFILE})");
    build()?;
    gather(needs_guests)?;
    if needs_guests {
        guest::build()?;
    }
    let names = match options.names.is_empty() {
        true => all_names()?,
        false => options.names.clone(),
    };
    let words = words(options, needs_guests)?;
    std::env::set_current_dir(paths::workspace())?;
    let verdict = kvm::probe();
    println!("{verdict}");
    let on_hardware = verdict.runs_stock_guests() && !options.testbed;
    let mut failed = Vec::new();
    // One for all: starting one, and copying to its memory what is measured, takes a minute.
    let mut testbed = None;
    for name in &names {
        let start = Instant::now();
        let without_guests = WITHOUT_GUESTS.contains(&name.as_str());
        let kvm = match (without_guests, on_hardware) {
            (true, _) => "none: no guests take part",
            (_, true) => "hardware KVM",
            (_, false) => "testbed: nested KVM on a CPU that QEMU emulates; compare ratios only",
        };
        let mut words = words.clone();
        words.extend(["--kvm".into(), kvm.into(), name.into()]);
        let ended = match on_hardware || without_guests {
            true => here(&words)?,
            false => {
                words.push("--stage".into());
                let testbed = match &testbed {
                    Some(testbed) => testbed,
                    None => testbed.insert(Testbed::find_or_start(&Size::default())?),
                };
                testbed::execute(testbed, &words)?
            }
        };
        println!("== {name}: {} s", start.elapsed().as_secs());
        if ended != ExitCode::SUCCESS {
            failed.push(name.as_str());
            // Who knows what is left in it.
            testbed = None;
        }
    }
    let report = output(
        Command::new(binary("clone-bench"))
            .arg("report")
            .arg(folder()),
    )?;
    println!("report: {}", report.trim());
    if !failed.is_empty() {
        bail!("these benches failed: {}", failed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

/// The command that measures, but for the bench.
fn words(options: &Options, needs_guests: bool) -> Result<Vec<OsString>> {
    let mut words: Vec<OsString> = vec![gathered("clone-bench").into(), "run".into()];
    let mut add = |flag: &str, path: &Path| {
        words.extend([flag.into(), path.into()]);
    };
    if needs_guests {
        add("--clone", &gathered("clone"));
        add(
            "--guest-program",
            &static_program::for_guests("bench-guest")?,
        );
        add("--assets", &paths::assets());
        add("--qemu", &testbed::qemu_root()?);
    }
    add("--out", &folder());
    for peer in &options.peers {
        let (name, path) = peer
            .split_once('=')
            .with_context(|| format!("--peer {peer}: NAME=PATH is wanted"))?;
        let path = std::path::absolute(path)?;
        anyhow::ensure!(path.is_file(), "--peer {peer}: there is no such file");
        words.push("--peer".into());
        words.push(format!("{name}={}", path.display()).into());
    }
    if options.quick {
        words.push("--quick".into());
    }
    if let Some(runs) = options.runs {
        words.push(format!("--runs={runs}").into());
    }
    Ok(words)
}

fn here(words: &[OsString]) -> Result<ExitCode> {
    let status = Command::new(&words[0])
        .args(&words[1..])
        .status()
        .context("cannot start the measuring program")?;
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

fn all_names() -> Result<Vec<String>> {
    let list = output(Command::new(binary("clone-bench")).arg("list"))?;
    let names = list
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

/// Puts what is measured together as packages have it: with a static program for VMs' processes,
/// where benches need guests.
fn gather(needs_guests: bool) -> Result<()> {
    let mut programs = vec![binary("clone-bench")];
    if needs_guests {
        programs.extend([binary("clone"), static_program::vm_process(PROFILE)?]);
    }
    for program in programs {
        let copy = gathered(&program.file_name().unwrap_or_default().to_string_lossy());
        std::fs::create_dir_all(copy.parent().unwrap_or(&copy))?;
        // It may be running still; and a testbed that is up would see the old one's size.
        let _ = std::fs::remove_file(&copy);
        std::fs::copy(&program, &copy)
            .with_context(|| format!("cannot copy {}", program.display()))?;
    }
    Ok(())
}

fn gathered(name: &str) -> PathBuf {
    paths::target().join("measured").join(name)
}

fn binary(name: &str) -> PathBuf {
    paths::target().join(PROFILE).join(name)
}

/// Where results go.
fn folder() -> PathBuf {
    paths::target().join("bench")
}
