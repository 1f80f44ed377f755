//! Every chore of the project, one command: `cargo xtask --help`.
//!
//! This crate knows the workspace, the host it runs on and the testbed. It contains no part of the
//! product and is not shipped.
#![cfg_attr(test, allow(clippy::unwrap_used))]
// A chore talks to the person who runs it.
#![allow(clippy::print_stdout)]

mod assets;
mod bench;
mod cpio;
mod debian;
mod demo;
mod fuzz;
mod guest;
mod guest_debian;
mod host;
mod kvm;
mod modules;
mod paths;
mod process;
mod release;
mod static_program;
mod test;
mod testbed;
#[cfg(test)]
mod walls;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs the development tasks of Clone and Army.
///
/// Newcomers need two of them, `demo` and `test`. Both install their prerequisites first.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Demonstrates the main features from scratch, and prints how long each step takes.
    Demo {
        /// The part of the demo that runs where guests run.
        #[arg(long, hide = true)]
        inside: bool,
    },
    /// Runs all tests: format, lints, licences, unit tests, then the guest tests under KVM.
    Test(test::Options),
    /// Measures Clone beside QEMU's microvm (and other VMMs whose binary is given), in one run.
    ///
    /// Writes target/bench/NAME.json (all samples), report.md and plots. docs/benchmarks.md
    /// describes what each bench measures.
    Bench(bench::Options),
    /// Fuzzes every interface that accepts input from a guest, a file or a client.
    ///
    /// Needs a C++ compiler, but no nightly Rust. `cargo fuzz run TARGET` works, too, where it is
    /// installed. Inputs that cause failures are in target/fuzz/artifacts/TARGET.
    Fuzz(fuzz::Options),
    /// Manages a nested KVM host under QEMU, for machines without hardware KVM.
    #[command(subcommand)]
    Testbed(testbed::Action),
    /// Builds kernels and file systems for test guests, from Debian's packages.
    #[command(subcommand)]
    Guest(guest::Command),
    /// Builds the release files that users install: an archive and a Debian package, in
    /// target/release-files.
    Release,
    /// Installs the system packages and cargo tools that the chores need (with apt).
    Setup,
    /// Prints whether this machine's /dev/kvm runs stock guests.
    Kvm,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo { inside } => demo::run(inside),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Testbed(command) => testbed::run(command),
        Command::Guest(command) => guest::run(&command),
        Command::Release => release::run(),
        Command::Setup => host::setup().map(|()| ExitCode::SUCCESS),
        Command::Kvm => {
            println!("{}", kvm::probe());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
