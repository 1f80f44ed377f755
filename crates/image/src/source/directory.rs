//! Reads a directory of the host into a tree: owners, modes, times, attributes, hard links and devices as they are.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Stat, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::layer::is_kept;
use crate::progress::{Progress, Step};
use crate::tree::{Content, HostDir, HostFile, Kind, MAX_DEPTH, Meta, Node, NodeId, Tree, changed};
use crate::{ImageError, Result};

/// The owners of the image's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ownership {
    /// The owners on the host.
    #[default]
    Keep,
    /// All files belong to root, for a directory that an ordinary user made.
    Root,
}

struct Scan<'a> {
    tree: &'a mut Tree,
    ownership: Ownership,
    root: Arc<HostDir>,
    /// The file system that the scan stays on.
    dev: u64,
    /// Files with several names, by device and inode: an inode's number alone is unique on its file system only,
    /// and a file of another one may be mounted anywhere.
    links: HashMap<(u64, u64), (Stat, NodeId)>,
    bytes: u64,
    left_out: Vec<PathBuf>,
}

/// A directory that is to be read.
struct Todo {
    below: PathBuf,
    depth: usize,
    node: NodeId,
}

/// Fills a tree from a directory. Directories on which other file systems are mounted are left out but for their
/// mount points, which are returned.
pub(crate) fn read(
    tree: &mut Tree,
    root: &Path,
    ownership: Ownership,
    progress: &dyn Progress,
) -> Result<Vec<PathBuf>> {
    progress.begin(Step::Scan, None);
    let meta = std::fs::metadata(root).map_err(ImageError::io("open the directory", root))?;
    if !meta.is_dir() {
        return Err(ImageError::Unsupported {
            what: format!("{} is not a directory", root.display()),
            advice: "give a directory, an OCI layout or an archive of `docker save`".to_owned(),
        });
    }
    let host = HostDir::open(root)?;
    let failed = |e: io::Error| ImageError::io("read the status of", root)(e);
    let dir = host.dir(Path::new("")).map_err(failed)?;
    let stat = rustix::fs::fstat(&dir).map_err(|e| failed(e.into()))?;
    let mut scan = Scan {
        tree,
        ownership,
        root: Arc::new(host),
        dev: stat.st_dev,
        links: HashMap::new(),
        bytes: 0,
        left_out: Vec::new(),
    };
    let own = scan.meta(&dir, OsStr::new("."), Path::new(""), &stat)?;
    scan.tree.node_mut(NodeId::ROOT).meta = own;
    let mut todo = vec![Todo {
        below: PathBuf::new(),
        depth: 1,
        node: NodeId::ROOT,
    }];
    while let Some(dir) = todo.pop() {
        scan.directory(&dir, &mut todo)?;
        progress.advance(0);
    }
    Ok(scan.left_out)
}

