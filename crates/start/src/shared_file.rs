//! Files that several VMs share, given by path and identity.
//!
//! A launcher checks a template through descriptors that it opened once. The VM's process is jailed
//! later and opens files by itself, as later forks of that VM do; they must open the files that
//! were checked. So each path is passed on with the identity of the checked file, and the process
//! that opens the path compares them: a file that was replaced or changed meanwhile is refused.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clone_api::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};

use crate::error::{Result, failed};

/// A file that VMs share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Form")]
pub struct SharedFile {
    /// The path of the file.
    pub path: PathBuf,
    /// The identity of the checked file; absent for an image or a kernel that the caller named,
    /// whose content may change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<FileIdentity>,
}

/// Identifies one file in one state: another file has another inode, and a change of the content
/// changes the size or the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    dev: u64,
    ino: u64,
    bytes: u64,
    mtime: i64,
    mtime_ns: i64,
}

impl FileIdentity {
    /// The identity of an open file as it is now.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|meta| Self::of_metadata(&meta))
    }

    fn of_metadata(meta: &Metadata) -> Self {
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            bytes: meta.size(),
            mtime: meta.mtime(),
            mtime_ns: meta.mtime_nsec(),
        }
    }
}

impl SharedFile {
    /// A file that the caller named.
    pub fn named(path: PathBuf) -> Self {
        Self {
            path,
            identity: None,
        }
    }

    /// The open `file`, which is at `path`.
    pub fn of(path: PathBuf, file: &File) -> Result<Self> {
        let identity = FileIdentity::of(file).map_err(failed("look at", &path))?;
        Ok(Self {
            path,
            identity: Some(identity),
        })
    }

    /// Opens the file for reading.
    ///
    /// # Errors
    /// The file cannot be opened, or is not the one that was checked.
    pub fn open(&self) -> Result<File> {
        let flags = match self.identity {
            Some(_) => libc::O_NOFOLLOW | libc::O_NONBLOCK,
            None => libc::O_NONBLOCK,
        };
        let file = File::options()
            .read(true)
            .custom_flags(flags)
            .open(&self.path)
            .map_err(failed("open", &self.path))?;
        self.check(&file)?;
        Ok(file)
    }

    /// Checks that `file`, which was opened at the path, is the one that was checked before.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] if it is another file, or has changed.
    pub fn check(&self, file: &File) -> Result<()> {
        let Some(meant) = self.identity else {
            return Ok(());
        };
        let found = FileIdentity::of(file).map_err(failed("look at", &self.path))?;
        match found == meant {
            true => Ok(()),
            false => Err(self.replaced()),
        }
    }

    fn replaced(&self) -> ApiError {
        let path = self.path.display();
        ApiError::new(
            ErrorCode::Conflict,
            format!("{path} was replaced or changed after it was checked"),
        )
        .advise("try again; `clone template verify` checks a template's content")
    }
}

/// The serialised form of a shared file; earlier versions wrote only its path.
#[derive(Deserialize)]
#[serde(untagged)]
enum Form {
    Path(PathBuf),
    Known {
        path: PathBuf,
        #[serde(default)]
        identity: Option<FileIdentity>,
    },
}

impl From<Form> for SharedFile {
    fn from(form: Form) -> Self {
        match form {
            Form::Path(path) => Self::named(path),
            Form::Known { path, identity } => Self { path, identity },
        }
    }
}

impl AsRef<Path> for SharedFile {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn shared(dir: &Path) -> SharedFile {
        let path = dir.join("a");
        fs::write(&path, "one").unwrap();
        let file = File::open(&path).unwrap();
        SharedFile::of(path, &file).unwrap()
    }

    #[test]
    fn a_file_that_was_replaced_or_changed_since_it_was_checked_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        shared.open().unwrap();
        let other = dir.path().join("b");
        fs::write(&other, "two").unwrap();
        let refused = || shared.open().unwrap_err().code == ErrorCode::Conflict;

        fs::write(&shared.path, "longer").unwrap();
        assert!(refused(), "changed");
        fs::rename(&other, &shared.path).unwrap();
        assert!(refused(), "replaced");
        fs::remove_file(&shared.path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &shared.path).unwrap();
        assert!(shared.open().is_err(), "a link");
        fs::remove_file(&shared.path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &shared.path, 0o600.into()).unwrap();
        assert!(refused(), "a pipe");
    }

    #[test]
    fn a_link_to_it_elsewhere_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        fs::hard_link(&shared.path, dir.path().join("b")).unwrap();
        shared.open().unwrap();
    }

    #[test]
    fn the_paths_that_earlier_versions_wrote_are_read() {
        let old: SharedFile = serde_json::from_str("\"/a\"").unwrap();
        assert_eq!(old, SharedFile::named("/a".into()));
        let dir = tempfile::tempdir().unwrap();
        let new = shared(dir.path());
        let text = serde_json::to_string(&new).unwrap();
        assert_eq!(serde_json::from_str::<SharedFile>(&text).unwrap(), new);
    }
}
