//! The content of regular files until it is written into an image.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::host_file::HostFile;
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
    /// A file of the host.
    Host(HostFile),
}

impl Content {
    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Spooled { len, .. } => *len,
            Self::Host(file) => file.len(),
        }
    }

    /// Offsets and lengths of the parts that are not known to be zeros.
    pub(crate) fn data(&self) -> Cow<'_, [(u64, u64)]> {
        match self {
            Self::Host(file) => Cow::Borrowed(file.data()),
            _ => Cow::Owned(vec![(0, self.len())]),
        }
    }

    /// Opens the content for reading.
    ///
    /// # Errors
    /// A host file cannot be opened, or is not the one that was found.
    pub(crate) fn open(&self) -> Result<ContentReader<'_>> {
        Ok(match self {
            Self::Bytes(bytes) => ContentReader::Bytes(bytes),
            Self::Spooled { file, offset, .. } => ContentReader::Spooled(file, *offset),
            Self::Host(found) => ContentReader::Host(found, found.open()?),
        })
    }

    /// A file of the host as it is now.
    pub(crate) fn host(path: &Path) -> Result<Self> {
        HostFile::at(path).map(Self::Host)
    }
}

/// Random access to a file's content.
pub(crate) enum ContentReader<'a> {
    Bytes(&'a [u8]),
    /// The spool, and where in it the content begins.
    Spooled(&'a File, u64),
    Host(&'a HostFile, File),
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
            Self::Spooled(file, from) => file
                .read_exact_at(buf, from + offset)
                .map_err(ImageError::io("read", "the spool of file contents")),
            Self::Host(found, file) => found.read_exact_at(file, buf, offset),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// A host file changed while it was read, so the bytes are neither its old nor its new content.
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Host(found, file) => found.check(&file),
            Self::Bytes(_) | Self::Spooled(..) => Ok(()),
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

    /// Reads exactly `len` bytes from a stream into the spool.
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
