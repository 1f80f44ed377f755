//! Directories that are made under one lock and held by another: what runs or is written in them
//! is in use as long as a process has a shared lock on a file in them, whoever is killed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use clone_start::error::{Result, failed};
use rustix::fs::{FlockOperation, flock};

/// The name of the file that holds a directory.
pub(crate) const LOCK: &str = "lock";

/// A new directory, which is in use as long as this value or a VM holds its lock.
#[derive(Debug)]
pub(crate) struct LockedDir {
    path: PathBuf,
    _lock: File,
}

impl LockedDir {
    /// Makes the directory at `path`. The caller holds the lock of its place, so that nobody takes the
    /// directory for an unused one before it is locked itself.
    pub(crate) fn make(path: PathBuf) -> Result<Self> {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(failed("make", &path))?;
        let lock = path.join(LOCK);
        let file = File::create(&lock).map_err(failed("make", &lock))?;
        flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|error| failed("lock", &lock)(error.into()))?;
        Ok(Self { path, _lock: file })
    }

    /// The directory's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a new file in the directory.
    pub(crate) fn new_file(&self, name: &str) -> Result<File> {
        let path = self.path.join(name);
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(failed("make", &path))
    }
}

/// Whether no process holds the directory.
pub(crate) fn is_unused(dir: &Path) -> bool {
    match File::open(dir.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        // Whoever made the directory was killed before it made the lock.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Takes the lock of `place`, under which directories in it are made and removed. It is released
/// when the result is dropped.
pub(crate) fn lock_in(place: &Path) -> Result<File> {
    let path = place.join(".lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed("open", &path))?;
    flock(&file, FlockOperation::LockExclusive)
        .map_err(|error| failed("lock", &path)(error.into()))?;
    Ok(file)
}
