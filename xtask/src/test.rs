//! All tests, in the order in which they fail fastest: format, lints, licences, unit and
//! documentation tests here, then the guest tests where stock guests run.
//!
//! A guest test is an ordinary `#[test]` in an integration-test binary whose name starts with
//! `guest`. It is built here; with hardware KVM it also runs here, else in the testbed.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::process::{cargo, output, run as run_command};
use crate::testbed::{self, Size, Testbed};
use crate::{guest, host, kvm, paths};

/// Where guest tests find kernels and file systems.
const ASSETS_VARIABLE: &str = "CLONE_TEST_ASSETS";
/// How often a testbed may die before the tests are given up.
const TESTBED_ATTEMPTS: u32 = 6;
const GUEST_TESTS: &str = "binary(/^guest/)";

#[derive(Args)]
pub(crate) struct Options {
    /// Only what needs no guest: format, lints, licences, unit and documentation tests.
    #[arg(long, conflicts_with = "guest")]
    unit: bool,
    /// Only the guest tests, or those of them whose name holds FILTER, or whose binary's begins
    /// with it (`guest_fork`).
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    guest: Option<String>,
    /// Use the testbed even where hardware KVM would do.
    #[arg(long)]
    testbed: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    host::setup()?;
    if options.guest.is_none() {
        step("format", || {
            run_command(&mut cargo(&["fmt", "--all", "--check"]))
        })?;
        step("lints", || {
            let lints = [
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ];
            run_command(&mut cargo(&lints))
        })?;
        step("licences and sources", || {
            // Advisories need a database from the network; bans, licences and sources do not.
            let checks = [
                "deny",
                "--log-level",
                "error",
                "check",
                "bans",
                "licenses",
                "sources",
            ];
            run_command(&mut cargo(&checks))
        })?;
        step("unit tests", || {
            let filter = format!("not {GUEST_TESTS}");
            let tests = [
                "nextest",
                "run",
                "--workspace",
                "--no-fail-fast",
                "-E",
                &filter,
            ];
            run_command(&mut cargo(&tests))
        })?;
        step("documentation tests", || {
            run_command(&mut cargo(&["test", "--quiet", "--workspace", "--doc"]))
        })?;
    }
    if options.unit {
        return Ok(ExitCode::SUCCESS);
    }
    step("guest assets", || guest::build().map(drop))?;
    guest_tests(options)
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("== {name}");
    let start = Instant::now();
    work().with_context(|| format!("{name} failed"))?;
    println!("== {name}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn guest_tests(options: &Options) -> Result<ExitCode> {
    println!("== guest tests");
    run_command(&mut cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
    let list = [
        "nextest",
        "list",
        "--workspace",
        "--list-type",
        "binaries-only",
        "--message-format",
        "json",
    ];
    let list = output(&mut cargo(&list)).context("cannot build the guest tests")?;
    let metadata = output(&mut cargo(&["metadata", "--format-version", "1"]))?;
    let folder = paths::target().join("guest-tests");
    fs::create_dir_all(&folder)?;
    let (list_file, metadata_file) = (folder.join("binaries.json"), folder.join("cargo.json"));
    let binaries = guest_binaries(&list)?;
    fs::write(&list_file, list)?;
    fs::write(&metadata_file, metadata)?;
    let nextest = |filter: &str| -> Result<Vec<OsString>> {
        let assets = paths::assets().canonicalize()?;
        let mut words: Vec<OsString> = vec!["env".into()];
        words.push(format!("{ASSETS_VARIABLE}={}", assets.display()).into());
        words.extend(["cargo-nextest", "nextest", "run", "--profile", "guest"].map(Into::into));
        words.extend(["--no-fail-fast", "--binaries-metadata"].map(Into::into));
        words.push(list_file.as_os_str().into());
        words.push("--cargo-metadata".into());
        words.push(metadata_file.as_os_str().into());
        words.extend(["-E".into(), filter.into()]);
        Ok(words)
    };
    let wanted = options.guest.as_deref().unwrap_or_default();
    let verdict = kvm::probe();
    println!("{verdict}");
    std::env::set_current_dir(paths::workspace())?;
    if !wanted.is_empty() && !wanted.starts_with("guest") {
        // No test at all is a failure: nextest ends with a status of its own then.
        let words = nextest(&format!("{GUEST_TESTS} & test({wanted})"))?;
        return match verdict.runs_stock_guests() && !options.testbed {
            true => here(&words),
            false => {
                let files: Vec<PathBuf> = binaries.into_iter().map(|(_, path)| path).collect();
                in_testbed(&testbed::in_memory(&in_guests(files)?, &words)?)
            }
        };
    }
    if verdict.runs_stock_guests() && !options.testbed {
        return here(&nextest(&format!("binary(/^{wanted}/) & {GUEST_TESTS}"))?);
    }
    // One binary after the other: a testbed that dies costs no more than one.
    let mut failed = Vec::new();
    let chosen: Vec<_> = binaries
        .into_iter()
        .filter(|(id, _)| {
            id.rsplit("::")
                .next()
                .is_some_and(|name| name.starts_with(wanted))
        })
        .collect();
    anyhow::ensure!(!chosen.is_empty(), "no guest test is called `{wanted}`");
    let count = chosen.len();
    for (id, path) in chosen {
        let words = nextest(&format!("binary_id(={id})"))?;
        let files = in_guests(vec![path])?;
        if in_testbed(&testbed::in_memory(&files, &words)?)? != ExitCode::SUCCESS {
            failed.push(id);
        }
    }
    if failed.is_empty() {
        println!("== guest tests: all of {count} binaries passed");
        return Ok(ExitCode::SUCCESS);
    }
    println!("== guest tests: failures in {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

fn here(words: &[OsString]) -> Result<ExitCode> {
    let status = std::process::Command::new(&words[0])
        .args(&words[1..])
        .status()
        .context("cannot start cargo-nextest")?;
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

/// The binaries of guest tests in nextest's list: ids and paths.
fn guest_binaries(list: &str) -> Result<Vec<(String, PathBuf)>> {
    let list: Value = serde_json::from_str(list).context("cannot read the list of tests")?;
    let binaries = list["rust-binaries"].as_object();
    let binaries = binaries.context("the list of tests has no binaries")?;
    let guests = binaries.iter().filter(|(_, binary)| {
        let name = binary["binary-name"].as_str().unwrap_or_default();
        name.starts_with("guest")
    });
    let paths = guests.filter_map(|(id, binary)| {
        Some((id.clone(), PathBuf::from(binary["binary-path"].as_str()?)))
    });
    Ok(paths.collect())
}

/// These test binaries, and all that they run and boot.
fn in_guests(mut files: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    for name in ["clone", "army"] {
        files.push(paths::debug_binary(name).canonicalize()?);
    }
    let debian = paths::assets().join("guest-debian/debian.ext4");
    files.push(debian.canonicalize()?);
    Ok(files)
}

/// Runs guest tests in a testbed. One that dies under them (the emulated CPU overwrites memory of
/// its own kernel now and then, docs/testbed.md) says nothing about the tests: they are run anew in
/// a fresh one.
fn in_testbed(words: &[OsString]) -> Result<ExitCode> {
    for attempt in 1..TESTBED_ATTEMPTS {
        let testbed = Testbed::find_or_start(&Size::default())?;
        match testbed::execute(&testbed, words) {
            Err(error) => {
                println!("== attempt {attempt}: {error:#}\n== trying again in a fresh testbed")
            }
            ended => return ended,
        }
        testbed::discard()?;
    }
    let testbed = Testbed::find_or_start(&Size::default())?;
    testbed::execute(&testbed, words)
}
