//! Fuzzing on a stable compiler: builds the targets of `fuzz/` with coverage counters and runs
//! them, one after the other. What they try is theirs; what was interesting stays in
//! `target/fuzz/corpus`, for the next run.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::paths;
use crate::process::{cargo, run as run_command};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What tells libFuzzer where an input went. A sanitizer for memory errors needs a nightly
/// compiler (`cargo fuzz` uses it); without one, panics, overflows, hangs and memory are watched.
const FLAGS: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
                     -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// One input may take so long (seconds) and the whole process so much memory (MiB).
const LIMITS: [&str; 3] = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=16384"];

#[derive(Args)]
pub(crate) struct Options {
    /// The targets; all where none is named.
    targets: Vec<String>,
    /// How long each runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Print the targets and end.
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let all = targets()?;
    if options.list {
        println!("{}", all.join("\n"));
        return Ok(ExitCode::SUCCESS);
    }
    for name in &options.targets {
        anyhow::ensure!(
            all.contains(name),
            "there is no fuzz target {name:?}; there are {}",
            all.join(", ")
        );
    }
    let chosen = match options.targets.is_empty() {
        true => &all,
        false => &options.targets,
    };
    build(chosen)?;
    let mut failed = Vec::new();
    for name in chosen {
        println!("== {name}: {} s", options.seconds);
        if !fuzz(name, options.seconds)? {
            failed.push(name.as_str());
        }
    }
    if !failed.is_empty() {
        let inputs = folder().join("artifacts");
        bail!("found by {}: see {}", failed.join(", "), inputs.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The names of all targets, from their files.
fn targets() -> Result<Vec<String>> {
    let sources = paths::workspace().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&sources);
    let entries = entries.with_context(|| format!("cannot read {}", sources.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if let Some(name) = path.file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn folder() -> PathBuf {
    paths::target().join("fuzz")
}

fn build(names: &[String]) -> Result<()> {
    println!("building {} (some minutes at first)", names.join(", "));
    let manifest = paths::workspace().join("fuzz/Cargo.toml");
    let mut build = cargo(&["build", "--quiet", "--release", "--target", TARGET]);
    build.arg("--manifest-path").arg(manifest);
    build.arg("--target-dir").arg(folder());
    for name in names {
        build.args(["--bin", name]);
    }
    run_command(build.env("RUSTFLAGS", FLAGS)).context("cannot build the fuzz targets")
}

/// Runs a target; false where it found something.
fn fuzz(name: &str, seconds: u32) -> Result<bool> {
    let corpus = folder().join("corpus").join(name);
    let artifacts = folder().join("artifacts").join(name);
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let seeds = paths::workspace().join("fuzz/seeds").join(name);
    let mut command = Command::new(folder().join(TARGET).join("release").join(name));
    command
        .args(LIMITS)
        .args(["-print_final_stats=1", "-verbosity=0"])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(&corpus);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    let status = command.status().context("cannot start a fuzz target")?;
    Ok(status.success())
}
