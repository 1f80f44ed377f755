//! Making a template: under a hidden name, then all at once.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clone_api::config::DiskConfig;
use clone_api::{ApiError, ErrorCode};
use clone_disk::{Disk, EngineKind, Format};
use clone_memory::Layer;
use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::manifest::{self, Content, HashedFile, Manifest, Memory, MemoryLayer};
use super::{Template, faults, verify};
use crate::error::{Result, failed};
use crate::process::{disks, prefetch};
use crate::runtime::Runtime;

/// What a template under construction is called: hidden, and its name in front.
const MARK: &str = ".tmp-";
/// What the manifest says beside what the files tell.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The template that it is a difference to.
    pub parent: Option<String>,
    /// The guest's agent's version.
    pub agent_version: Option<String>,
    /// The VM's description.
    pub config: clone_api::VmConfig,
    /// What the guest was told of its CPU.
    pub cpu: clone_api::control::CpuFeatures,
    /// When it was taken.
    pub created_unix_ms: u64,
}

/// A template that is being made. Dropped without [`NewTemplate::commit`], it is removed.
#[derive(Debug)]
pub struct NewTemplate {
    target: PathBuf,
    dir: PathBuf,
    /// Memory layers' files, the base first.
    memory: Vec<String>,
    /// For each disk its base and its layers.
    disks: Vec<(String, Vec<String>)>,
    /// Hashes of files that are a parent's own, by their name here.
    known: BTreeMap<String, String>,
    /// The directory itself, locked: it is no dead maker's.
    _lock: File,
}

impl NewTemplate {
    /// Begins one that will be at `target`, which must not exist.
    pub fn begin(target: &Path) -> Result<Self> {
        let target = std::path::absolute(target).map_err(failed("find", target))?;
        if target.symlink_metadata().is_ok() {
            return Err(taken(&target));
        }
        let parent = target.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(failed("make the directory", parent))?;
        sweep(parent)?;
        let (dir, lock) = make_locked(&target)?;
        Ok(Self {
            target,
            dir,
            memory: Vec::new(),
            disks: Vec::new(),
            known: BTreeMap::new(),
            _lock: lock,
        })
    }

