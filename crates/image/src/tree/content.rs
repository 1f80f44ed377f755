//! Where the bytes of regular files are until they are written into an image.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{ImageError, Result};

/// The content of a regular file.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Held in memory: small files that are generated.
    Bytes(Arc<[u8]>),
    /// A part of the spool.
    Spooled {
        file: Arc<File>,
        offset: u64,
        len: u64,
    },
    /// A file of the host, which must still be the same one when it is read.
    Host {
        path: PathBuf,
        dev: u64,
        ino: u64,
        len: u64,
    },
}

impl Content {
    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Spooled { len, .. } | Self::Host { len, .. } => *len,
        }
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// If a host file cannot be opened or is not the one that was scanned.
    pub(crate) fn open(&self) -> Result<ContentReader<'_>> {
        Ok(match self {
            Self::Bytes(bytes) => ContentReader::Bytes(bytes),
            Self::Spooled { file, offset, len } => ContentReader::File {
                file: FileRef::Shared(file),
                from: *offset,
                len: *len,
                name: None,
            },
            Self::Host {
                path,
                dev,
                ino,
                len,
            } => {
                let file = open_host(path)?;
                let meta = file
                    .metadata()
                    .map_err(ImageError::io("read the status of", path))?;
                if (meta.dev(), meta.ino()) != (*dev, *ino) {
                    return Err(changed(path));
                }
                ContentReader::File {
                    file: FileRef::Own(file),
                    from: 0,
                    len: *len,
                    name: Some(path),
                }
            }
        })
    }

    /// A file of the host as it is now.
    pub(crate) fn host(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(ImageError::io("read the status of", path))?;
        if !meta.is_file() {
            return Err(ImageError::Unsupported {
                what: format!("{} is not a regular file", path.display()),
                advice: "give the path of a file".to_owned(),
            });
        }
        Ok(Self::Host {
            path: path.to_owned(),
            dev: meta.dev(),
            ino: meta.ino(),
            len: meta.len(),
        })
    }
}

/// Opens a host file without following a link that may have been put in its place, and without hanging on a FIFO.
fn open_host(path: &Path) -> Result<File> {
    let path = std::fs::canonicalize(path).map_err(ImageError::io("open", path))?;
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(&path)
        .map_err(ImageError::io("open", &path))
}

fn changed(path: &Path) -> ImageError {
    ImageError::Unsupported {
        what: format!("{} changed while the image was made", path.display()),
        advice: "build from a directory that nothing writes to".to_owned(),
    }
}

pub(crate) enum FileRef<'a> {
    Shared(&'a File),
    Own(File),
}

/// Random access to a file's content.
pub(crate) enum ContentReader<'a> {
    Bytes(&'a [u8]),
    File {
        file: FileRef<'a>,
        from: u64,
        len: u64,
        name: Option<&'a Path>,
    },
}

impl ContentReader<'_> {
    /// Fills `buf` from `offset`; the caller stays within the content's length.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Self::Bytes(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = from
                    .checked_add(buf.len())
                    .and_then(|to| bytes.get(from..to));
                buf.copy_from_slice(part.unwrap_or_default());
                Ok(())
            }
            Self::File {
                file,
                from,
                len,
                name,
            } => {
                debug_assert!(offset + buf.len() as u64 <= *len);
                let file = match file {
                    FileRef::Shared(file) => *file,
                    FileRef::Own(file) => file,
                };
                file.read_exact_at(buf, from + offset)
                    .map_err(|e| match (e.kind(), name) {
                        (io::ErrorKind::UnexpectedEof, Some(path)) => changed(path),
                        (_, Some(path)) => ImageError::io("read", path)(e),
                        (_, None) => ImageError::io("read", "the spool of file contents")(e),
                    })
            }
        }
    }
}

/// An unnamed temporary file that collects file contents; it vanishes with the process, however that ends.
#[derive(Debug)]
pub(crate) struct Spool {
    file: Arc<File>,
    dir: PathBuf,
    len: u64,
    limit: u64,
}

impl Spool {
    /// A spool on the file system of this directory, for at most `limit` bytes.
    pub(crate) fn new(dir: &Path, limit: u64) -> Result<Self> {
        let file = tempfile::tempfile_in(dir)
            .map_err(ImageError::io("create a temporary file in", dir))?;
        Ok(Self {
            file: Arc::new(file),
            dir: dir.to_owned(),
            len: 0,
            limit,
        })
    }

    /// Takes exactly `len` bytes from a stream.
    ///
    /// # Errors
    /// The inner result is the stream's error, which the caller can name better.
    pub(crate) fn take(&mut self, mut from: impl Read, len: u64) -> Result<io::Result<Content>> {
        if len > self.limit - self.len.min(self.limit) {
            return Err(ImageError::Limit {
                what: "the size of the image's files".to_owned(),
                limit: format!("{} bytes", self.limit),
                advice: "check where the image comes from, or raise the limit",
            });
        }
        let offset = self.len;
        let mut buf = vec![0; usize::try_from(len.min(1 << 18)).unwrap_or(1 << 18)];
        let mut left = len;
        while left > 0 {
            let part = usize::try_from(left.min(buf.len() as u64)).unwrap_or(buf.len());
            if let Err(e) = from.read_exact(&mut buf[..part]) {
                return Ok(Err(e));
            }
            self.file
                .write_all_at(&buf[..part], self.len)
                .map_err(ImageError::io("write a temporary file in", &self.dir))?;
            self.len += part as u64;
            left -= part as u64;
        }
        Ok(Ok(Content::Spooled {
            file: Arc::clone(&self.file),
            offset,
            len,
        }))
    }
}
