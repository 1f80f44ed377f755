//! The program that becomes a VM's process: `clone-vm`, which is that and nothing else, where it is
//! installed; else the launching program, which has all of it in itself.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::process;

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

/// A command that becomes the process of the VM whose runtime directory is `dir`.
pub(super) fn command(dir: &Path) -> Command {
    let program = match kept() {
        // Open until the new program is there, which is when the path is not needed any more.
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
        None => "/proc/self/exe".to_owned(),
    };
    let mut command = Command::new(program);
    command.arg0(NAME).args(process::words(dir));
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
