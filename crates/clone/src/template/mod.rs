//! Templates on disk: what clones are forked from.
//!
//! A template is a directory that holds all it needs: `manifest.json`, the machine's `state`,
//! memory layers, and for each disk a raw base image and layers. What it shares with its parent
//! are hard links, so either may be removed. It is made under a hidden name and renamed when it
//! is whole and durable ([`NewTemplate`]): a crash leaves nothing or all of it. Every clone holds a
//! shared lock on the manifest, so a template in use is not removed.
//!
//! Hashing all of it at each fork would take longer than the fork. It is verified once on each
//! host, and again when a file's times or size say that something touched it ([`verify`]).

mod build;
mod faults;
mod flatten;
pub mod manifest;
mod store;
mod transfer;
mod verify;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clone_api::config::DiskFormat;
use clone_api::{ApiError, ErrorCode};
use clone_disk::{Disk, DiskSpec, EngineKind, Format};
use clone_memory::{Layer, LayerStack};
use rustix::fs::FlockOperation;

pub use build::{NewTemplate, Parts};
pub use flatten::{bytes_to_flatten, flatten};
pub use manifest::{Content, Manifest};
pub use store::Store;
pub use transfer::{receive, send};
pub use verify::{forget_verified, hash_of};

use crate::error::{Result, failed};
use crate::process::prefetch;
use crate::process::start::ForkDisk;
use manifest::refused;

/// A template that is not removed while this lives.
#[derive(Debug)]
pub struct Template {
    dir: PathBuf,
    manifest: Manifest,
    /// Locked, shared.
    _lock: File,
}

impl Template {
    /// Opens the template in `dir`: reads its manifest and checks that its files are there.
    ///
    /// # Errors
    /// With the file and what is wrong with it. Content is left to [`Template::verify`].
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = std::path::absolute(dir).map_err(failed("find", dir))?;
        let path = dir.join(manifest::FILE);
        let file = open_plain(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => ApiError::new(
                ErrorCode::NotFound,
                format!("there is no template at {}", dir.display()),
            )
            .advise("`clone template ls` lists those in the store; a path needs a `/`"),
            _ => failed("open", &path)(error),
        })?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|_| refused(&dir, "it is being removed"))?;
        let mut text = Vec::new();
        (&file)
            .take(manifest::MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(failed("read", &path))?;
        if text.len() as u64 > manifest::MAX_BYTES {
            let most = manifest::MAX_BYTES;
            let reason = format!("{} is larger than {most} bytes", manifest::FILE);
            return Err(refused(&dir, &reason));
        }
        let template = Self {
            manifest: Manifest::parse(&text, &dir)?,
            dir,
            _lock: file,
        };
        template.check_files()?;
        Ok(template)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What it is.
    pub fn content(&self) -> &Content {
        &self.manifest.content
    }

    /// What clones hold a shared lock on.
    pub fn lock_path(&self) -> PathBuf {
        self.dir.join(manifest::FILE)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The memory layers' files, the base first.
    pub fn memory_paths(&self) -> Vec<PathBuf> {
        let layers = self.content().memory.layers.iter();
        layers.map(|layer| self.path(&layer.file)).collect()
    }

    /// The machine's state.
    pub fn state_path(&self) -> PathBuf {
        self.path(&self.content().state.file)
    }

    /// The record of what clones touch first, where there is one.
    pub fn prefetch_path(&self) -> PathBuf {
        self.dir.join(prefetch::FILE)
    }

    /// The disks, as clones open them.
    pub fn disks(&self) -> Vec<ForkDisk> {
        let disks = self.content().disks.iter();
        disks
            .map(|disk| ForkDisk {
                base: Some((self.path(&disk.base.file), DiskFormat::Raw)),
                backing: Vec::new(),
                layers: disk.layers.iter().map(|l| self.path(&l.file)).collect(),
            })
            .collect()
    }

    /// The memory layers, opened and put together; their indexes are checked, their pages are not.
    pub fn memory(&self) -> Result<LayerStack> {
        let wrong = |error: clone_memory::LayerError| refused(&self.dir, &error.to_string());
        let mut layers = Vec::new();
        for described in &self.content().memory.layers {
            let path = self.path(&described.file);
            let file = open_plain(&path).map_err(failed("open", &path))?;
            let layer = Layer::open(file, described.file.clone()).map_err(wrong)?;
            if layer.id().to_string() != described.id {
                let reason = format!("{} is another layer than described", described.file);
                return Err(refused(&self.dir, &reason));
            }
            layers.push(layer);
        }
        let stack = LayerStack::new(layers).map_err(wrong)?;
        let (held, described) = (stack.layout().size(), self.content().memory.bytes);
        if held != described {
            let reason = format!("its layers hold {held} bytes of RAM, not {described}");
            return Err(refused(&self.dir, &reason));
        }
        Ok(stack)
    }

    /// Disk `index`, for reading.
    fn open_disk(&self, index: usize) -> Result<Disk> {
        let described = &self.content().disks[index];
        let layers = described.layers.iter();
        let spec = DiskSpec {
            layers: layers.map(|layer| self.path(&layer.file)).collect(),
            ..DiskSpec::image(self.path(&described.base.file), Format::Raw, true)
        };
        let opened = spec
            .open()
            .and_then(|files| Disk::open(files, EngineKind::Blocking));
        opened.map_err(|error| {
            let error = ApiError::internal(&error).message;
            refused(&self.dir, &format!("disk {index}: {error}"))
        })
    }

    fn check_files(&self) -> Result<()> {
        for hashed in self.content().hashed() {
            let path = self.path(&hashed.file);
            let file = open_plain(&path).map_err(|error| self.missing(&hashed.file, &error))?;
            let len = file.metadata().map_err(failed("look at", &path))?.len();
            if len != hashed.bytes {
                let reason = format!(
                    "{} has {len} bytes, not {}: it was cut or changed",
                    hashed.file, hashed.bytes
                );
                return Err(refused(&self.dir, &reason));
            }
        }
        for layer in &self.content().memory.layers {
            let opened = open_plain(&self.path(&layer.file));
            opened.map_err(|error| self.missing(&layer.file, &error))?;
        }
        Ok(())
    }

    fn missing(&self, file: &str, error: &std::io::Error) -> ApiError {
        refused(&self.dir, &format!("{file} cannot be opened: {error}"))
    }
}

/// Opens a file for reading that is no link to another place, no pipe to wait for, no device.
fn open_plain(path: &Path) -> std::io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "it is no plain file",
        )),
    }
}

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod tests;
