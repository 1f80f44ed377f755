//! Replaces system files, even on disks that are full or read-only.
//!
//! A new file is written beside the old one and renamed over it, so the old one stays whole if that
//! fails. Then a file in memory is mounted over the old one, as systemd does with `/etc/machine-id`
//! on a read-only root: the guest sees the new content until its next boot.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, mount_bind, unmount};

/// The directory of files that are mounted over others. It is in memory wherever `/run` is.
const COVERS: &str = "/run/clone/files";
/// The most links in a chain; a longer one is a circle (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// How a file was replaced.
#[derive(Debug)]
pub(crate) enum Replaced {
    /// The file at its path was replaced.
    InPlace,
    /// A file in memory was mounted over it; the error says why it could not be replaced.
    Covered(io::Error),
}

/// Replaces the content of the file at `path`, or makes it with the permissions `mode`. A link to
/// an existing file is followed, and a dangling link is replaced.
///
/// # Errors
/// The file is unchanged.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<Replaced> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Err(error) = in_place(&target, bytes, mode) else {
        return Ok(Replaced::InPlace);
    };
    match cover(&target, bytes, mode) {
        Ok(()) => Ok(Replaced::Covered(error)),
        // The first error explains more than the second.
        Err(_) => Err(error),
    }
}

fn in_place(target: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut fresh = FreshFile::beside(target)?;
    fresh.fill(bytes, fs::metadata(target).ok(), mode)?;
    fresh.rename_to(target)
}

fn cover(target: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(COVERS)?;
    let old = fs::metadata(target)?;
    let covers = Path::new(COVERS);
    let mut fresh = FreshFile::beside(&covers.join(target.file_name().unwrap_or_default()))?;
    fresh.fill(bytes, Some(old.clone()), mode)?;
    // A mount from an earlier identity is removed first.
    if old.dev() == fs::metadata(covers)?.dev() && !target.starts_with("/run") {
        let _ = unmount(target, UnmountFlags::DETACH);
    }
    mount_bind(&fresh.path, target)?;
    // A mounted file needs no name.
    Ok(())
}

/// A file with a temporary name, which is removed unless it is renamed.
pub(crate) struct FreshFile {
    pub(crate) file: File,
    path: PathBuf,
    renamed: bool,
}

impl FreshFile {
    /// Makes a file with a temporary name in the directory of `path`.
    pub(crate) fn beside(path: &Path) -> io::Result<Self> {
        let name = path
            .file_name()
            .ok_or(io::ErrorKind::InvalidInput)?
            .to_string_lossy();
        let random = clone_base::random::hex::<8>()?;
        // The original name may already have the longest length that the file system allows.
        let short: String = name.chars().take(40).collect();
        let path = path.with_file_name(format!(".{short}.{random}"));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Self {
            file,
            path,
            renamed: false,
        })
    }

    /// Writes the content, and sets the owner and permissions of the replaced file.
    fn fill(&mut self, bytes: &[u8], old: Option<fs::Metadata>, mode: u32) -> io::Result<()> {
        self.file.write_all(bytes)?;
        if let Some(old) = &old {
            fchown(&self.file, Some(old.uid()), Some(old.gid()))?;
        }
        let mode = old.map_or(mode, |old| old.mode() & 0o7777);
        self.file.set_permissions(fs::Permissions::from_mode(mode))
    }

    pub(crate) fn rename_to(&mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for FreshFile {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The path that a write to `path` would reach, at the end of its links; the file need not exist.
///
/// # Errors
/// The links form a circle.
pub(crate) fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            // No link.
            Err(_) => return Ok(path),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_keeps_its_mode_and_links_to_it_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("real"), "old").unwrap();
        fs::set_permissions(path("real"), fs::Permissions::from_mode(0o604)).unwrap();
        symlink("real", path("link")).unwrap();
        assert!(matches!(
            replace(&path("link"), b"new", 0o600),
            Ok(Replaced::InPlace)
        ));
        assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
        assert_eq!(fs::read(path("real")).unwrap(), b"new");
        assert_eq!(fs::metadata(path("real")).unwrap().mode() & 0o777, 0o604);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_replaced_by_the_file() {
        let folder = tempfile::tempdir().unwrap();
        for target in ["missing/file", "self"] {
            let link = folder.path().join("self");
            let _ = fs::remove_file(&link);
            symlink(target, &link).unwrap();
            replace(&link, b"new", 0o644).unwrap();
            assert!(fs::symlink_metadata(&link).unwrap().is_file(), "{target}");
            assert_eq!(fs::read(&link).unwrap(), b"new");
        }
    }

    #[test]
    fn what_cannot_be_replaced_is_as_before() {
        let folder = tempfile::tempdir().unwrap();
        assert!(replace(&folder.path().join("no/such"), b"x", 0o644).is_err());
        // A directory cannot be renamed over, and no file can be mounted over it.
        assert!(replace(folder.path(), b"x", 0o644).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn writing_goes_to_the_end_of_links() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        symlink("b", path("a")).unwrap();
        symlink(path("c"), path("b")).unwrap();
        assert_eq!(end_of_links(&path("a")).unwrap(), path("c"));
        symlink("circle", path("circle")).unwrap();
        assert!(end_of_links(&path("circle")).is_err());
    }
}
