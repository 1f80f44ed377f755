//! Files of the host that an image is made from, found below an open directory.
//!
//! Every path is resolved from a descriptor without following links, so a directory that another
//! user can write to cannot lead outside of itself. Paths of any length work, since they are
//! resolved in parts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags, SeekFrom};

use crate::{ImageError, Result};

/// The longest part of a path that is resolved at once, below Linux's `PATH_MAX`.
const MAX_STEP: usize = 4000;
/// The granularity of holes: the block of the images that are made.
const BLOCK: u64 = 4096;

/// A directory of the host that files are read below.
#[derive(Debug)]
pub(crate) struct HostDir {
    dir: OwnedFd,
    path: PathBuf,
}

impl HostDir {
    /// Opens the directory at a path from the caller, in which links are followed.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| ImageError::io("open the directory", path)(e.into()))?;
        Ok(Self {
            dir,
            path: path.to_owned(),
        })
    }

    /// The path of what lies below, for messages.
    pub(crate) fn path_of(&self, below: &Path) -> PathBuf {
        self.path.join(below)
    }

    /// Opens a directory below this one; the empty path is the directory itself.
    pub(crate) fn dir(&self, below: &Path) -> io::Result<OwnedFd> {
        self.open_below(below, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens a file below this one, without hanging on a FIFO that was put in its place.
    fn file(&self, below: &Path) -> io::Result<File> {
        self.open_below(below, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
            .map(File::from)
    }

    fn open_below(&self, below: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let mut rest = below.as_os_str().as_bytes();
        let mut from: Option<OwnedFd> = None;
        while rest.len() > MAX_STEP {
            // Names have at most 255 bytes, so there is a slash.
            let cut = rest[..MAX_STEP].iter().rposition(|&b| b == b'/');
            let cut = cut.ok_or(rustix::io::Errno::NAMETOOLONG)?;
            from = Some(self.step(
                from.as_ref(),
                &rest[..cut],
                OFlags::PATH | OFlags::DIRECTORY,
            )?);
            rest = &rest[cut + 1..];
        }
        let last = if rest.is_empty() { b"." } else { rest };
        self.step(from.as_ref(), last, flags)
    }

    fn step(&self, from: Option<&OwnedFd>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let from = from.unwrap_or(&self.dir).as_fd();
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = flags | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(
            from,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }
}

/// A regular file of the host as it was when it was found. It must be the same, and unchanged, when it is read.
#[derive(Clone, Debug)]
pub(crate) struct HostFile {
    root: Arc<HostDir>,
    below: PathBuf,
    facts: Facts,
    /// The parts that are no holes, in order: offsets and lengths in bytes, both whole blocks but for the last end.
    data: Arc<[(u64, u64)]>,
}

/// Identifies a file and its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    dev: u64,
    ino: u64,
    len: u64,
    mtime: (i64, i64),
}

impl Facts {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            dev: meta.dev(),
            ino: meta.ino(),
            len: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

impl HostFile {
    /// The file that was found under this name with this status.
    pub(crate) fn found(
        root: &Arc<HostDir>,
        below: PathBuf,
        stat: &rustix::fs::Stat,
    ) -> Result<Self> {
        let mut this = Self {
            root: Arc::clone(root),
            below,
            facts: Facts {
                dev: stat.st_dev,
                ino: stat.st_ino,
                len: u64::try_from(stat.st_size).unwrap_or_default(),
                mtime: (stat.st_mtime, stat.st_mtime_nsec as i64),
            },
            data: Arc::new([]),
        };
        let len = this.facts.len;
        let stored = u64::try_from(stat.st_blocks).unwrap_or_default() * 512;
        this.data = if stored >= len {
            [(0, len)].into()
        } else {
            let file = this.open()?;
            data_of(&file, len)
                .map_err(ImageError::io("find the holes of", this.path()))?
                .into()
        };
        Ok(this)
    }

    /// The present state of the file at a path from the caller, in which links are followed.
    pub(crate) fn at(path: &Path) -> Result<Self> {
        let path = std::fs::canonicalize(path).map_err(ImageError::io("open", path))?;
        let stat = rustix::fs::stat(&path)
            .map_err(|e| ImageError::io("read the status of", &path)(e.into()))?;
        let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        let (true, Some(dir), Some(name)) = (is_file, path.parent(), path.file_name()) else {
            return Err(ImageError::Unsupported {
                what: format!("{} is not a regular file", path.display()),
                advice: "give the path of a file".to_owned(),
            });
        };
        Self::found(&Arc::new(HostDir::open(dir)?), name.into(), &stat)
    }

    pub(crate) fn len(&self) -> u64 {
        self.facts.len
    }

    /// The parts that are no holes: offsets and lengths in bytes.
    pub(crate) fn data(&self) -> &[(u64, u64)] {
        &self.data
    }

    /// Opens the file, if it is still the one that was found.
    pub(crate) fn open(&self) -> Result<File> {
        let file = self
            .root
            .file(&self.below)
            .map_err(ImageError::io("open", self.path()))?;
        self.check(&file)?;
        Ok(file)
    }

    /// Fills `buf` from `offset` of the opened file.
    pub(crate) fn read_exact_at(&self, file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
        file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => changed(&self.path()),
            _ => ImageError::io("read", self.path())(e),
        })
    }

    /// Whether the opened file is the one that was found, with the same content.
    pub(crate) fn check(&self, file: &File) -> Result<()> {
        let now = Facts::of(file).map_err(ImageError::io("read the status of", self.path()))?;
        if now == self.facts {
            Ok(())
        } else {
            Err(changed(&self.path()))
        }
    }

    fn path(&self) -> PathBuf {
        self.root.path_of(&self.below)
    }
}

pub(crate) fn changed(path: &Path) -> ImageError {
    ImageError::Unsupported {
        what: format!("{} changed while the image was made", path.display()),
        advice: "build from a directory that nothing writes to".to_owned(),
    }
}

/// The parts of a file of `len` bytes that are no holes, rounded out to whole blocks.
fn data_of(file: &File, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < len {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No data follows.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let from = data / BLOCK * BLOCK;
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?;
        let to = hole.next_multiple_of(BLOCK).min(len);
        if to <= at {
            break;
        }
        match parts.last_mut() {
            Some((start, count)) if *start + *count >= from => *count = to - *start,
            _ => parts.push((from, to - from)),
        }
        at = to;
    }
    Ok(parts)
}