    pub(super) fn create(&self, name: &str) -> Result<File> {
        faults::step("before a file")?;
        let path = self.dir.join(name);
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("make", &path))
    }

    /// The file of the next memory layer, over those there are.
    pub fn memory_file(&mut self) -> Result<File> {
        let name = format!("memory-{}.layer", self.memory.len());
        let file = self.create(&name)?;
        self.memory.push(name);
        Ok(file)
    }

    /// The file of the machine's state.
    pub fn state_file(&self) -> Result<File> {
        self.create("state")
    }

    /// Takes over the memory layers of `parent`, which a new one is to lie on.
    pub fn share_memory(&mut self, parent: &Template) -> Result<()> {
        for layer in &parent.content().memory.layers {
            let name = format!("memory-{}.layer", self.memory.len());
            self.share(&parent.path(&layer.file), &name)?;
            self.memory.push(name);
        }
        Ok(())
    }

    /// Adds a disk whose base image and first `layers` layers are those of disk `index` of
    /// `parent`, whose files must be known to be as described: they are not hashed again.
    pub fn share_disk(&mut self, parent: &Template, index: usize, layers: usize) -> Result<()> {
        let number = self.disks.len();
        let Some(disk) = parent.content().disks.get(index) else {
            let message = format!("the parent template has no disk {index}");
            return Err(ApiError::new(ErrorCode::InvalidConfig, message));
        };
        let base = format!("disk-{number}.raw");
        self.share_hashed(parent, &disk.base, &base)?;
        let mut names = Vec::new();
        for (at, layer) in disk.layers.iter().take(layers).enumerate() {
            let name = format!("disk-{number}.layer-{at}");
            self.share_hashed(parent, layer, &name)?;
            names.push(name);
        }
        self.disks.push((base, names));
        Ok(())
    }

    /// Adds a disk, whose whole content goes into this file as a raw image.
    pub fn disk_file(&mut self) -> Result<File> {
        let name = format!("disk-{}.raw", self.disks.len());
        let file = self.create(&name)?;
        self.disks.push((name, Vec::new()));
        Ok(file)
    }

    /// Adds a disk with a copy of a described image. What lies over it is for the caller to add.
    pub fn copy_disk(&mut self, disk: &DiskConfig) -> Result<()> {
        let spec = disks::described(disk)?;
        let is_raw = spec
            .base
            .as_ref()
            .is_some_and(|base| base.format == Format::Raw);
        let copy = self.disk_file()?;
        let image = fs::metadata(&disk.path).map_err(failed("look at", &disk.path))?;
        if is_raw && image.is_file() {
            return copy_image(&disk.path, &copy).map_err(failed("copy", &disk.path));
        }
        // A block device has neither a length nor holes that a file's calls would tell.
        let files = spec.open().map_err(|error| ApiError::internal(&error))?;
        let mut opened =
            Disk::open(files, EngineKind::Blocking).map_err(|error| ApiError::internal(&error))?;
        opened
            .write_raw(&copy)
            .map_err(failed("convert", &disk.path))
    }

    /// Adds a copy of a layer to disk `index`.
    pub fn copy_layer(&mut self, index: usize, layer: &Path) -> Result<()> {
        let file = self.disk_layer_file(index)?;
        copy_image(layer, &file).map_err(failed("copy", layer))
    }

    /// The file of one more layer of disk `index`.
    pub fn disk_layer_file(&mut self, index: usize) -> Result<File> {
        let name = format!("disk-{index}.layer-{}", self.disks[index].1.len());
        let file = self.create(&name)?;
        self.disks[index].1.push(name);
        Ok(file)
    }

    /// Nothing was written to the last layer of disk `index`: it is not needed.
    pub fn drop_disk_layer(&mut self, index: usize) -> Result<()> {
        if let Some(name) = self.disks[index].1.pop() {
            let path = self.dir.join(name);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        Ok(())
    }

    /// Finishes it: describes what is there, makes it durable, and gives it its name.
    pub fn commit(self, parts: Parts, runtime: Option<&Runtime>) -> Result<Template> {
        let content = self.describe(parts)?;
        let manifest = Manifest {
            format: manifest::FORMAT,
            id: content.id()?,
            content,
        };
        let text =
            serde_json::to_vec_pretty(&manifest).map_err(|error| ApiError::internal(&error))?;
        self.write_manifest(&text)?;
        let template = self.publish(&manifest)?;
        if let Some(runtime) = runtime {
            template.note_verified(runtime, &template.stamp()?)?;
        }
        Ok(template)
    }

    /// Finishes one whose files came from elsewhere, with the manifest `text`: verifies all of it
    /// before it has a name.
    pub(super) fn take_in(
        self,
        text: &[u8],
        manifest: &Manifest,
        runtime: &Runtime,
    ) -> Result<Template> {
        self.write_manifest(text)?;
        Template::open(&self.dir)?.verify(|_| {})?;
        let template = self.publish(manifest)?;
        template.note_verified(runtime, &template.stamp()?)?;
        Ok(template)
    }

    fn write_manifest(&self, text: &[u8]) -> Result<()> {
        faults::step("before the manifest")?;
        let path = self.dir.join(manifest::FILE);
        fs::write(&path, text).map_err(failed("write", &path))?;
        faults::step("after the manifest")
    }

    /// Makes all files durable, and gives the template its name.
    fn publish(self, manifest: &Manifest) -> Result<Template> {
        for name in manifest.content.files().chain([manifest::FILE]) {
            let path = self.dir.join(name);
            seal(&path).map_err(failed("make durable", &path))?;
            faults::step("after a file was made durable")?;
        }
        sync_dir(&self.dir)?;
        faults::step("before the rename")?;
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            &self.dir,
            rustix::fs::CWD,
            &self.target,
            RenameFlags::NOREPLACE,
        )
        .map_err(|error| match error {
            Errno::EXIST => taken(&self.target),
            error => failed("make", &self.target)(error.into()),
        })?;
        faults::step("after the rename")?;
        let target = self.target.clone();
        sync_dir(target.parent().unwrap_or(Path::new("/")))?;
        // It has its name: dropping this removes nothing.
        drop(self);
        Template::open(&target)
    }

    fn describe(&self, parts: Parts) -> Result<Content> {
        let mut layers = Vec::new();
        let mut bytes = 0;
        for name in &self.memory {
            let path = self.dir.join(name);
            let file = File::open(&path).map_err(failed("open", &path))?;
            let layer =
                Layer::open(file, name.clone()).map_err(|error| ApiError::internal(&error))?;
            bytes = layer.layout().size();
            layers.push(MemoryLayer {
                file: name.clone(),
                id: layer.id().to_string(),
                data_bytes: layer.data().bytes(),
            });
        }
        let mut disks = Vec::new();
        for (base, layers) in &self.disks {
            disks.push(manifest::Disk {
                base: self.hashed(base)?,
                layers: layers
                    .iter()
                    .map(|l| self.hashed(l))
                    .collect::<Result<_>>()?,
            });
        }
        Ok(Content {
            parent: parts.parent,
            created_unix_ms: parts.created_unix_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            agent_version: parts.agent_version,
            config: parts.config,
            memory: Memory { bytes, layers },
            state: self.hashed("state")?,
            disks,
            cpu: parts.cpu,
        })
    }

    fn hashed(&self, name: &str) -> Result<HashedFile> {
        let path = self.dir.join(name);
        let file = File::open(&path).map_err(failed("open", &path))?;
        let hash = match self.known.get(name) {
            Some(hash) => hash.clone(),
            None => verify::hash_of(&file).map_err(failed("read", &path))?,
        };
        Ok(HashedFile {
            file: name.to_owned(),
            bytes: file.metadata().map_err(failed("look at", &path))?.len(),
            hash,
        })
    }

    fn share_hashed(&mut self, parent: &Template, file: &HashedFile, name: &str) -> Result<()> {
        if self.share(&parent.path(&file.file), name)? {
            self.known.insert(name.to_owned(), file.hash.clone());
        }
        Ok(())
    }

    /// Takes a file of another template: the same one where both are on one file system, or else
    /// a copy. Whether it is the same.
    fn share(&self, from: &Path, name: &str) -> Result<bool> {
        let to = self.dir.join(name);
        if fs::hard_link(from, &to).is_ok() {
            return Ok(true);
        }
        // Another file system, or one without links.
        let file = self.create(name)?;
        copy_image(from, &file).map_err(failed("copy", from))?;
        Ok(false)
    }
}

