//! The files of a disk: described for people and programs, then opened.
//!
//! Opening the files is separate from [`Disk::open`](crate::Disk::open), because the process that
//! uses a disk is jailed and opens no path.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, MemfdFlags};
use serde::{Deserialize, Serialize};

use crate::error::{DiskError, io_error};
use crate::foreign;
use crate::qcow2::{self, Qcow2Header};
use crate::room::memory_room;

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk, in a file or a host block device.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl Format {
    /// The format that the name and the content of an image agree on.
    ///
    /// A guest can write any first bytes to a raw disk, so the content alone is never trusted.
    ///
    /// # Errors
    /// [`DiskError::Unusable`] where they disagree or the image has another format; [`DiskError::Open`] and [`DiskError::Io`].
    pub fn detect(path: &Path) -> Result<Self, DiskError> {
        let file = open(path, false)?;
        foreign::refuse(&file, path)?;
        let named = path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
        let mut magic = [0; 4];
        let filled = file
            .read_at(&mut magic, 0)
            .map_err(io_error("read the start of the image"))?;
        let is = filled == 4 && magic == qcow2::MAGIC;
        let unusable = |reason: &str, advice: &str| DiskError::Unusable {
            path: path.to_owned(),
            reason: reason.to_owned(),
            advice: advice.to_owned(),
        };
        match (named, is) {
            (true, true) => Ok(Self::Qcow2),
            (false, false) => Ok(Self::Raw),
            (true, false) => Err(unusable(
                "it is no qcow2 image, in spite of its name",
                "format=raw, if its bytes are those of the disk",
            )),
            (false, true) => Err(unusable(
                "it begins like a qcow2 image, and its name does not end in .qcow2",
                "format=qcow2, if you trust where it comes from; \
                 format=raw, if a guest may have written this to its own disk",
            )),
        }
    }
}

/// A base image, or a backing file of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// The destination of the guest's writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Writes {
    /// Writes are refused: the disk is read-only.
    Refused,
    /// Into the base image.
    Base,
    /// Into a layer that is kept, made if it does not exist.
    Layer(PathBuf),
    /// Into a layer that is removed with the machine: an unnamed file in this directory, or
    /// anonymous memory if there is none.
    Ephemeral(Option<PathBuf>),
}

/// A disk as its user describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The base image; without one, everything that no layer holds is zero.
    pub base: Option<ImageSpec>,
    /// The backing files of a qcow2 base, nearest first. Those that the image itself names are
    /// never opened.
    #[serde(default)]
    pub backing: Vec<ImageSpec>,
    /// Read-only layers, lowest first.
    #[serde(default)]
    pub layers: Vec<PathBuf>,
    /// The destination of writes.
    pub writes: Writes,
}

/// The open files of a disk, in the order of its [`DiskSpec`].
#[derive(Debug)]
pub struct DiskFiles {
    /// The base image.
    pub base: Option<(File, Format)>,
    /// The backing files of the base, nearest first.
    pub backing: Vec<(File, Format)>,
    /// Read-only layers, lowest first.
    pub layers: Vec<File>,
    /// The destination of writes.
    pub writes: WriteFile,
}

/// [`Writes`] with its file.
#[derive(Debug)]
pub enum WriteFile {
    /// The disk is read-only.
    Refused,
    /// Into the base, whose file is open for writing.
    Base,
    /// Into a layer. An empty file becomes one.
    Layer {
        /// Open for reading and writing.
        file: File,
        /// Whether flushes must make it durable.
        durable: bool,
    },
}

impl DiskFiles {
    /// The room of the writable layer in bytes, if it is kept in memory.
    pub fn memory_room(&self) -> u64 {
        match &self.writes {
            WriteFile::Layer {
                file,
                durable: false,
            } => memory_room(file),
            _ => 0,
        }
    }
}

impl DiskSpec {
    /// Describes an image without layers.
    pub fn image(path: impl Into<PathBuf>, format: Format, read_only: bool) -> Self {
        Self {
            base: Some(ImageSpec {
                path: path.into(),
                format,
            }),
            backing: Vec::new(),
            layers: Vec::new(),
            writes: if read_only {
                Writes::Refused
            } else {
                Writes::Base
            },
        }
    }

    /// Every file that is opened, and whether it is opened for writing. (A directory for
    /// [`Writes::Ephemeral`] is not included.)
    pub fn paths(&self) -> Vec<(&Path, bool)> {
        let base = self
            .base
            .iter()
            .map(|image| (image.path.as_path(), self.writes == Writes::Base));
        let backing = self
            .backing
            .iter()
            .map(|image| (image.path.as_path(), false));
        let layers = self.layers.iter().map(|path| (path.as_path(), false));
        let top = match &self.writes {
            Writes::Layer(path) => Some((path.as_path(), true)),
            _ => None,
        };
        base.chain(backing).chain(layers).chain(top).collect()
    }

