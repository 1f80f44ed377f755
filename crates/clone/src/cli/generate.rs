//! `clone completions` and `clone man`: what a shell and `man` want to know of the command.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use crate::error::{Result, failed};

/// Print a completion script for a shell.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Print the manual page, or write one page per command into a directory.
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Where to write clone.1, clone-run.1 and so on.
    dir: Option<PathBuf>,
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "clone", &mut script);
    print(&script)
}

pub(super) fn man(args: &ManArgs) -> Result<ExitCode> {
    match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
            clap_mangen::generate_to(Cli::command(), dir)
                .map_err(failed("write manual pages to", dir))?;
            Ok(ExitCode::SUCCESS)
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut page)
                .map_err(failed("print to", Path::new("standard output")))?;
            print(&page)
        }
    }
}

fn print(text: &[u8]) -> Result<ExitCode> {
    match io::stdout().lock().write_all(text) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        // Whoever read it has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(error) => Err(failed("print to", Path::new("standard output"))(error)),
    }
}
