//! The commands that start the process of a VM and the servers of its shares.

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use clone_start::error::Result;

use crate::programs;

/// The environment variables that the program reads. The launcher's other variables may hold
/// secrets, so a process that serves a hostile guest gets none of them.
const VARIABLES: [&str; 2] = ["CLONE_LOG", "RUST_BACKTRACE"];

/// Makes a command that runs the program with these arguments.
pub(super) fn command(arguments: [&OsStr; 3]) -> Result<Command> {
    // The path names an open descriptor of this process, which stays open until the new program
    // runs.
    let program = programs::vm_process()?.as_raw_fd();
    let path = format!("/proc/self/fd/{program}");
    let mut command = bare(Path::new(&path));
    command.arg0("clone-vm").args(arguments);
    Ok(command)
}

/// Makes a command that runs the server of a share.
pub(super) fn share_server() -> Result<Command> {
    let program = programs::share_server()?.as_raw_fd();
    let mut command = bare(Path::new(&format!("/proc/self/fd/{program}")));
    command.arg0("clone-share");
    Ok(command)
}

/// Makes a command that gives `program` none of our environment except the variables that it reads.
fn bare(program: &Path) -> Command {
    let variables = VARIABLES.iter();
    let variables = variables.filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut command = Command::new(program);
    command.env_clear().envs(variables);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_given_no_variable_that_it_does_not_read() {
        let script = "cat /proc/$$/environ";
        let arguments = ["-c", script, "sh"].map(OsStr::new);
        let output = bare(Path::new("/bin/sh")).args(arguments).output();
        let environment = String::from_utf8(output.unwrap().stdout).unwrap();
        let given = environment.split_terminator('\0');
        let names: Vec<_> = given.filter_map(|it| it.split('=').next()).collect();
        // Whoever runs tests has others: PATH, HOME and what cargo sets.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        assert!(
            names.iter().all(|name| VARIABLES.contains(name)),
            "{names:?}"
        );
    }
}
