//! A template's directory, opened once.
//!
//! All files of a template are opened through the descriptor of its directory, by plain names and
//! without following links, so later changes to paths do not change which files are read. The
//! directory and its files must belong to root or to the caller, and no other user may be able to
//! write to them; otherwise their content could change after it was checked.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clone_api::ApiError;
use clone_start::error::{Result, failed};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::names::refused;
use crate::trust::{caller, distrust};

/// An open directory.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    dir: File,
}

impl Folder {
    /// Opens the directory at `path`, which must be absolute, without following any link in the
    /// path. Its permissions are not checked.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(
            rustix::fs::CWD,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        );
        match opened {
            Ok(dir) => Ok(Self {
                path: path.to_owned(),
                dir: File::from(dir),
            }),
            Err(Errno::LOOP) => Err(is_link(path)),
            Err(error) => Err(failed("open", path)(error.into())),
        }
    }

    /// Refuses a directory that another user may write to.
    pub(super) fn check_trusted(&self) -> Result<()> {
        let meta = self.dir.metadata().map_err(failed("look at", &self.path))?;
        check_trusted(&meta, &self.path)
    }

    /// Duplicates the handle, with `path` as the directory's path.
    pub(super) fn at(&self, path: &Path) -> Result<Self> {
        let dir = self.dir.try_clone().map_err(failed("open", path))?;
        Ok(Self {
            path: path.to_owned(),
            dir,
        })
    }

    /// The directory's path when it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.dir
    }

    /// Opens a file in the directory for reading. It must be a regular file that no other user may
    /// write to.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if there is no such file; other kinds if it is not acceptable.
    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        // Opening a device may have effects, so the file type is checked first.
        let stat = rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        check_plain(FileType::from_raw_mode(stat.st_mode).is_file())?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat2(
            &self.dir,
            name,
            flags,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )?);
        let meta = file.metadata()?;
        check_plain(meta.is_file())?;
        match distrust(&meta) {
            None => Ok(file),
            Some(reason) => Err(io::Error::new(io::ErrorKind::PermissionDenied, reason)),
        }
    }

    /// Makes a new file in the directory, which no other user can open.
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(File::from(rustix::fs::openat(
            &self.dir, name, flags, mode,
        )?))
    }

    /// Hard-links the file `name` of `from` into this directory as `to`, if it still is the open
    /// `file`. Returns whether that was possible.
    pub(super) fn link(&self, from: &Self, name: &str, file: &File, to: &str) -> io::Result<bool> {
        if rustix::fs::linkat(&from.dir, name, &self.dir, to, AtFlags::empty()).is_err() {
            // The directories are on different file systems, or on one without hard links.
            return Ok(false);
        }
        let (meant, linked) = (file.metadata()?, self.open_file(to)?.metadata()?);
        let same = meant.dev() == linked.dev() && meant.ino() == linked.ino();
        if !same {
            self.remove(to)?;
        }
        Ok(same)
    }

    /// Renames a file in the directory, replacing any file with the new name.
    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.dir, from, &self.dir, to)?)
    }

    /// Removes a file in the directory.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.dir, name, AtFlags::empty())?)
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

fn check_plain(is_file: bool) -> io::Result<()> {
    match is_file {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no plain file",
        )),
    }
}

fn check_trusted(meta: &Metadata, path: &Path) -> Result<()> {
    match distrust(meta) {
        None => Ok(()),
        Some(reason) => {
            let dir = path.display();
            let us = caller();
            Err(refused(path, &reason).advise(format!(
                "where you trust its content: chown -R {us} {dir} && chmod -R go-w {dir}"
            )))
        }
    }
}

/// The error for a path that contains a link; it names the link, and advises the path without
/// links.
fn is_link(path: &Path) -> ApiError {
    let is_link = |part: &&Path| part.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
    let link = path.ancestors().filter(is_link).last().unwrap_or(path);
    let error = refused(
        path,
        &format!(
            "{} is a symbolic link, which is not followed",
            link.display()
        ),
    );
    match path.canonicalize() {
        Ok(real) => error.advise(format!("name it by its own path: {}", real.display())),
        Err(_) => error,
    }
}

/// Resolves the links in the part of `path` that exists. This is for directories that the caller's
/// own environment names.
pub(super) fn resolved(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let mut missing: Vec<&OsStr> = Vec::new();
    for ancestor in path.ancestors() {
        match ancestor.canonicalize() {
            Ok(real) => {
                return Ok(missing
                    .iter()
                    .rev()
                    .fold(real, |path, part| path.join(part)));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) => missing.extend(ancestor.file_name()),
        }
    }
    Ok(path)
}
