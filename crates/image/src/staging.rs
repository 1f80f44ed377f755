//! Output files that appear as a whole or not at all.
//!
//! Where the file system can (`O_TMPFILE`), the file has no name until it is complete, so that even a killed build
//! leaves nothing behind. Elsewhere it has a temporary name, which is removed on every way out but a kill.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, RenameFlags};

use crate::{ImageError, Result};

/// An output that is being written.
pub(crate) struct Staging {
    file: File,
    target: PathBuf,
    /// The temporary name, if the file has one.
    named: Option<PathBuf>,
}

fn dir_of(target: &Path) -> &Path {
    match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// A name in the target's directory that no other build of any process uses.
fn temporary_name(target: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = target
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    dir_of(target).join(format!(".{name}.{}-{count}.part", std::process::id()))
}

impl Staging {
    /// Starts an output. An existing file at `target` stays until [`Staging::commit`].
    ///
    /// # Errors
    /// At once if `target` exists and may not be replaced, so that no work is lost.
    pub(crate) fn create(target: &Path, replace: bool) -> Result<Self> {
        if !replace && fs::symlink_metadata(target).is_ok() {
            return Err(exists(target));
        }
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o644)
            .custom_flags(rustix::fs::OFlags::TMPFILE.bits().cast_signed())
            .open(dir_of(target));
        if let Ok(file) = unnamed {
            return Ok(Self {
                file,
                target: target.to_owned(),
                named: None,
            });
        }
        let name = temporary_name(target);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&name)
            .map_err(ImageError::io("create", &name))?;
        Ok(Self {
            file,
            target: target.to_owned(),
            named: Some(name),
        })
    }

    /// The file to write.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The final path.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// The directory of the file, which is also for other temporary files of similar size.
    pub(crate) fn dir(&self) -> &Path {
        dir_of(&self.target)
    }

    /// Syncs the file and gives it its name.
    pub(crate) fn commit(mut self, replace: bool) -> Result<()> {
        let failed = |e| ImageError::io("put in place", &self.target)(e);
        self.file.sync_all().map_err(failed)?;
        let name = match self.named.take() {
            Some(name) => name,
            None => {
                let name = temporary_name(&self.target);
                let this = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, &this, CWD, &name, AtFlags::SYMLINK_FOLLOW)
                    .map_err(|e| failed(e.into()))?;
                name
            }
        };
        // From here on the name is removed by `drop` if the last step fails.
        self.named = Some(name.clone());
        let flags = if replace {
            RenameFlags::empty()
        } else {
            RenameFlags::NOREPLACE
        };
        match rustix::fs::renameat_with(CWD, &name, CWD, &self.target, flags) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(exists(&self.target)),
            // Some file systems (9p) know no flags; then a link does the same.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !replace => {
                fs::hard_link(&name, &self.target).map_err(failed)?;
                return Ok(());
            }
            Err(e) => return Err(failed(e.into())),
        }
        self.named = None;
        // The directory is synced so that the new name survives a crash; a failure to do so is
        // ignored.
        if let Ok(dir) = File::open(dir_of(&self.target)) {
            let _ = dir.sync_all();
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(name) = &self.named {
            let _ = fs::remove_file(name);
        }
    }
}

fn exists(target: &Path) -> ImageError {
    ImageError::Unsupported {
        what: format!("{} exists already", target.display()),
        advice: "remove it, choose another name, or ask for it to be replaced".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_output_appears_only_when_it_is_committed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let staging = Staging::create(&target, false).unwrap();
        staging.file().write_all(b"whole").unwrap();
        assert!(!target.exists());
        staging.commit(false).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn an_abandoned_output_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::create(&dir.path().join("out"), false).unwrap();
        staging.file().write_all(b"half").unwrap();
        drop(staging);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn an_existing_file_is_replaced_only_if_asked() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::write(&target, "old").unwrap();
        let refused = Staging::create(&target, false).err().unwrap().to_string();
        assert!(refused.contains("exists already"), "{refused}");
        let staging = Staging::create(&target, true).unwrap();
        staging.file().write_all(b"new").unwrap();
        staging.commit(true).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        // One that turned up meanwhile is not overwritten either, and nothing else is left.
        fs::remove_file(&target).unwrap();
        let staging = Staging::create(&target, false).unwrap();
        fs::write(&target, "raced").unwrap();
        assert!(staging.commit(false).is_err());
        assert_eq!(fs::read(&target).unwrap(), b"raced");
        assert_eq!(names(dir.path()), ["out"]);
    }
}
