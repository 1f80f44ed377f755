//! Templates on disk, from which clones are forked.
//!
//! A template is a directory that contains all of its files: `manifest.json`, the machine's
//! `state`, memory layers, for each disk a raw base image and layers, and the kernel that its guest
//! reboots into. Files that it shares with other templates are hard links, so any of them may be
//! removed. A template is made under a hidden name and renamed when it is complete and durable
//! ([`NewTemplate`]), so a crash leaves either all of it or nothing. Every clone holds a shared
//! lock on the manifest, so a template in use is not removed.
//!
//! A template may come from an untrusted source. It describes what its guest sees of its machine
//! and contains nothing about this host ([`manifest`]). It is opened once, through its directory's
//! descriptor ([`folder`]), and clones use the files that were verified through that descriptor
//! ([`SharedFile`]).
//!
//! Hashing all files at each fork would take longer than the fork. A template is verified once on
//! each host, and again when the times or sizes of its files show that they were touched
//! ([`verify`]).
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod build;
mod content;
mod faults;
mod flatten;
mod folder;
mod kernel;
pub mod manifest;
mod migrate;
mod names;
mod store;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod transfer;
mod trust;
mod upgrade;
mod verify;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clone_api::config::DiskFormat;
use clone_api::{ApiError, ErrorCode};
use clone_disk::{Disk, DiskFiles, EngineKind, Format, WriteFile};
use clone_memory::{Layer, LayerStack};
use clone_vmm::machine::MachineState;
use clone_vmm::snapshot;
use rustix::fs::FlockOperation;

pub use build::{NewTemplate, Parts};
pub use content::{Content, MAX_KERNEL_BYTES, MAX_TOTAL_BYTES};
pub use flatten::{bytes_to_flatten, flatten};
pub use manifest::Manifest;
pub use store::Store;
pub use transfer::{receive, send};
pub use upgrade::upgrade;
pub use verify::{Verified, hash_of};

use crate::trust::caller;
use clone_start::SharedFile;
use clone_start::document::{BootSource, ForkDisk, Parent};
use clone_start::error::{Result, failed};
use content::HashedFile;
use folder::Folder;
use names::refused;

/// An open template, which cannot be removed while this value lives. Its files are open, and are
/// read only through these descriptors.
#[derive(Debug)]
pub struct Template {
    folder: Folder,
    manifest: Manifest,
    /// The open files by their names.
    files: BTreeMap<String, File>,
    /// The manifest's file, locked shared.
    lock: File,
}