impl Drop for NewTemplate {
    fn drop(&mut self) {
        // After a commit there is nothing under this name.
        if let Err(error) = remove_all(&self.dir) {
            tracing::warn!(message = error.message, "half a template is left");
        }
    }
}

fn taken(target: &Path) -> ApiError {
    ApiError::new(
        ErrorCode::Conflict,
        format!("{} exists already", target.display()),
    )
    .advise("use another name, or remove it first: clone template rm")
}

/// Whether files of templates are called so.
pub(super) fn is_file_of_a_template(name: &str) -> bool {
    let memory = name.starts_with("memory-") && name.ends_with(".layer");
    let disk = name.starts_with("disk-") && (name.ends_with(".raw") || name.contains(".layer-"));
    let others = [manifest::FILE, "state", prefetch::FILE, "prefetch.new"];
    memory || disk || others.contains(&name)
}

/// A name beside `target` that is nobody's.
pub(super) fn hidden_name(target: &Path) -> Result<PathBuf> {
    let mut random = [0; 6];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| ApiError::internal(&io::Error::from(error)))?;
    let suffix: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    Ok(target.with_file_name(format!(".{name}{MARK}{suffix}")))
}

/// Makes a hidden directory for the template at `target`, and locks it. Another maker's sweep may
/// come between the two: then another is made.
fn make_locked(target: &Path) -> Result<(PathBuf, File)> {
    loop {
        let dir = hidden_name(target)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(failed("make", &dir))?;
        match lock(&dir) {
            Ok(Some(lock)) => return Ok((dir, lock)),
            Ok(None) => {}
            Err(error) => {
                remove_all(&dir)?;
                return Err(error);
            }
        }
    }
}

/// Locks a directory that was just made; `None` where a sweep was faster.
fn lock(dir: &Path) -> Result<Option<File>> {
    faults::step("before the lock")?;
    let locked = open_dir(dir).and_then(|opened| {
        rustix::fs::flock(&opened, FlockOperation::NonBlockingLockExclusive)?;
        // It may have been removed between the two.
        rustix::fs::lstat(dir).map(|_| opened)
    });
    match locked {
        Ok(lock) => Ok(Some(lock)),
        Err(Errno::NOENT | Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed("lock", dir)(error.into())),
    }
}

fn open_dir(path: &Path) -> rustix::io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(File::from)
}

/// Removes what makers left that are gone.
fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(failed("list", parent))? {
        let entry = entry.map_err(failed("list", parent))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !(name.starts_with('.') && name.contains(MARK)) {
            continue;
        }
        // Locked until it is gone, so that a maker that has just made it sees that it is lost.
        let dir = match open_dir(&entry.path()) {
            Ok(dir) => dir,
            // Gone, no directory, or another user's, which is for that user to sweep.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => continue,
            Err(error) => return Err(failed("open", &entry.path())(error.into())),
        };
        if rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
            remove_all(&entry.path())?;
        }
    }
    Ok(())
}

pub(super) fn remove_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// Makes a file durable, and forbids to change it.
fn seal(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    file.set_permissions(Permissions::from_mode(0o400))?;
    file.sync_all()
}

fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|opened| opened.sync_all());
    synced.map_err(failed("make durable", dir))
}

/// Copies an image or a layer with its holes.
fn copy_image(from: &Path, to: &File) -> io::Result<()> {
    clone_disk::copy_file(&File::open(from)?, to)
}
