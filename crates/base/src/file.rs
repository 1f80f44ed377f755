//! Files that appear as a whole or not at all: their content is written under a temporary name
//! beside them, which then replaces theirs.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::random;

/// The end of the names of files that are not whole yet.
const TEMPORARY: &str = ".new";

/// Writes `bytes` to the file at `path` with the permissions `mode`, whatever was there before.
/// Neither a kill of the process nor a loss of power leaves a part of it.
///
/// # Errors
/// The host's error, and what was there before is unchanged.
pub fn replace(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    write(path, mode, bytes, |file, new| {
        rename_durably(file, new, path)
    })
}

/// The same as [`replace`] for a file that need not survive a loss of power, such as one in `/run`:
/// nothing is written to the disk for it.
///
/// # Errors
/// The same as of [`replace`].
pub fn replace_volatile(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    write(path, mode, bytes, |_, new| fs::rename(new, path))
}

/// Gives a written file its final name. The data is made durable before the name.
fn rename_durably(file: &File, temporary: &Path, target: &Path) -> io::Result<()> {
    file.sync_all()?;
    fs::rename(temporary, target)?;
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

fn write(
    path: &Path,
    mode: u32,
    bytes: &[u8],
    finish: impl FnOnce(&File, &Path) -> io::Result<()>,
) -> io::Result<()> {
    let new = temporary_name(path)?;
    // Others must not read the content before the file has its permissions.
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode)))
        .and_then(|()| finish(&file, &new));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&new);
    }
    written
}

/// A hidden name beside `path` that nobody else uses.
fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = OsString::from(".");
    // The name itself may already be as long as the file system permits.
    let name = name.to_string_lossy();
    temporary.extend(name.chars().take(40).map(String::from).map(OsString::from));
    temporary.push(format!(".{}{TEMPORARY}", random::hex::<6>()?));
    Ok(path.with_file_name(temporary))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_permissions_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a".repeat(255));
        replace(&path, 0o600, b"first").unwrap();
        replace_volatile(&path, 0o644, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("directory");
        fs::create_dir_all(path.join("full")).unwrap();
        replace(&path, 0o600, b"x").unwrap_err();
        assert!(path.join("full").is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
