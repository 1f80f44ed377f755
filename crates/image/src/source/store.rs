//! The storage from which an image's parts are read: a directory, or a tar archive of one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tar::EntryType;

use super::digest::Verified;
use super::tar_stream::TarStream;
use crate::decompress::Compression;
use crate::tree::components;
use crate::{ImageError, Result};

/// Manifests and configurations are small; registries allow 4 MiB.
const MAX_JSON: u64 = 4 << 20;
/// Members of an archive of an image: layers and their descriptions.
const MAX_MEMBERS: usize = 100_000;
const MAX_LINKS: usize = 8;

/// A read-only set of named files.
pub(crate) enum Store {
    Dir(PathBuf),
    Archive {
        path: PathBuf,
        file: File,
        members: HashMap<Vec<u8>, Member>,
    },
}

/// A member of an archive.
#[derive(Debug)]
pub(crate) enum Member {
    File {
        offset: u64,
        len: u64,
    },
    /// `docker save` of old names a layer shared with another image by a link.
    Link(Vec<u8>),
}

/// A part of a file, from a place on.
struct Part<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let n = self.file.read_at(&mut buf[..want], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

impl Store {
    /// Opens a directory, or an archive, which is first decompressed into an unnamed file in `scratch` if need be.
    pub(crate) fn open(path: &Path, scratch: &Path, limit: u64) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(ImageError::io("open the image", path))?;
        if meta.is_dir() {
            return Ok(Self::Dir(path.to_owned()));
        }
        let file = File::open(path).map_err(ImageError::io("open the image", path))?;
        let file = decompressed(file, path, scratch, limit)?;
        let members = index(&file, path)?;
        Ok(Self::Archive {
            path: path.to_owned(),
            file,
            members,
        })
    }

    /// The image's path, for messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Dir(path) | Self::Archive { path, .. } => path,
        }
    }

    /// Whether a file with this name exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Archive { members, .. } => find(members, name.as_bytes()).is_some(),
        }
    }

    /// Opens a file and returns its length. Names come from this crate or are checked digests,
    /// except for those in a `docker save` manifest. Only archives have that, and names in them are
    /// looked up, not opened.
    pub(crate) fn read(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64)> {
        match self {
            Self::Dir(dir) => {
                let path = dir.join(name);
                let file =
                    File::open(&path).map_err(ImageError::io("open the image's part", &path))?;
                let meta = file
                    .metadata()
                    .map_err(ImageError::io("read the status of", &path))?;
                if !meta.is_file() {
                    return Err(ImageError::malformed(
                        path.display().to_string(),
                        "it is not a regular file",
                    ));
                }
                Ok((Box::new(file), meta.len()))
            }
            Self::Archive {
                path,
                file,
                members,
            } => {
                let (at, len) = find(members, name.as_bytes()).ok_or_else(|| {
                    ImageError::malformed(
                        path.display().to_string(),
                        format!("it has no member {name:?}"),
                    )
                })?;
                Ok((
                    Box::new(Part {
                        file,
                        at,
                        left: len,
                    }),
                    len,
                ))
            }
        }
    }

    /// Reads a small file whole.
    pub(crate) fn read_small(&self, name: &str) -> Result<Vec<u8>> {
        let (reader, _) = self.read(name)?;
        let mut bytes = Vec::new();
        Verified::new(reader, None, MAX_JSON)
            .read_to_end(&mut bytes)
            .map_err(|e| {
                ImageError::malformed(format!("{} in {}", name, self.path().display()), e)
            })?;
        Ok(bytes)
    }
}

fn find(members: &HashMap<Vec<u8>, Member>, name: &[u8]) -> Option<(u64, u64)> {
    let mut name = name.to_vec();
    for _ in 0..MAX_LINKS {
        match members.get(&name)? {
            Member::File { offset, len } => return Some((*offset, *len)),
            Member::Link(target) => {
                // Relative to the link's directory, inside the archive.
                let mut parts: Vec<&[u8]> = name.split(|&b| b == b'/').collect();
                parts.pop();
                for step in target.split(|&b| b == b'/') {
                    match step {
                        b"" | b"." => {}
                        b".." => drop(parts.pop()?),
                        step => parts.push(step),
                    }
                }
                name = parts.join(&b'/');
            }
        }
    }
    None
}

/// The archive itself if it is plain, else an unnamed file of its decompressed bytes.
fn decompressed(file: File, path: &Path, scratch: &Path, limit: u64) -> Result<File> {
    let mut head = [0; 6];
    let n = file
        .read_at(&mut head, 0)
        .map_err(ImageError::io("read the image", path))?;
    let Some(compression) = Compression::detect(&head[..n]) else {
        return Ok(file);
    };
    let mut plain = tempfile::tempfile_in(scratch)
        .map_err(ImageError::io("create a temporary file in", scratch))?;
    let damaged = |e: io::Error| ImageError::malformed(path.display().to_string(), e);
    let reader = compression
        .reader(BufReader::with_capacity(1 << 18, file))
        .map_err(damaged)?;
    io::copy(&mut Verified::new(reader, None, limit), &mut plain).map_err(damaged)?;
    Ok(plain)
}

fn index(file: &File, path: &Path) -> Result<HashMap<Vec<u8>, Member>> {
    let mut input = BufReader::with_capacity(1 << 18, file);
    input
        .rewind()
        .map_err(ImageError::io("read the image", path))?;
    let damaged = |e: io::Error| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            ImageError::malformed(path.display().to_string(), "it is truncated")
        }
        _ => ImageError::malformed(
            path.display().to_string(),
            format!("it is not a tar archive of an image: {e}"),
        ),
    };
    if input.fill_buf().map_err(damaged)?.is_empty() {
        return Err(ImageError::malformed(
            path.display().to_string(),
            "it is empty",
        ));
    }
    let mut tar = TarStream::new(input);
    let mut members = HashMap::new();
    while let Some(entry) = tar.next_entry().map_err(damaged)? {
        let parts = components(&entry.path).map_err(|e| {
            ImageError::malformed(path.display().to_string(), format!("of a member, {e}"))
        })?;
        let member = match entry.kind {
            EntryType::Regular | EntryType::Continuous => {
                let offset = tar.get_mut().stream_position().map_err(damaged)?;
                Member::File {
                    offset,
                    len: entry.size,
                }
            }
            EntryType::Symlink => Member::Link(entry.link),
            _ => continue,
        };
        members.insert(parts.join(&b'/'), member);
        if members.len() > MAX_MEMBERS {
            return Err(ImageError::malformed(
                path.display().to_string(),
                "it has far too many members for an image",
            ));
        }
    }
    Ok(members)
}
