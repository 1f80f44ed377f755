//! All tests, in the order in which they fail fastest: format, lints, licences, unit and
//! documentation tests here, then the guest tests where stock guests run ([`guests`]).

mod browser;
mod changed;
mod guests;
mod lane;
mod stages;

use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::{cargo, run as run_command};
use crate::{guest, host, kvm};
use changed::Scope;
use stages::Stages;

/// The filter for guest tests: integration-test binaries whose name starts with `guest`.
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
    /// Only what the difference to the commit REV can have broken [default: HEAD, so what is not
    /// committed]: the crates with changed files and those that depend on them. Guest tests only of
    /// crates and pages that changed themselves.
    #[arg(long, value_name = "REV", num_args = 0..=1, default_missing_value = "HEAD", conflicts_with = "guest")]
    changed: Option<String>,
    /// Use the testbed even where hardware KVM would do.
    #[arg(long)]
    testbed: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut stages = Stages::new();
    let ended = run_stages(options, &mut stages);
    println!("== stages\n{}", stages.table());
    ended
}

fn run_stages(options: &Options, stages: &mut Stages) -> Result<ExitCode> {
    println!(
        "Sets up and runs all tests. From nothing, on two processors and without hardware KVM, it takes \
         about half an hour, most of which is building; each stage says when it starts."
    );
    stages.run("setup", host::setup)?;
    let scope = match &options.changed {
        Some(rev) => Scope::changed_since(rev)?,
        None => Scope::everything(),
    };
    println!("{scope}");
    // Debian's packages are fetched and unpacked while the tests are built.
    let needs_guests = scope.needs_guests(options.unit);
    let fetching = needs_guests.then(|| guest::Fetching::start(!kvm::probe().runs_stock_guests()));
    if options.guest.is_none() && !scope.is_empty() {
        without_guests(&scope, stages)?;
    }
    let Some(fetching) = fetching else {
        return Ok(ExitCode::SUCCESS);
    };
    stages.run("guest assets", || {
        fetching.wait()?;
        guest::build().map(drop)
    })?;
    guests::run(options, &scope, stages)
}

/// What needs no guest.
fn without_guests(scope: &Scope, stages: &mut Stages) -> Result<()> {
    stages.run("format", || {
        run_command(&mut cargo(&["fmt", "--all", "--check"]))
    })?;
    stages.run("lints", || {
        let mut lints = cargo(&["clippy"]);
        lints.args(scope.packages()).arg("--all-targets");
        run_command(lints.args(["--", "-D", "warnings"]))
    })?;
    stages.run("licences and sources", || {
        // Advisories need a database from the network; bans, licences and sources do not.
        let mut deny = cargo(&["deny", "--log-level", "error", "check"]);
        run_command(deny.args(["bans", "licenses", "sources"]))?;
        // The fuzz targets are a workspace of their own, which nothing else of this run resolves.
        let mut fuzz = cargo(&["metadata", "--locked", "--format-version", "1"]);
        fuzz.args(["--manifest-path", "fuzz/Cargo.toml"])
            .stdout(Stdio::null());
        run_command(&mut fuzz).context("fuzz/Cargo.lock is not up to date")
    })?;
    stages.run("building the tests", || {
        let mut build = cargo(&["nextest", "run", "--no-run"]);
        run_command(build.args(scope.packages()))
    })?;
    stages.run("unit tests", || {
        let mut tests = cargo(&["nextest", "run", "--no-fail-fast", "--no-tests=pass"]);
        tests.args(scope.packages());
        run_command(tests.args(["-E", &format!("not {GUEST_TESTS}")]))
    })?;
    stages.run("documentation tests", || {
        let mut tests = cargo(&["test", "--quiet", "--doc"]);
        run_command(tests.args(scope.packages()))
    })
}