    /// Finds the images that [`Disk::open`](crate::Disk::open) would refuse, while their names are known and before
    /// anything is set up.
    ///
    /// # Errors
    /// [`DiskError::Unusable`], which has the command that helps; [`DiskError::Open`] and [`DiskError::Io`].
    pub fn check(&self) -> Result<(), DiskError> {
        let chain: Vec<&ImageSpec> = self.base.iter().chain(&self.backing).collect();
        for (index, image) in chain.iter().enumerate() {
            if image.format == Format::Raw {
                continue;
            }
            let file = open(&image.path, false)?;
            let writable = index == 0 && self.writes == Writes::Base;
            Qcow2Header::read(&file)
                .and_then(|header| header.check_use(writable, index + 1 < chain.len()))
                .map_err(|error| error.about(&image.path))?;
        }
        Ok(())
    }

    /// Opens and locks all files: exclusively those that are written, and shared those that are
    /// only read. The locks last as long as the files are open in any process.
    ///
    /// # Errors
    /// [`DiskError::Open`], or [`DiskError::InUse`] where another machine holds the lock.
    pub fn open(&self) -> Result<DiskFiles, DiskError> {
        let image = |spec: &ImageSpec, write| Ok((open_locked(&spec.path, write)?, spec.format));
        let base = self
            .base
            .as_ref()
            .map(|spec| image(spec, self.writes == Writes::Base))
            .transpose()?;
        let backing = self.backing.iter().map(|spec| image(spec, false));
        let layers = self.layers.iter().map(|path| open_locked(path, false));
        Ok(DiskFiles {
            base,
            backing: backing.collect::<Result<_, _>>()?,
            layers: layers.collect::<Result<_, _>>()?,
            writes: match &self.writes {
                Writes::Refused => WriteFile::Refused,
                Writes::Base => WriteFile::Base,
                Writes::Layer(path) => WriteFile::Layer {
                    file: open_or_create_layer(path)?,
                    durable: true,
                },
                Writes::Ephemeral(directory) => WriteFile::Layer {
                    file: ephemeral(directory.as_deref())?,
                    durable: false,
                },
            },
        })
    }
}

/// Makes an unnamed file for a layer that is removed with its last user: in `directory`, or in
/// anonymous memory.
///
/// # Errors
/// [`DiskError::Open`].
pub fn ephemeral(directory: Option<&Path>) -> Result<File, DiskError> {
    let Some(directory) = directory else {
        let memory = rustix::fs::memfd_create("disk layer", MemfdFlags::CLOEXEC);
        return memory
            .map(File::from)
            .map_err(|error| open_error(Path::new("(memory)"), true)(error.into()));
    };
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(directory)
        .map_err(open_error(directory, true))
}

fn open_error(path: &Path, write: bool) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    let access = if write { "for writing" } else { "for reading" };
    move |source| DiskError::Open {
        path,
        access,
        source,
    }
}

/// Opens a file or block device. A pipe or the like is refused without waiting for it.
fn open(path: &Path, write: bool) -> Result<File, DiskError> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(open_error(path, write))?;
    let kind = file
        .metadata()
        .map_err(open_error(path, write))?
        .file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    let reason = io::Error::new(
        io::ErrorKind::InvalidInput,
        "it is neither a file nor a block device",
    );
    Err(open_error(path, write)(reason))
}

fn open_locked(path: &Path, write: bool) -> Result<File, DiskError> {
    let file = open(path, write)?;
    lock(&file, path, write)?;
    Ok(file)
}

fn lock(file: &File, path: &Path, write: bool) -> Result<(), DiskError> {
    let operation = match write {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DiskError::InUse {
            path: path.to_owned(),
            access: if write { "writing" } else { "reading" },
        }),
        Err(error) => {
            // Some network file systems have no locks; there, the user must ensure exclusive use.
            tracing::debug!(%error, path = %path.display(), "disk file cannot be locked");
            Ok(())
        }
    }
}

fn open_or_create_layer(path: &Path) -> Result<File, DiskError> {
    let create = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = match create {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return open_locked(path, true);
        }
        created => created.map_err(open_error(path, true))?,
    };
    lock(&file, path, true)?;
    // The name must survive a crash as well as the content. An empty file becomes a new layer.
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("make the name of the new layer durable"))?;
    Ok(file)
}
