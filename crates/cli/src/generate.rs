//! `completions` and `man`: what a shell and `man` want to know of a command. `army` has them, too.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap_complete::Shell;
use clone_start::error::{Result, failed};

/// Print a completion script for a shell.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Print the manual page, or write one page per command into a directory.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// The directory to write the pages to.
    dir: Option<PathBuf>,
}

/// Prints the script of `command`.
pub fn completions(args: &CompletionsArgs, mut command: clap::Command) -> Result<ExitCode> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    print(&script)
}

/// Prints or writes the pages of `command`.
pub fn man(args: &ManArgs, command: clap::Command) -> Result<ExitCode> {
    match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
            clap_mangen::generate_to(command, dir).map_err(failed("write manual pages to", dir))?;
            Ok(ExitCode::SUCCESS)
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command)
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