impl Scan<'_> {
    fn failed(
        &self,
        action: &'static str,
        below: &Path,
    ) -> impl FnOnce(io::Error) -> ImageError + use<> {
        let path = self.root.path_of(below);
        move |error| match error.kind() {
            // The file has been removed meanwhile.
            io::ErrorKind::NotFound => changed(&path),
            _ => ImageError::io(action, path)(error),
        }
    }

    fn directory(&mut self, at: &Todo, todo: &mut Vec<Todo>) -> Result<()> {
        let unreadable = |this: &Self| this.failed("read the directory", &at.below);
        let dir = self.root.dir(&at.below).map_err(|e| unreadable(self)(e))?;
        let entries = rustix::fs::Dir::read_from(&dir).map_err(|e| unreadable(self)(e.into()))?;
        for entry in entries {
            let entry = entry.map_err(|e| unreadable(self)(e.into()))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let below = at.below.join(name);
            let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| self.failed("read the status of", &below)(e.into()))?;
            let node = self.add(&dir, at.node, name, &below, &stat)?;
            if !FileType::from_raw_mode(stat.st_mode).is_dir() {
                continue;
            }
            if self.is_elsewhere(&dir, name, &stat) {
                self.left_out.push(self.root.path_of(&below));
                continue;
            }
            let depth = at.depth + 1;
            if depth > MAX_DEPTH {
                return Err(ImageError::Limit {
                    what: format!("the depth of {}", self.root.path_of(&below).display()),
                    limit: format!("{MAX_DEPTH} directories"),
                    advice: "leave it out",
                });
            }
            todo.push(Todo { below, depth, node });
        }
        Ok(())
    }

    /// Whether another file system is mounted on this directory. A subvolume has a device number of its own, too, but
    /// belongs to the file system that it lies in.
    fn is_elsewhere(&self, dir: &OwnedFd, name: &OsStr, stat: &Stat) -> bool {
        if stat.st_dev == self.dev {
            return false;
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let mount_root = StatxAttributes::MOUNT_ROOT;
        match rustix::fs::statx(dir, name, flags, StatxFlags::empty()) {
            Ok(statx) if statx.stx_attributes_mask.contains(mount_root) => {
                statx.stx_attributes.contains(mount_root)
            }
            _ => true,
        }
    }

    fn add(
        &mut self,
        dir: &OwnedFd,
        parent: NodeId,
        name: &OsStr,
        below: &Path,
        stat: &Stat,
    ) -> Result<NodeId> {
        let is_dir = FileType::from_raw_mode(stat.st_mode).is_dir();
        let inode = (stat.st_dev, stat.st_ino);
        if let Some((first, known)) = self.links.get(&inode)
            && !is_dir
            && is_same(first, stat)
        {
            let known = *known;
            self.tree.enter(parent, name.as_bytes(), known)?;
            return Ok(known);
        }
        let node = Node {
            kind: self.kind(dir, name, below, stat)?,
            meta: self.meta(dir, name, below, stat)?,
        };
        let id = self.tree.put(parent, name.as_bytes(), node)?;
        if stat.st_nlink > 1 && !is_dir {
            self.links.insert(inode, (*stat, id));
        }
        Ok(id)
    }

    fn kind(&mut self, dir: &OwnedFd, name: &OsStr, below: &Path, stat: &Stat) -> Result<Kind> {
        let (major, minor) = (
            rustix::fs::major(stat.st_rdev),
            rustix::fs::minor(stat.st_rdev),
        );
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::empty_dir(),
            FileType::RegularFile => {
                let file = HostFile::found(&self.root, below.to_owned(), stat)?;
                self.bytes += file.data().iter().map(|(_, len)| len).sum::<u64>();
                if self.bytes > self.tree.limits().content_bytes {
                    return Err(ImageError::Limit {
                        what: "the size of the directory's files".to_owned(),
                        limit: format!("{} bytes", self.tree.limits().content_bytes),
                        advice: "leave large files out, or raise the limit",
                    });
                }
                Kind::File(Content::Host(file))
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())
                    .map_err(|e| self.failed("read the link", below)(e.into()))?;
                Kind::Symlink(target.into_bytes())
            }
            FileType::CharacterDevice => Kind::CharDevice { major, minor },
            FileType::BlockDevice => Kind::BlockDevice { major, minor },
            FileType::Fifo => Kind::Fifo,
            FileType::Socket | FileType::Unknown => Kind::Socket,
        })
    }

    fn meta(&self, dir: &OwnedFd, name: &OsStr, below: &Path, stat: &Stat) -> Result<Meta> {
        let (uid, gid) = match self.ownership {
            Ownership::Keep => (stat.st_uid, stat.st_gid),
            Ownership::Root => (0, 0),
        };
        let xattrs = xattrs(dir, name)
            .map_err(|e| self.failed("read the attributes of", below)(e.into()))?;
        Ok(Meta {
            mode: (stat.st_mode & 0o7777) as u16,
            uid,
            gid,
            mtime: stat.st_mtime,
            mtime_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
            xattrs,
        })
    }
}

/// Whether one inode's number stands for one file: some network and user-space file systems give a number twice.
fn is_same(a: &Stat, b: &Stat) -> bool {
    let facts = |stat: &Stat| {
        (
            (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev),
            (stat.st_size, stat.st_nlink),
            (stat.st_mtime, stat.st_mtime_nsec),
        )
    };
    facts(a) == facts(b)
}

/// The attributes of a file itself, not of what it links to.
fn xattrs(dir: &OwnedFd, name: &OsStr) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Errno> {
    // These calls know paths only; this one leads through the descriptor and is never too long.
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd())).join(name);
    // The kernel's own limits on a list of names and on a value.
    let mut names = vec![0u8; 64 << 10];
    let length = match rustix::fs::llistxattr(&path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP | Errno::ACCESS | Errno::PERM) => return Ok(BTreeMap::new()),
        Err(e) => return Err(e),
    };
    let mut out = BTreeMap::new();
    for name in names[..length]
        .split(|&b| b == 0)
        .filter(|name| is_kept(name))
    {
        let mut value = vec![0u8; 64 << 10];
        match rustix::fs::lgetxattr(&path, name, &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                out.insert(name.to_vec(), value);
            }
            // The file has been removed since it was listed.
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(out)
}
