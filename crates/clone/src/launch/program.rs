//! The program that becomes a VM's process: `clone-vm`, which is that and nothing else, where it is
//! installed; else the launching program, which has all of it in itself.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::scratch;

const NAME: &str = "clone-vm";

/// Looks for the program, and keeps it. A server does that when it starts: what is opened then is of
/// its own build, and stays so when another is installed over it.
pub fn keep() {
    let _ = kept();
}

fn kept() -> Option<&'static File> {
    static PROGRAM: OnceLock<Option<File>> = OnceLock::new();
    let open = || {
        let path = installed_with(&std::env::current_exe().ok()?)?;
        File::open(path).ok()
    };
    PROGRAM.get_or_init(open).as_ref()
}

/// The variables that the program reads. The launcher's others may hold secrets, and a process that
/// serves a hostile guest is not given any.
const VARIABLES: [&str; 2] = ["CLONE_LOG", "RUST_BACKTRACE"];

/// A command that runs the program with `words`.
pub(super) fn command(words: [&OsStr; 3]) -> Command {
    let program = match kept() {
        // Open until the new program is there, which is when the path is not needed any more.
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
        None => "/proc/self/exe".to_owned(),
    };
    let mut command = bare(&program, words);
    // It cannot find the directory by itself, without the variables that ours depends on.
    if let Some(dir) = scratch::dir() {
        command.env(scratch::VARIABLE, dir);
    }
    command
}

/// A command that gives `program` none of our environment but what it reads.
fn bare(program: &str, words: [&OsStr; 3]) -> Command {
    let variables = VARIABLES.iter();
    let variables = variables.filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut command = Command::new(program);
    command.arg0(NAME).args(words).env_clear().envs(variables);
    command
}

/// Beside the program, as builds have it, or in `../lib/clone`, as packages do.
fn installed_with(program: &Path) -> Option<PathBuf> {
    let beside = program.with_file_name(NAME);
    let packaged = program.parent()?.with_file_name("lib/clone").join(NAME);
    [beside, packaged].into_iter().find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_program_is_given_no_variable_that_it_does_not_read() {
        let script = "cat /proc/$$/environ";
        let output = bare("/bin/sh", ["-c", script, "sh"].map(OsStr::new)).output();
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

    #[test]
    fn the_small_program_is_found_beside_ours_or_where_packages_have_it() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for folder in ["bin", "lib/clone"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        let program = path("bin/clone");
        assert_eq!(installed_with(&program), None);
        fs::write(path("lib/clone/clone-vm"), "").unwrap();
        assert_eq!(installed_with(&program), Some(path("lib/clone/clone-vm")));
        fs::write(path("bin/clone-vm"), "").unwrap();
        assert_eq!(installed_with(&program), Some(path("bin/clone-vm")));
    }
}
