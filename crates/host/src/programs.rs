//! The programs that belong to `clone` and `army`: `clone-vm`, the process of a VM, `clone-share`, the
//! server of a shared directory, and `clone-agent`, which is installed in guests.
//!
//! Each program is taken from `../lib/clone`, where packages install it. The first two are also looked
//! for beside the running program, where builds put it (their agent is linked to libraries that
//! guests need not have). If a program is in neither place, the running program writes the copy
//! that it carries, once and under its hash, into a directory that nobody else can write to
//! ([`carried_dir`]), so that all VMs of a build run the same file and share its pages.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clone_api::{ApiError, ErrorCode};
use clone_start::error::{Result, failed};

use crate::cache;

mod carried {
    include!(concat!(env!("OUT_DIR"), "/carried.rs"));
}

/// A program that belongs to the running one.
#[derive(Debug, Clone, Copy)]
struct Program {
    name: &'static str,
    /// Whether the program is also looked for beside the running one.
    beside: bool,
    carried: Option<Carried>,
}

/// A program that this one carries.
#[derive(Debug, Clone, Copy)]
struct Carried {
    bytes: &'static [u8],
    /// The hash of the bytes, in hexadecimal digits.
    hash: &'static str,
}

const VM_PROCESS: Program = Program {
    name: "clone-vm",
    beside: true,
    carried: carried::VM_PROCESS,
};

const SHARE_SERVER: Program = Program {
    name: "clone-share",
    beside: true,
    carried: carried::SHARE_SERVER,
};

const AGENT: Program = Program {
    name: "clone-agent",
    beside: false,
    carried: carried::AGENT,
};

/// Returns the open program of VMs' processes. The file stays open, so that a server keeps the file
/// of its own build when another is installed over it; servers call this when they start.
///
/// # Errors
/// The program is neither installed nor carried, or cannot be written to its directory.
pub fn vm_process() -> Result<&'static File> {
    static OPENED: OnceLock<File> = OnceLock::new();
    VM_PROCESS.open_once(&OPENED)
}

/// Returns the open program of shares' servers, which stays open as that of VMs' processes does.
///
/// # Errors
/// The program is neither installed nor carried, or cannot be written to its directory.
pub fn share_server() -> Result<&'static File> {
    static OPENED: OnceLock<File> = OnceLock::new();
    SHARE_SERVER.open_once(&OPENED)
}

/// Returns the path of the agent for guests; `None` if it is neither installed nor carried.
///
/// # Errors
/// The carried agent cannot be written to its directory.
pub fn agent() -> Result<Option<PathBuf>> {
    match AGENT.carried {
        None => Ok(AGENT.installed()),
        Some(_) => AGENT.find().map(Some),
    }
}

