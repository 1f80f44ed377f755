//! The lock under which the directories in a directory are made and removed.

use std::fs::File;
use std::path::Path;

use clone_start::error::{Result, failed};
use rustix::fs::{FlockOperation, flock};

/// Takes the lock of `place`, which is a file in it. It is released when the result is dropped.
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
