//! A lane: a testbed that runs one binary of guest tests after the other.
//!
//! Starting a testbed and copying programs and disk images into its memory takes as long as a short
//! test, so a lane does it once. After a failure it starts a fresh one, since nobody knows what the
//! failed test left behind.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::testbed::{self, Size, Testbed};

/// How `xtask testbed run` ends when the testbed died, and not the command.
const TESTBED_DIED: i32 = 1;

/// One binary's guest tests.
pub(super) struct Job {
    /// The binary's name.
    pub(super) name: String,
    /// The command that runs them.
    pub(super) words: Vec<OsString>,
    /// The test binary.
    pub(super) program: PathBuf,
    /// Whether its tests drive a browser, which runs outside of the testbed.
    pub(super) with_browser: bool,
}

/// How a job ended.
pub(super) struct Outcome {
    pub(super) passed: bool,
    /// Tests that were run.
    pub(super) tests: usize,
    pub(super) seconds: u64,
}

/// A testbed and what is in its memory already.
pub(super) struct Lane<'a> {
    /// Where logs and archives are put.
    folder: &'a Path,
    /// Tells this lane's files from those of others.
    number: usize,
    /// Files that every job runs or boots.
    shared: &'a [PathBuf],
    testbed: Option<Testbed>,
}

impl<'a> Lane<'a> {
    pub(super) fn new(number: usize, shared: &'a [PathBuf], folder: &'a Path) -> Self {
        Self {
            folder,
            number,
            shared,
            testbed: None,
        }
    }

    /// Runs a job, and shows all that it printed when it has ended. A testbed that died says
    /// nothing about the tests, so they are then run again, once.
    pub(super) fn run(&mut self, job: &Job) -> Result<Outcome> {
        let start = Instant::now();
        let log = self.folder.join(format!("{}.log", job.name));
        println!("== {} starts", job.name);
        let mut status = self.attempt(job, &log)?;
        if status.code() == Some(TESTBED_DIED) {
            let text = fs::read_to_string(&log)?;
            println!("{text}\n== {}: again in a fresh testbed", job.name);
            self.testbed = None;
            status = self.attempt(job, &log)?;
        }
        if !status.success() {
            self.testbed = None;
        }
        let (text, seconds) = (fs::read_to_string(&log)?, start.elapsed().as_secs());
        let verdict = if status.success() { "passed" } else { "failed" };
        println!(
            "{}\n== {} {verdict}: {seconds} s",
            text.trim_end(),
            job.name
        );
        Ok(Outcome {
            passed: status.success(),
            tests: tests_run(&text),
            seconds,
        })
    }

    /// Runs a job with its output in the file `log`.
    fn attempt(&mut self, job: &Job, log: &Path) -> Result<ExitStatus> {
        let output = File::create(log)?;
        let name = format!("{}-lane{}.tar", std::process::id(), self.number);
        let archive = self.folder.join(name);
        if job.with_browser {
            let browser = super::browser::OutsideBrowser::start()?;
            let testbed = Testbed::start(&browser.size(), &format!("browser{}", self.number))?;
            testbed::load(&testbed, &archive, self.shared)?;
            let words = [browser.environment(), job.words.clone()].concat();
            return execute(&testbed, &archive, &job.program, &words, &output);
        }
        let testbed = match self.testbed.take() {
            Some(testbed) => testbed,
            None => {
                let testbed = Testbed::start(&Size::default(), &format!("lane{}", self.number))?;
                testbed::load(&testbed, &archive, self.shared)?;
                testbed
            }
        };
        let testbed = self.testbed.insert(testbed);
        execute(testbed, &archive, &job.program, &job.words, &output)
    }
}

/// Runs `words` in a testbed, with `program` in its memory.
fn execute(
    testbed: &Testbed,
    archive: &Path,
    program: &Path,
    words: &[OsString],
    output: &File,
) -> Result<ExitStatus> {
    let words = testbed::in_memory(archive, &[program.to_owned()], words)?;
    let mut command = testbed::command(testbed, &words);
    command
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl is one.
    unsafe {
        command.pre_exec(|| {
            let signal = rustix::process::Signal::KILL;
            Ok(rustix::process::set_parent_process_death_signal(Some(
                signal,
            ))?)
        });
    }
    let status = command.status().context("cannot run in a testbed")?;
    let _ = fs::remove_file(archive);
    Ok(status)
}

/// The number of tests in nextest's summary: `Summary [ 1.0s] 2 tests run: …`.
fn tests_run(text: &str) -> usize {
    let summary = text.lines().rev().filter_map(|line| line.split_once("] "));
    let mut counts = summary.filter_map(|(_, rest)| {
        let (count, rest) = rest.split_once(" test")?;
        let run = rest.starts_with("s run:") || rest.starts_with(" run:");
        count.parse::<usize>().ok().filter(|_| run)
    });
    counts.next().unwrap_or(0)
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