impl Template {
    /// Opens the template in `dir`: reads its manifest and opens its files.
    ///
    /// # Errors
    /// Names the file and its problem, also if another user could change the file. The content is
    /// checked by [`Template::verify`].
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = std::path::absolute(dir).map_err(failed("find", dir))?;
        if let Err(error) = dir.symlink_metadata()
            && error.kind() == io::ErrorKind::NotFound
        {
            return Err(no_template(&dir));
        }
        Self::open_folder(Folder::open(&dir)?)
    }

    /// Opens the template in an open directory.
    fn open_folder(folder: Folder) -> Result<Self> {
        folder.check_trusted()?;
        let dir = folder.path().to_owned();
        let lock = open_manifest(&folder)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared)
            .map_err(|_| refused(&dir, "it is being removed"))?;
        let manifest = Manifest::parse(&read_manifest(&lock, &dir)?, &dir)?;
        let mut files = BTreeMap::new();
        for (name, bytes) in manifest.content.sizes() {
            files.insert(name.to_owned(), open_sized(&folder, name, bytes)?);
        }
        Ok(Self {
            folder,
            manifest,
            files,
            lock,
        })
    }

    /// The template's directory.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// The template's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The template's content.
    pub fn content(&self) -> &Content {
        &self.manifest.content
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The open file with this name, which must be in the manifest.
    fn file(&self, name: &str) -> Result<&File> {
        let file = self.files.get(name);
        file.ok_or_else(|| self.refused(&format!("{name} is no file of it")))
    }

    fn refused(&self, reason: &str) -> ApiError {
        refused(self.dir(), reason)
    }

    fn shared(&self, name: &str) -> Result<SharedFile> {
        SharedFile::of(self.path(name), self.file(name)?)
    }

    /// The files that clones of the template are forked from.
    pub fn parent(&self) -> Result<Parent> {
        let layers = self.content().memory.layers.iter();
        let disks = self.content().disks.iter();
        Ok(Parent {
            template: Some(self.dir().to_owned()),
            memory: layers
                .map(|it| self.shared(&it.file))
                .collect::<Result<_>>()?,
            disks: disks
                .map(|disk| self.fork_disk(disk))
                .collect::<Result<_>>()?,
            locks: vec![SharedFile::of(self.path(names::MANIFEST), &self.lock)?],
            boot: self.boot_source()?,
            base: None,
        })
    }

    fn fork_disk(&self, disk: &content::Disk) -> Result<ForkDisk> {
        let layers = disk.layers.iter();
        Ok(ForkDisk {
            base: Some((self.shared(&disk.base.file)?, DiskFormat::Raw)),
            backing: Vec::new(),
            layers: layers
                .map(|it| self.shared(&it.file))
                .collect::<Result<_>>()?,
        })
    }

    fn boot_source(&self) -> Result<Option<BootSource>> {
        let Some(kernel) = &self.content().kernel else {
            return Ok(None);
        };
        let initrd = self.content().initrd.as_ref();
        Ok(Some(BootSource {
            kernel: self.shared(&kernel.file)?,
            initrd: initrd.map(|it| self.shared(&it.file)).transpose()?,
        }))
    }

    /// The machine's state.
    pub fn shared_state(&self) -> Result<SharedFile> {
        self.shared(&self.content().state.file)
    }

    /// Duplicates the lock that keeps the template from being removed.
    pub fn hold(&self) -> Result<File> {
        let held = self.lock.try_clone();
        held.map_err(failed("hold", self.dir()))
    }

    /// Keeps the template from being removed as long as the directory `dir` exists, which builds on
    /// it: that of a suspended VM.
    pub fn hold_for(&self, dir: &Path) -> Result<()> {
        let name = names::held_by(dir);
        let written = match self.folder.remove(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.folder.create(&name),
        };
        written
            .and_then(|mut file| {
                file.write_all(dir.as_os_str().as_bytes())?;
                file.sync_all()
            })
            .and_then(|()| self.folder.file().sync_all())
            .map_err(failed("write", &self.path(&name)))
    }

    /// The record of the pages that clones touch first, if there is one. It belongs to this host,
    /// and is not part of the template.
    pub fn prefetch(&self) -> Result<Option<SharedFile>> {
        match self.folder.open_file(names::PREFETCH) {
            Ok(file) => SharedFile::of(self.path(names::PREFETCH), &file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                tracing::warn!(%error, "the record of touched pages is not used");
                Ok(None)
            }
        }
    }

    /// Stores a record of the pages that clones touch first.
    pub fn write_prefetch(&self, record: &[u8]) -> Result<()> {
        let new = "prefetch.new";
        let written = match self.folder.remove(new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.folder.create(new),
        };
        written
            .and_then(|mut file| file.write_all(record))
            .and_then(|()| self.folder.rename(new, names::PREFETCH))
            .map_err(failed("write", &self.path(names::PREFETCH)))
    }

    /// The stack of memory layers. Their indexes are checked, but not their pages.
    pub fn memory(&self) -> Result<LayerStack> {
        let wrong = |error: clone_memory::LayerError| self.refused(&error.to_string());
        let mut layers = Vec::new();
        for described in &self.content().memory.layers {
            let file = self.file(&described.file)?.try_clone();
            let file = file.map_err(failed("open", &self.path(&described.file)))?;
            let layer = Layer::open(file, described.file.clone()).map_err(wrong)?;
            if layer.id().to_string() != described.id {
                let reason = format!("{} is another layer than described", described.file);
                return Err(self.refused(&reason));
            }
            layers.push(layer);
        }
        let stack = LayerStack::new(layers).map_err(wrong)?;
        let (held, described) = (stack.layout().size(), self.content().memory.bytes);
        if held != described {
            let reason = format!("its layers hold {held} bytes of RAM, not {described}");
            return Err(self.refused(&reason));
        }
        Ok(stack)
    }

    /// The machine's state, decoded.
    fn state(&self) -> Result<MachineState> {
        let HashedFile {
            file: name, bytes, ..
        } = &self.content().state;
        // The size in the manifest is bounded, and the file has that size.
        let mut state = vec![0; *bytes as usize];
        let read = self.file(name)?.read_exact_at(&mut state, 0);
        read.map_err(failed("read", &self.path(name)))?;
        snapshot::decode(&state)
            .map_err(|error| self.refused(&format!("{name} is damaged: {error}")))
    }

    /// Opens disk `index` for reading.
    fn open_disk(&self, index: usize) -> Result<Disk> {
        let described = &self.content().disks[index];
        let open = |file: &HashedFile| {
            let opened = self.file(&file.file)?.try_clone();
            opened.map_err(failed("open", &self.path(&file.file)))
        };
        let layers = described.layers.iter().map(open);
        let files = DiskFiles {
            base: Some((open(&described.base)?, Format::Raw)),
            backing: Vec::new(),
            layers: layers.collect::<Result<_>>()?,
            writes: WriteFile::Refused,
        };
        Disk::open(files, EngineKind::Blocking).map_err(|error| {
            let error = ApiError::internal(&error).message;
            self.refused(&format!("disk {index}: {error}"))
        })
    }
}

