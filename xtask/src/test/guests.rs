//! Guest tests: integration-test binaries whose name starts with `guest`, each an ordinary set of
//! `#[test]`s that start real guests. They are built here; with hardware KVM they also run here, else
//! in testbeds, as many side by side as the machine has processors ([`lane`](super::lane)).

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::changed::Scope;
use super::lane::{Job, Lane, Outcome};
use super::stages::Stages;
use super::{GUEST_TESTS, Options};
use crate::process::{cargo, output};
use crate::testbed::{self, Size, Testbed};
use crate::{host, kvm, paths, release};

/// Where guest tests find kernels and file systems.
const ASSETS_VARIABLE: &str = "CLONE_TEST_ASSETS";
/// Where they find the Debian package.
const PACKAGE_VARIABLE: &str = "CLONE_TEST_PACKAGE";
/// Where they keep templates that several of them use.
const SHARED_VARIABLE: &str = "CLONE_TEST_SHARED";
/// That folder, in memory; a test run is the only one on its host or in its testbed.
const SHARED: &str = "/run/clone-tests";
/// Binaries that take long, longest first: they are started first, so that none is waited for alone.
const LONG: [&str; 13] = [
    "guest_migrate",
    "guest_rewind",
    "guest_cluster",
    "guest_moves",
    "guest_fork_debian",
    "guest_suspend",
    "guest_book",
    "guest_package",
    "guest_army",
    "guest_debian",
    "guest_dashboard",
    "guest_share",
    "guest_fork",
];
/// Those that drive a browser.
const WITH_BROWSER: [&str; 1] = ["guest_dashboard"];
/// What a testbed and the guests in it take of the machine's memory, in MiB.
const TESTBED_MIB: u64 = 5 << 10;

/// The guest-test binaries that were built, and how they are run.
struct Suite {
    /// Ids and files.
    binaries: Vec<(String, PathBuf)>,
    list_file: PathBuf,
    metadata_file: PathBuf,
    package: PathBuf,
    /// Where all this, logs and archives are put.
    folder: PathBuf,
}

pub(super) fn run(options: &Options, scope: &Scope, stages: &mut Stages) -> Result<ExitCode> {
    let suite = stages.run("building the guest tests", || Suite::build(scope))?;
    let verdict = kvm::probe();
    println!("{verdict}");
    std::env::set_current_dir(paths::workspace())?;
    let wanted = options.guest.as_deref().unwrap_or_default();
    let by_name = !wanted.is_empty() && !wanted.starts_with("guest");
    // No test at all is a failure: nextest ends with a status of its own then.
    let filter = match by_name {
        true => format!("{GUEST_TESTS} & test({wanted})"),
        false => {
            let ids = suite
                .binaries
                .iter()
                .map(|(id, _)| format!("binary_id(={id})"));
            let ids: Vec<String> = ids.collect();
            format!("binary(/^{wanted}/) & ({})", ids.join(" + "))
        }
    };
    if verdict.runs_stock_guests() && !options.testbed {
        return stages.run("guest tests", || here(&suite.nextest(&filter)?));
    }
    if by_name {
        let words = suite.nextest(&filter)?;
        return stages.run("guest tests", || suite.run_in_one_testbed(&words));
    }
    let jobs = suite.jobs(wanted)?;
    anyhow::ensure!(!jobs.is_empty(), "no guest test is called `{wanted}`");
    in_lanes(jobs, &suite, stages)
}

impl Suite {
    /// Builds them, and the programs that they run.
    fn build(scope: &Scope) -> Result<Self> {
        // A build of the programs alone would choose other features of what they stand on, and
        // compile all of that again.
        let list = [
            "nextest",
            "list",
            "--workspace",
            "--list-type",
            "binaries-only",
        ];
        let mut list = cargo(&list);
        list.args(["--cargo-quiet", "--message-format", "json"]);
        let list = output(&mut list).context("cannot build the guest tests")?;
        let metadata = output(&mut cargo(&["metadata", "--format-version", "1"]))?;
        let folder = paths::target().join("guest-tests");
        fs::create_dir_all(&folder)?;
        let package = folder.join("package");
        let package = release::package_to_test(&paths::target().join("debug"), &package)?;
        let (list_file, metadata_file) = (folder.join("binaries.json"), folder.join("cargo.json"));
        let mut binaries = guest_binaries(&list)?;
        binaries.retain(|(id, _)| scope.holds_guest_test(id));
        fs::write(&list_file, list)?;
        fs::write(&metadata_file, metadata)?;
        Ok(Self {
            binaries,
            list_file,
            metadata_file,
            package,
            folder,
        })
    }

    /// The command that runs the tests which `filter` chooses.
    fn nextest(&self, filter: &str) -> Result<Vec<OsString>> {
        let assets = paths::assets().canonicalize()?;
        let mut words: Vec<OsString> = vec!["env".into()];
        words.push(format!("{ASSETS_VARIABLE}={}", assets.display()).into());
        words.push(format!("{PACKAGE_VARIABLE}={}", self.package.display()).into());
        words.push(format!("{SHARED_VARIABLE}={SHARED}").into());
        words.extend(["cargo-nextest", "nextest", "run", "--profile", "guest"].map(Into::into));
        words.extend(["--no-fail-fast", "--binaries-metadata"].map(Into::into));
        words.push(self.list_file.clone().into());
        words.push("--cargo-metadata".into());
        words.push(self.metadata_file.clone().into());
        words.extend(["-E".into(), filter.into()]);
        Ok(words)
    }

