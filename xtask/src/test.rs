//! All tests, in the order in which they fail fastest: format, lints, licences, unit and
//! documentation tests here, then the guest tests where stock guests run.
//!
//! A guest test is an ordinary `#[test]` in an integration-test binary whose name starts with
//! `guest`. It is built here; with hardware KVM it also runs here, else in the testbed.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::process::{cargo, output, run as run_command};
use crate::testbed::{self, Size, Testbed};
use crate::{guest, host, kvm, paths, release};

/// Where guest tests find kernels and file systems.
const ASSETS_VARIABLE: &str = "CLONE_TEST_ASSETS";
/// Where they find the Debian package.
const PACKAGE_VARIABLE: &str = "CLONE_TEST_PACKAGE";
const GUEST_TESTS: &str = "binary(/^guest/)";
/// Binaries that take long, longest first: they are started first, so that none is waited for alone.
const LONG: [&str; 7] = [
    "guest_cluster",
    "guest_book",
    "guest_fork_debian",
    "guest_army",
    "guest_dashboard",
    "guest_fork",
    "guest_debian",
];
/// What a testbed and the guests in it take of the machine's memory, in MiB.
const TESTBED_MIB: u64 = 5 << 10;
/// How `xtask testbed run` ends when the testbed died, and not the command.
const TESTBED_DIED: i32 = 1;

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
    // This builds the programs that tests run, too. A build of those alone would choose other
    // features of what they stand on, and compile all of that again.
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
    let package = paths::target().join("guest-tests/package");
    let package = release::package_to_test(&paths::target().join("debug"), &package)?;
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
        words.push(format!("{PACKAGE_VARIABLE}={}", package.display()).into());
        words.extend(["cargo-nextest", "nextest", "run", "--profile", "guest"].map(Into::into));
        words.extend(["--no-fail-fast", "--binaries-metadata"].map(Into::into));
        words.push(list_file.as_os_str().into());
        words.push("--cargo-metadata".into());
        words.push(metadata_file.as_os_str().into());
        words.extend(["-E".into(), filter.into()]);
        Ok(words)
    };
    let wanted = options.guest.as_deref().unwrap_or_default();
    let by_name = !wanted.is_empty() && !wanted.starts_with("guest");
    let verdict = kvm::probe();
    println!("{verdict}");
    std::env::set_current_dir(paths::workspace())?;
    // No test at all is a failure: nextest ends with a status of its own then.
    let filter = match by_name {
        true => format!("{GUEST_TESTS} & test({wanted})"),
        false => format!("binary(/^{wanted}/) & {GUEST_TESTS}"),
    };
    if verdict.runs_stock_guests() && !options.testbed {
        return here(&nextest(&filter)?);
    }
    if by_name {
        let files: Vec<PathBuf> = binaries.into_iter().map(|(_, path)| path).collect();
        let (files, archive) = (in_guests(files)?, folder.join("files.tar"));
        let testbed = Testbed::find_or_start(&Size::default())?;
        let words = testbed::in_memory(&archive, &files, &nextest(&filter)?)?;
        return testbed::execute(&testbed, &words);
    }
    let mut chosen: Vec<_> = binaries
        .into_iter()
        .filter(|(id, _)| name_of(id).starts_with(wanted))
        .collect();
    anyhow::ensure!(!chosen.is_empty(), "no guest test is called `{wanted}`");
    let place = |id: &str| LONG.iter().position(|name| *name == name_of(id));
    chosen.sort_by_key(|(id, _)| (place(id).unwrap_or(LONG.len()), id.clone()));
    let jobs = chosen.into_iter().map(|(id, path)| {
        Ok(Job {
            words: nextest(&format!("binary_id(={id})"))?,
            files: in_guests(vec![path])?,
            name: name_of(&id).to_owned(),
        })
    });
    in_testbeds(jobs.collect::<Result<_>>()?, &folder)
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
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

/// One binary's guest tests.
struct Job {
    name: String,
    /// What is run in a testbed.
    words: Vec<OsString>,
    /// What that runs and boots.
    files: Vec<PathBuf>,
}

