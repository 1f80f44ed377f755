//! Measures Clone beside its peers, and reports it.
//!
//! `cargo xtask bench` builds what is measured, starts this program where guests run (`run`: in the
//! testbed or on hardware), and then here (`report`). It stays up while it measures: where starting
//! any process takes milliseconds, a client that is started for each sample would measure itself.
//!
//! A bench is a file in [`benches`] and a line in its list. [`guests`] starts the machines that are
//! compared, [`record`] is what is written down, [`report`] and [`plot`] make it readable.
#![cfg_attr(test, allow(clippy::unwrap_used))]
// It talks to the person who runs it.
#![allow(clippy::print_stdout)]

mod benches;
mod context;
mod guests;
mod plot;
mod record;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use context::Context;

/// Measures Clone beside its peers; `cargo xtask bench` starts it.
#[derive(Parser)]
#[command(name = "clone-bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs benches, where guests run.
    Run(context::Options),
    /// Makes a report and plots of what the benches wrote.
    Report {
        /// Where they wrote it.
        folder: PathBuf,
    },
    /// Prints the benches there are.
    List,
    /// Has both ends of many execs, for the bench `fleet`.
    #[command(hide = true)]
    ExecPeers(benches::fleet::peers::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run(options),
        Command::Report { folder } => report::write(&folder).map(|path| {
            println!("{}", path.display());
        }),
        Command::ExecPeers(options) => benches::fleet::peers::run(&options),
        Command::List => {
            for bench in benches::ALL {
                println!("{:<10} {}", bench.name, bench.about);
            }
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what was asked for; one that fails does not keep the others from running.
fn run(options: context::Options) -> Result<()> {
    let chosen = benches::chosen(&options.names)?;
    let context = Context::new(options)?;
    let mut failed = Vec::new();
    for bench in chosen {
        println!("== {}: {}", bench.name, bench.about);
        match (bench.run)(&context) {
            Ok(record) => {
                let path = record.save(bench.name, &context)?;
                println!("== {}: {}", bench.name, path.display());
                if !record.failures.is_empty() {
                    failed.push(bench.name);
                }
            }
            Err(error) => {
                println!("== {} failed: {error:#}", bench.name);
                failed.push(bench.name);
            }
        }
    }
    anyhow::ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