    /// A job for each binary whose name begins with `wanted`, those that take longest first.
    fn jobs(&self, wanted: &str) -> Result<VecDeque<Job>> {
        let chosen = self.binaries.iter();
        let mut chosen: Vec<_> = chosen
            .filter(|(id, _)| name_of(id).starts_with(wanted))
            .collect();
        let place = |id: &str| LONG.iter().position(|name| *name == name_of(id));
        chosen.sort_by_key(|(id, _)| (place(id).unwrap_or(LONG.len()), id.clone()));
        let jobs = chosen.into_iter().map(|(id, program)| {
            Ok(Job {
                words: self.nextest(&format!("binary_id(={id})"))?,
                program: program.clone(),
                name: name_of(id).to_owned(),
                with_browser: WITH_BROWSER.contains(&name_of(id)),
            })
        });
        jobs.collect()
    }

    /// Runs all binaries by one command in one testbed, with its output as it comes.
    fn run_in_one_testbed(&self, words: &[OsString]) -> Result<ExitCode> {
        let mut files: Vec<PathBuf> = self.binaries.iter().map(|(_, path)| path.clone()).collect();
        files.extend(shared_files()?);
        let archive = self.folder.join("files.tar");
        let testbed = Testbed::find_or_start(&Size::default())?;
        let words = testbed::in_memory(&archive, &files, words)?;
        testbed::execute(&testbed, &words)
    }
}

/// The binary's name in its id.
fn name_of(id: &str) -> &str {
    id.rsplit("::").next().unwrap_or(id)
}

fn here(words: &[OsString]) -> Result<ExitCode> {
    let status = Command::new(&words[0])
        .args(&words[1..])
        .status()
        .context("cannot start cargo-nextest")?;
    match fs::remove_dir_all(SHARED) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).context(format!("cannot remove {SHARED}"));
        }
        _ => {}
    }
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

/// Runs the jobs in as many testbeds side by side as the machine has processors, since a testbed
/// has one (docs/testbed.md), and memory.
fn in_lanes(jobs: VecDeque<Job>, suite: &Suite, stages: &mut Stages) -> Result<ExitCode> {
    let count = jobs.len();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let room = (host::available_mib()? / TESTBED_MIB) as usize;
    let lanes = processors.min(room).clamp(1, count);
    println!("{count} binaries of guest tests, {lanes} testbeds side by side");
    let (jobs, shared) = (Mutex::new(jobs), shared_files()?);
    let ended: Mutex<Vec<(String, Outcome)>> = Mutex::new(Vec::new());
    let work = |number| -> Result<()> {
        let mut lane = Lane::new(number, &shared, &suite.folder);
        loop {
            let job = jobs.lock().expect("no lane panics").pop_front();
            let Some(job) = job else { return Ok(()) };
            let outcome = lane.run(&job)?;
            ended
                .lock()
                .expect("no lane panics")
                .push((job.name, outcome));
        }
    };
    stages.run("guest tests", || {
        std::thread::scope(|scope| {
            let work = &work;
            let lanes: Vec<_> = (0..lanes)
                .map(|number| scope.spawn(move || work(number)))
                .collect();
            let mut lanes = lanes.into_iter();
            lanes.try_for_each(|lane| lane.join().expect("no lane panics"))
        })
    })?;
    let ended = ended.into_inner().expect("no lane panics");
    for (name, outcome) in &ended {
        stages.add(&format!("  {name}"), Duration::from_secs(outcome.seconds));
    }
    Ok(verdict(&ended, count))
}

fn verdict(ended: &[(String, Outcome)], count: usize) -> ExitCode {
    let tests: usize = ended.iter().map(|(_, outcome)| outcome.tests).sum();
    let failed = ended.iter().filter(|(_, outcome)| !outcome.passed);
    let failed: Vec<&str> = failed.map(|(name, _)| name.as_str()).collect();
    if failed.is_empty() {
        println!("== guest tests: all {tests} of {count} binaries passed");
        return ExitCode::SUCCESS;
    }
    println!(
        "== guest tests: {tests} run, failures in {}",
        failed.join(", ")
    );
    ExitCode::FAILURE
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

/// What all test binaries run and boot.
fn shared_files() -> Result<Vec<PathBuf>> {
    let programs = ["clone", "clone-vm", "clone-share", "army"].map(paths::debug_binary);
    let debian = paths::assets().join("guest-debian/debian.ext4");
    let files = programs.iter().chain([&debian]);
    files
        .map(|path: &PathBuf| {
            let path: &Path = path;
            path.canonicalize()
                .with_context(|| format!("{} is missing", path.display()))
        })
        .collect()
}
