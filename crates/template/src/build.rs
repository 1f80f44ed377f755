//! Makes a template under a hidden name, and renames it when it is complete.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clone_api::config::DiskFormat;
use clone_api::shape::Ceilings;
use clone_api::{ApiError, Bytes, ErrorCode, Shape};
use clone_disk::{Disk, EngineKind};
use clone_memory::Layer;
use clone_start::disks;
use clone_start::document::ForkDisk;
use clone_start::error::{Result, failed};
use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::content::{self, Content, HashedFile, Memory, MemoryLayer};
use super::folder::Folder;
use super::manifest::{self, Manifest};
use super::names::{self, INITRD, KERNEL, STATE, refused};
use super::{Template, faults, kernel, verify};
use crate::Verified;

/// The part of the hidden name of a template under construction that follows the template's name.
const MARK: &str = ".tmp-";

/// The parts of the manifest that are not determined by the files.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The id of the template that the new one is a difference to.
    pub parent: Option<String>,
    /// The guest's agent's version.
    pub agent_version: Option<String>,
    /// The machine's shape; the sizes of its disks are taken from their files.
    pub shape: Shape,
    /// The limits that forks are narrowed to.
    pub ceilings: Ceilings,
    /// The CPU features that the guest was given.
    pub cpu: clone_api::control::CpuFeatures,
    /// The time when the template was taken.
    pub created_unix_ms: u64,
}

impl Parts {
    /// The parts of a template with the same machine in other files, which is not a difference.
    pub(super) fn same_as(content: &Content) -> Self {
        Self {
            parent: None,
            agent_version: content.agent_version.clone(),
            shape: content.shape.clone(),
            ceilings: content.ceilings.clone(),
            cpu: content.cpu.clone(),
            created_unix_ms: content.created_unix_ms,
        }
    }
}

/// A template under construction. If it is dropped without [`NewTemplate::commit`], it is removed.
#[derive(Debug)]
pub struct NewTemplate {
    /// The directory in which the template gets its name.
    parent: Folder,
    target: PathBuf,
    /// The template's directory. The lock shows that its maker still runs.
    folder: Folder,
    /// The files of the memory layers, the base first.
    memory: Vec<String>,
    /// The files of each disk: its base and its layers.
    disks: Vec<(String, Vec<String>)>,
    has_kernel: bool,
    has_initrd: bool,
    /// The known hashes of files that are shared with a parent, by their names here.
    known: BTreeMap<String, String>,
}