/// Removes the note that the directory `holder` builds on the template in `dir`, if there is one
/// ([`Template::hold_for`]). One that stays does not count any more when `holder` is gone.
pub fn release(dir: &Path, holder: &Path) {
    let note = dir.join(names::held_by(holder));
    if let Err(error) = std::fs::remove_file(&note)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %note.display(), %error, "a note stays in a template");
    }
}

fn no_template(dir: &Path) -> ApiError {
    let message = format!("there is no template at {}", dir.display());
    ApiError::new(ErrorCode::NotFound, message)
        .advise("`clone template ls` lists those in the store; a path needs a `/`")
}

fn open_manifest(folder: &Folder) -> Result<File> {
    let opened = folder.open_file(names::MANIFEST);
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => no_template(folder.path()),
        _ => unusable(folder.path(), names::MANIFEST, &error),
    })
}

fn read_manifest(file: &File, dir: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(manifest::MAX_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(failed("read", &dir.join(names::MANIFEST)))?;
    if text.len() as u64 > manifest::MAX_BYTES {
        let most = manifest::MAX_BYTES;
        let reason = format!("{} is larger than {most} bytes", names::MANIFEST);
        return Err(refused(dir, &reason));
    }
    Ok(text)
}

fn open_sized(folder: &Folder, name: &str, bytes: Option<u64>) -> Result<File> {
    let dir = folder.path();
    let opened = folder.open_file(name);
    let file = opened.map_err(|error| unusable(dir, name, &error))?;
    let len = file
        .metadata()
        .map_err(failed("look at", &dir.join(name)))?
        .len();
    match bytes.filter(|bytes| *bytes != len) {
        None => Ok(file),
        Some(bytes) => {
            let reason = format!("{name} has {len} bytes, not {bytes}: it was cut or changed");
            Err(refused(dir, &reason))
        }
    }
}

fn unusable(dir: &Path, name: &str, error: &io::Error) -> ApiError {
    let refused = refused(dir, &format!("{name} cannot be opened: {error}"));
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let us = caller();
            let path = dir.join(name);
            let path = path.display();
            refused.advise(format!(
                "where you trust its content: chown {us} {path} && chmod go-w {path}"
            ))
        }
        _ => refused,
    }
}

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
pub(crate) mod tests;
