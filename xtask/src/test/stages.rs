//! The stages of a test run: each is announced, timed, and shown again in a table at the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The stages that have ended, with how long each took.
pub(super) struct Stages {
    start: Instant,
    ended: Vec<(String, Duration)>,
}

impl Stages {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            ended: Vec::new(),
        }
    }

    /// Runs a stage.
    pub(super) fn run<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("== {name}");
        let start = Instant::now();
        let done = work().with_context(|| format!("{name} failed"))?;
        self.add(name, start.elapsed());
        println!("== {name}: {:.0} s", start.elapsed().as_secs_f64());
        Ok(done)
    }

    /// Adds a stage that was timed elsewhere.
    pub(super) fn add(&mut self, name: &str, time: Duration) {
        self.ended.push((name.to_owned(), time));
    }

    /// The table of all stages, and the whole.
    pub(super) fn table(&self) -> String {
        let whole = [("all".to_owned(), self.start.elapsed())];
        let rows = self.ended.iter().chain(&whole);
        rows.map(|(name, time)| format!("{:>6.0} s  {name}\n", time.as_secs_f64()))
            .collect()
    }
}