/// Runs each job in a fresh testbed of its own. A testbed has one processor (docs/testbed.md), so
/// there are as many side by side as the machine has processors, and memory.
fn in_testbeds(jobs: Vec<Job>, folder: &Path) -> Result<ExitCode> {
    let count = jobs.len();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let room = (host::available_mib()? / TESTBED_MIB) as usize;
    let lanes = processors.min(room).clamp(1, count);
    println!("{count} binaries of guest tests, {lanes} testbeds at a time");
    let queue = Mutex::new(VecDeque::from(jobs));
    let failed = Mutex::new(Vec::new());
    let tests = AtomicUsize::new(0);
    std::thread::scope(|scope| -> Result<()> {
        let work = || -> Result<()> {
            loop {
                let job = queue.lock().expect("no lane panics").pop_front();
                let Some(job) = job else { return Ok(()) };
                let outcome = job.run(folder)?;
                tests.fetch_add(outcome.tests, Ordering::Relaxed);
                if !outcome.passed {
                    failed.lock().expect("no lane panics").push(job.name);
                }
            }
        };
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(work)).collect();
        for lane in lanes {
            lane.join().expect("no lane panics")?;
        }
        Ok(())
    })?;
    let failed = failed.into_inner().expect("no lane panics");
    let tests = tests.into_inner();
    if failed.is_empty() {
        println!("== guest tests: all {tests} of {count} binaries passed");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "== guest tests: {tests} run, failures in {}",
        failed.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

/// How a job ended.
struct Outcome {
    passed: bool,
    /// Tests that were run.
    tests: usize,
}

impl Job {
    /// Runs it, and shows all that it printed when it has ended. A testbed that died says nothing
    /// about the tests, so they are then run again, once.
    fn run(&self, folder: &Path) -> Result<Outcome> {
        let (start, log) = (Instant::now(), folder.join(format!("{}.log", self.name)));
        println!("== {} starts", self.name);
        let mut status = self.once(folder, &log)?;
        if status == Some(TESTBED_DIED) {
            let text = fs::read_to_string(&log)?;
            println!("{text}\n== {}: again in a fresh testbed", self.name);
            status = self.once(folder, &log)?;
        }
        let (text, time) = (fs::read_to_string(&log)?, start.elapsed().as_secs());
        let verdict = if status == Some(0) {
            "passed"
        } else {
            "failed"
        };
        println!("{}\n== {} {verdict}: {time} s", text.trim_end(), self.name);
        Ok(Outcome {
            passed: status == Some(0),
            tests: tests_run(&text),
        })
    }

    /// Runs it with its output in the file `log`, and returns its exit status.
    fn once(&self, folder: &Path, log: &Path) -> Result<Option<i32>> {
        let archive = folder.join(format!("{}.tar", self.name));
        let output = File::create(log)?;
        // Our own file may have been replaced by a build meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["testbed", "run", "--fresh", "--"])
            .args(testbed::in_memory(&archive, &self.files, &self.words)?)
            .stdout(output.try_clone()?)
            .stderr(output);
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl is one.
        unsafe {
            command.pre_exec(|| {
                let signal = rustix::process::Signal::KILL;
                Ok(rustix::process::set_parent_process_death_signal(Some(
                    signal,
                ))?)
            });
        }
        let status = command.status().context("cannot start a testbed")?;
        let _ = fs::remove_file(archive);
        Ok(status.code())
    }
}

/// How many tests nextest's summary tells of: `Summary [ 1.0s] 2 tests run: …`.
fn tests_run(text: &str) -> usize {
    let summary = text.lines().rev().filter_map(|line| line.split_once("] "));
    let mut counts = summary.filter_map(|(_, rest)| {
        let (count, rest) = rest.split_once(" test")?;
        let run = rest.starts_with("s run:") || rest.starts_with(" run:");
        count.parse::<usize>().ok().filter(|_| run)
    });
    counts.next().unwrap_or(0)
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
    for name in ["clone", "clone-vm", "army"] {
        files.push(paths::debug_binary(name).canonicalize()?);
    }
    let debian = paths::assets().join("guest-debian/debian.ext4");
    files.push(debian.canonicalize()?);
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_tells_how_many_tests_were_run() {
        let text = "Starting 2 tests\n     Summary [ 198.950s] 12 tests run: 12 passed (1 slow)\n";
        assert_eq!(tests_run(text), 12);
        assert_eq!(
            tests_run("Summary [ 9s] 1 test run: 1 passed, 26 skipped"),
            1
        );
        assert_eq!(tests_run("error: no tests to run"), 0);
    }
}