impl Program {
    fn open_once(self, opened: &'static OnceLock<File>) -> Result<&'static File> {
        if let Some(file) = opened.get() {
            return Ok(file);
        }
        let path = self.find()?;
        let file = File::open(&path).map_err(failed("open", &path))?;
        Ok(opened.get_or_init(|| file))
    }

    fn find(self) -> Result<PathBuf> {
        if let Some(path) = self.installed() {
            return Ok(path);
        }
        let Some(carried) = self.carried else {
            return Err(self.missing());
        };
        let dir = carried_dir().ok_or_else(|| self.missing())?;
        put(&dir, self.name, carried)
    }

    fn installed(self) -> Option<PathBuf> {
        self.installed_with(&std::env::current_exe().ok()?)
    }

    fn installed_with(self, program: &Path) -> Option<PathBuf> {
        let beside = self.beside.then(|| program.with_file_name(self.name));
        let packaged = program.parent()?.with_file_name("lib/clone");
        let mut places = beside.into_iter().chain([packaged.join(self.name)]);
        places.find(|path| path.is_file())
    }

    fn missing(self) -> ApiError {
        let message = format!("the program `{}` is not installed with this one", self.name);
        ApiError::new(ErrorCode::HostUnsupported, message).advise(format!(
            "put {0} beside the program that you run, or into ../lib/clone seen from there",
            self.name
        ))
    }
}

/// The directory for carried programs: `/var/lib/clone/programs` for root, in the user's cache for
/// others; `None` without a home directory.
fn carried_dir() -> Option<PathBuf> {
    match rustix::process::geteuid().is_root() {
        true => Some("/var/lib/clone/programs".into()),
        false => cache::dir("programs"),
    }
}

/// Writes a program into `dir` under its hash, unless it exists, and removes those of other builds.
/// Processes that run those have them open.
fn put(dir: &Path, name: &str, carried: Carried) -> Result<PathBuf> {
    let Carried { bytes, hash } = carried;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(failed("make", dir))?;
    check_owned(dir)?;
    let path = dir.join(format!("{name}-{hash}"));
    match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_file() && meta.len() == bytes.len() as u64 => {
            check_owned(&path)?;
            return Ok(path);
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at", &path)(error)),
    }
    clone_base::file::replace(&path, 0o755, bytes).map_err(failed("write", &path))?;
    remove_others(dir, name, &path).map_err(failed("clear", dir))?;
    Ok(path)
}

fn remove_others(dir: &Path, name: &str, kept: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        // A file that another command is writing has a hidden name.
        if file.starts_with(&format!("{name}-")) && path != kept {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Refuses a file or directory that another user could change, since its content is run as the
/// caller.
fn check_owned(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    let user = rustix::process::geteuid().as_raw();
    if meta.uid() == user && meta.mode() & 0o022 == 0 {
        return Ok(());
    }
    let message = format!("other users could change {}", path.display());
    Err(ApiError::new(ErrorCode::HostUnsupported, message)
        .advise("remove it, and let it be made anew"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program whose content is its hash.
    fn carried(content: &'static str) -> Carried {
        Carried {
            bytes: content.as_bytes(),
            hash: content,
        }
    }

    #[test]
    fn a_program_is_found_beside_ours_or_where_packages_have_it() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for folder in ["bin", "lib/clone"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        let find = || VM_PROCESS.installed_with(&path("bin/clone"));
        assert_eq!(find(), None);
        fs::write(path("lib/clone/clone-vm"), "").unwrap();
        assert_eq!(find(), Some(path("lib/clone/clone-vm")));
        fs::write(path("bin/clone-vm"), "").unwrap();
        assert_eq!(find(), Some(path("bin/clone-vm")));
        fs::write(path("bin/clone-agent"), "").unwrap();
        assert_eq!(AGENT.installed_with(&path("bin/clone")), None);
    }

    #[test]
    fn a_carried_program_is_put_once_and_replaces_those_of_other_builds() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("programs");
        let first = put(&dir, "clone-vm", carried("first")).unwrap();
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let made = inode(&first);
        assert_eq!(put(&dir, "clone-vm", carried("first")).unwrap(), first);
        assert_eq!(inode(&first), made);
        assert_eq!(fs::metadata(&first).unwrap().mode() & 0o777, 0o755);
        let agent = put(&dir, "clone-agent", carried("agent")).unwrap();
        let second = put(&dir, "clone-vm", carried("second")).unwrap();
        assert_eq!(fs::read(&second).unwrap(), b"second");
        assert!(agent.exists() && !first.exists());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    }

    #[test]
    fn a_carried_program_that_was_cut_short_is_written_again() {
        let root = tempfile::tempdir().unwrap();
        let path = put(root.path(), "clone-vm", carried("whole")).unwrap();
        fs::write(&path, "who").unwrap();
        assert_eq!(
            put(root.path(), "clone-vm", carried("whole")).unwrap(),
            path
        );
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn a_program_that_others_can_change_is_not_run() {
        let root = tempfile::tempdir().unwrap();
        let path = put(root.path(), "clone-vm", carried("ours")).unwrap();
        for changed in [&path, &root.path().to_owned()] {
            let mode = fs::metadata(changed).unwrap().permissions();
            fs::set_permissions(changed, fs::Permissions::from_mode(0o777)).unwrap();
            let error = put(root.path(), "clone-vm", carried("ours")).unwrap_err();
            assert_eq!(error.code, ErrorCode::HostUnsupported);
            fs::set_permissions(changed, mode).unwrap();
        }
    }
}