impl NewTemplate {
    /// Starts a template for the path `target`, which must not exist.
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
        let parent = Folder::open(parent)?;
        sweep(parent.path())?;
        let folder = make_locked(&target)?;
        Ok(Self {
            parent,
            target,
            folder,
            memory: Vec::new(),
            disks: Vec::new(),
            has_kernel: false,
            has_initrd: false,
            known: BTreeMap::new(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn create(&self, name: &str) -> Result<File> {
        faults::step("before a file")?;
        let created = self.folder.create(name);
        created.map_err(failed("make", &self.path(name)))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let removed = self.folder.remove(name);
        removed.map_err(failed("remove", &self.path(name)))
    }

    /// Makes the file of the next memory layer, on top of the existing ones.
    pub fn memory_file(&mut self) -> Result<File> {
        let name = format!("memory-{}.layer", self.memory.len());
        let file = self.create(&name)?;
        self.memory.push(name);
        Ok(file)
    }

    /// Makes the file of the machine's state.
    pub fn state_file(&self) -> Result<File> {
        self.create(STATE)
    }

    /// Makes the file of the kernel that the guest reboots into.
    pub fn kernel_file(&mut self) -> Result<File> {
        self.has_kernel = true;
        self.create(KERNEL)
    }

    /// Makes the file of the initial RAM disk that goes with the kernel.
    pub fn initrd_file(&mut self) -> Result<File> {
        self.has_initrd = true;
        self.create(INITRD)
    }

    /// Removes the kernel's file, to which nothing was written.
    pub fn drop_kernel(&mut self) -> Result<()> {
        self.has_kernel = false;
        self.remove(KERNEL)
    }

    /// Removes the initial RAM disk's file, to which nothing was written.
    pub fn drop_initrd(&mut self) -> Result<()> {
        self.has_initrd = false;
        self.remove(INITRD)
    }

    /// Shares the kernel of `parent`, whose files must have been verified.
    pub fn share_kernel(&mut self, parent: &Template) -> Result<()> {
        if let Some(kernel) = &parent.content().kernel {
            self.share_hashed(parent, kernel, KERNEL)?;
            self.has_kernel = true;
        }
        if let Some(initrd) = &parent.content().initrd {
            self.share_hashed(parent, initrd, INITRD)?;
            self.has_initrd = true;
        }
        Ok(())
    }

    /// Shares the machine's state of `parent`.
    pub(super) fn share_state(&mut self, parent: &Template) -> Result<()> {
        self.share_hashed(parent, &parent.content().state, STATE)
    }

    /// Shares the memory layers of `parent`, on which a new layer is put.
    pub fn share_memory(&mut self, parent: &Template) -> Result<()> {
        for layer in &parent.content().memory.layers {
            let name = format!("memory-{}.layer", self.memory.len());
            self.share(parent, &layer.file, &name)?;
            self.memory.push(name);
        }
        Ok(())
    }

    /// Adds a disk that shares its base image and its first `layers` layers with disk `index` of
    /// `parent`, whose files must have been verified; they are not hashed again.
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

    /// Adds a disk, and makes the file for its whole content as a raw image.
    pub fn disk_file(&mut self) -> Result<File> {
        let name = format!("disk-{}.raw", self.disks.len());
        let file = self.create(&name)?;
        self.disks.push((name, Vec::new()));
        Ok(file)
    }

    /// Adds a disk with a copy of the base image of `disk`. The caller adds the layers over it.
    pub fn copy_disk(&mut self, disk: &ForkDisk) -> Result<()> {
        let Some((image, format)) = &disk.base else {
            let message = "a disk without an image cannot be copied";
            return Err(ApiError::new(ErrorCode::Internal, message));
        };
        let copy = self.disk_file()?;
        let path = &image.path;
        let file = image.open()?;
        let is_file = file.metadata().map_err(failed("look at", path))?.is_file();
        if *format == DiskFormat::Raw && is_file {
            return clone_disk::copy_file(&file, &copy).map_err(failed("copy", path));
        }
        // A block device has no file length and no holes that file calls can find.
        let files = disks::open_image(disk)?;
        let opened = Disk::open(files, EngineKind::Blocking);
        let mut opened = opened.map_err(|error| ApiError::internal(&error))?;
        opened.write_raw(&copy).map_err(failed("convert", path))
    }

    /// Adds a copy of a layer to disk `index`.
    pub fn copy_layer(&mut self, index: usize, layer: &Path) -> Result<()> {
        let file = self.disk_layer_file(index)?;
        copy_image(layer, &file).map_err(failed("copy", layer))
    }

    /// Makes the file of another layer of disk `index`.
    pub fn disk_layer_file(&mut self, index: usize) -> Result<File> {
        let name = format!("disk-{index}.layer-{}", self.disks[index].1.len());
        let file = self.create(&name)?;
        self.disks[index].1.push(name);
        Ok(file)
    }

    /// Removes the last layer of disk `index`, to which nothing was written.
    pub fn drop_disk_layer(&mut self, index: usize) -> Result<()> {
        match self.disks[index].1.pop() {
            Some(name) => self.remove(&name),
            None => Ok(()),
        }
    }

    /// Finishes the template: writes its manifest, makes it durable, and gives it its name.
    pub fn commit(self, parts: Parts, verified: Option<&Verified>) -> Result<Template> {
        let content = self.describe(parts)?;
        content
            .check()
            .map_err(|reason| refused(&self.target, &reason))?;
        self.share_kernels(&content)?;
        let manifest = Manifest {
            format: manifest::FORMAT,
            id: content.id()?,
            content,
        };
        let text =
            serde_json::to_vec_pretty(&manifest).map_err(|error| ApiError::internal(&error))?;
        self.write_manifest(&text)?;
        let template = self.publish(&manifest)?;
        if let Some(verified) = verified {
            template.note_verified(verified, &template.stamp()?)?;
        }
        Ok(template)
    }

    /// Finishes a template whose files were received, with the manifest `text`: verifies everything
    /// before it gets its name.
    pub(super) fn take_in(
        self,
        text: &[u8],
        manifest: &Manifest,
        verified: &Verified,
    ) -> Result<Template> {
        self.write_manifest(text)?;
        let folder = self.folder.at(self.folder.path())?;
        Template::open_folder(folder)?.verify(|_| {})?;
        self.share_kernels(&manifest.content)?;
        let template = self.publish(manifest)?;
        template.note_verified(verified, &template.stamp()?)?;
        Ok(template)
    }

    /// Replaces kernel and initial RAM disk by the same files of a template in the same directory,
    /// if there are any.
    fn share_kernels(&self, content: &Content) -> Result<()> {
        for file in content.kernel.iter().chain(&content.initrd) {
            if !self.known.contains_key(&file.file) {
                kernel::share(&self.parent, &self.folder, file)?;
            }
        }
        Ok(())
    }

    fn write_manifest(&self, text: &[u8]) -> Result<()> {
        faults::step("before the manifest")?;
        let mut file = self.create(names::MANIFEST)?;
        file.write_all(text)
            .map_err(failed("write", &self.path(names::MANIFEST)))?;
        faults::step("after the manifest")
    }

    /// Makes all files durable, and gives the template its name.
    fn publish(self, manifest: &Manifest) -> Result<Template> {
        for name in manifest.content.files().chain([names::MANIFEST]) {
            let sealed = self.folder.open_file(name).and_then(|file| seal(&file));
            sealed.map_err(failed("make durable", &self.path(name)))?;
            faults::step("after a file was made durable")?;
        }
        sync(&self.folder)?;
        faults::step("before the rename")?;
        rustix::fs::renameat_with(
            &self.parent,
            self.folder.path().file_name().unwrap_or_default(),
            &self.parent,
            self.target.file_name().unwrap_or_default(),
            RenameFlags::NOREPLACE,
        )
        .map_err(|error| match error {
            Errno::EXIST => taken(&self.target),
            error => failed("make", &self.target)(error.into()),
        })?;
        faults::step("after the rename")?;
        sync(&self.parent)?;
        // The handle stays on the same directory, even if another one is at its path now.
        let folder = self.folder.at(&self.target)?;
        // The template has its name, so dropping this value removes nothing.
        drop(self);
        Template::open_folder(folder)
    }

    fn describe(&self, parts: Parts) -> Result<Content> {
        let memory = self.describe_memory()?;
        let mut disks = Vec::new();
        for (base, layers) in &self.disks {
            disks.push(content::Disk {
                base: self.hashed(base)?,
                layers: layers
                    .iter()
                    .map(|l| self.hashed(l))
                    .collect::<Result<_>>()?,
            });
        }
        let mut shape = parts.shape;
        for (shape, disk) in shape.disks.iter_mut().zip(&disks) {
            shape.bytes = Bytes(disk.base.bytes);
        }
        let boots = |has: bool, name| has.then(|| self.hashed(name)).transpose();
        Ok(Content {
            parent: parts.parent,
            created_unix_ms: parts.created_unix_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            agent_version: parts.agent_version,
            shape,
            ceilings: parts.ceilings,
            memory,
            state: self.hashed(STATE)?,
            disks,
            kernel: boots(self.has_kernel, KERNEL)?,
            initrd: boots(self.has_initrd, INITRD)?,
            cpu: parts.cpu,
        })
    }

    fn describe_memory(&self) -> Result<Memory> {
        let mut layers = Vec::new();
        let mut bytes = 0;
        for name in &self.memory {
            let file = self.open(name)?;
            let len = file
                .metadata()
                .map_err(failed("look at", &self.path(name)))?
                .len();
            let layer =
                Layer::open(file, name.clone()).map_err(|error| ApiError::internal(&error))?;
            bytes = layer.layout().size();
            layers.push(MemoryLayer {
                file: name.clone(),
                bytes: Some(len),
                id: layer.id().to_string(),
                data_bytes: layer.data().bytes(),
            });
        }
        Ok(Memory { bytes, layers })
    }

    fn open(&self, name: &str) -> Result<File> {
        let opened = self.folder.open_file(name);
        opened.map_err(failed("open", &self.path(name)))
    }

    fn hashed(&self, name: &str) -> Result<HashedFile> {
        let file = self.open(name)?;
        let path = self.path(name);
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
        if self.share(parent, &file.file, name)? {
            self.known.insert(name.to_owned(), file.hash.clone());
        }
        Ok(())
    }

    /// Takes a file of another template: as a hard link if both are on one file system, otherwise
    /// as a copy. Returns whether it is a link.
    fn share(&self, parent: &Template, from: &str, to: &str) -> Result<bool> {
        let file = parent.file(from)?;
        let linked = self.folder.link(&parent.folder, from, file, to);
        if linked.map_err(failed("link", &self.path(to)))? {
            return Ok(true);
        }
        let copy = self.create(to)?;
        clone_disk::copy_file(file, &copy).map_err(failed("copy", &parent.path(from)))?;
        Ok(false)
    }
}

impl Drop for NewTemplate {
    fn drop(&mut self) {
        // After a commit, nothing has this hidden name.
        if let Err(error) = remove_all(self.folder.path()) {
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

/// Makes an unused hidden name in the directory of `target`.
pub(super) fn hidden_name(target: &Path) -> Result<PathBuf> {
    let suffix = clone_base::random::hex::<6>().map_err(|error| ApiError::internal(&error))?;
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    Ok(target.with_file_name(format!(".{name}{MARK}{suffix}")))
}

/// Makes and locks a hidden directory for the template at `target`. If another maker's sweep
/// removes it before it is locked, another one is made.
fn make_locked(target: &Path) -> Result<Folder> {
    loop {
        let dir = hidden_name(target)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(failed("make", &dir))?;
        match lock(&dir) {
            Ok(Some(folder)) => return Ok(folder),
            Ok(None) => {}
            Err(error) => {
                remove_all(&dir)?;
                return Err(error);
            }
        }
    }
}

/// Opens and locks a directory that was just made; `None` if a sweep removed it first.
fn lock(dir: &Path) -> Result<Option<Folder>> {
    faults::step("before the lock")?;
    let folder = match Folder::open(dir) {
        Err(_) if matches!(rustix::fs::lstat(dir), Err(Errno::NOENT)) => return Ok(None),
        folder => folder?,
    };
    // Other users who may write to the parent may have put their own directory there.
    folder.check_trusted()?;
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)
        // The directory may have been removed before it was locked.
        .and_then(|()| rustix::fs::lstat(dir))
    {
        Ok(_) => Ok(Some(folder)),
        Err(Errno::NOENT | Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed("lock", dir)(error.into())),
    }
}

fn open_dir(path: &Path) -> rustix::io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(File::from)
}

/// Removes the directories of makers that have ended.
fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(failed("list", parent))? {
        let entry = entry.map_err(failed("list", parent))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !(name.starts_with('.') && name.contains(MARK)) {
            continue;
        }
        // The directory stays locked until it is removed, so that a maker that has just made it
        // notices the loss.
        let dir = match open_dir(&entry.path()) {
            Ok(dir) => dir,
            // The entry was removed, is no directory, or belongs to another user, who sweeps it.
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

/// Makes a file durable and read-only.
fn seal(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o400))?;
    file.sync_all()
}

fn sync(folder: &Folder) -> Result<()> {
    let synced = folder.file().sync_all();
    synced.map_err(failed("make durable", folder.path()))
}

/// Copies an image or a layer with its holes.
fn copy_image(from: &Path, to: &File) -> io::Result<()> {
    clone_disk::copy_file(&File::open(from)?, to)
}
