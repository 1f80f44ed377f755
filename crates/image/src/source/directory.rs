//! Reads a directory of the host into a tree: owners, modes, times, attributes, hard links and devices as they are.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::layer::is_kept;
use crate::progress::{Progress, Step};
use crate::tree::{Content, Kind, Meta, Node, NodeId, Tree};
use crate::{ImageError, Result};

/// Whose files the image's files are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ownership {
    /// The owners that they have on the host.
    #[default]
    Keep,
    /// All belong to root: for a directory that an ordinary user made.
    Root,
}

struct Scan<'a> {
    tree: &'a mut Tree,
    ownership: Ownership,
    /// The file system that the scan stays on.
    dev: u64,
    seen: HashMap<u64, NodeId>,
    bytes: u64,
}

/// Fills a tree from a directory. Other file systems mounted below it are left out, their mount points kept.
pub(crate) fn read(
    tree: &mut Tree,
    root: &Path,
    ownership: Ownership,
    progress: &dyn Progress,
) -> Result<()> {
    progress.begin(Step::Scan, None);
    let meta = fs::metadata(root).map_err(ImageError::io("open the directory", root))?;
    if !meta.is_dir() {
        return Err(ImageError::Unsupported {
            what: format!("{} is not a directory", root.display()),
            advice: "give a directory, an OCI layout or an archive of `docker save`".to_owned(),
        });
    }
    let mut scan = Scan {
        tree,
        ownership,
        dev: meta.dev(),
        seen: HashMap::new(),
        bytes: 0,
    };
    let own = scan.meta(root, &meta)?;
    scan.tree.node_mut(NodeId::ROOT).meta = own;
    let mut todo: Vec<(PathBuf, NodeId)> = vec![(root.to_owned(), NodeId::ROOT)];
    while let Some((dir, id)) = todo.pop() {
        for item in fs::read_dir(&dir).map_err(ImageError::io("read the directory", &dir))? {
            let item = item.map_err(ImageError::io("read the directory", &dir))?;
            let path = item.path();
            let meta =
                fs::symlink_metadata(&path).map_err(ImageError::io("read the status of", &path))?;
            let made = scan.add(id, item.file_name().as_bytes(), &path, &meta)?;
            if meta.is_dir() && meta.dev() == scan.dev {
                todo.push((path, made));
            }
        }
        progress.advance(0);
    }
    Ok(())
}

impl Scan<'_> {
    fn add(
        &mut self,
        dir: NodeId,
        name: &[u8],
        path: &Path,
        meta: &fs::Metadata,
    ) -> Result<NodeId> {
        if let Some(&known) = self.seen.get(&meta.ino())
            && !meta.is_dir()
        {
            self.tree.enter(dir, name, known)?;
            return Ok(known);
        }
        let kind = self.kind(path, meta)?;
        let node = Node {
            meta: self.meta(path, meta)?,
            kind,
        };
        let id = self.tree.put(dir, name, node)?;
        if meta.nlink() > 1 && !meta.is_dir() && meta.dev() == self.dev {
            self.seen.insert(meta.ino(), id);
        }
        Ok(id)
    }

    fn kind(&mut self, path: &Path, meta: &fs::Metadata) -> Result<Kind> {
        let kind = meta.file_type();
        let (major, minor) = (
            rustix::fs::major(meta.rdev()),
            rustix::fs::minor(meta.rdev()),
        );
        Ok(if kind.is_dir() {
            Kind::empty_dir()
        } else if kind.is_file() {
            self.bytes += meta.len();
            if self.bytes > self.tree.limits().content_bytes {
                return Err(ImageError::Limit {
                    what: "the size of the directory's files".to_owned(),
                    limit: format!("{} bytes", self.tree.limits().content_bytes),
                    advice: "leave large files out, or raise the limit",
                });
            }
            Kind::File(Content::Host {
                path: path.to_owned(),
                dev: meta.dev(),
                ino: meta.ino(),
                len: meta.len(),
            })
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(ImageError::io("read the link", path))?;
            Kind::Symlink(target.into_os_string().into_vec())
        } else if kind.is_char_device() {
            Kind::CharDevice { major, minor }
        } else if kind.is_block_device() {
            Kind::BlockDevice { major, minor }
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        })
    }

    fn meta(&self, path: &Path, meta: &fs::Metadata) -> Result<Meta> {
        let (uid, gid) = match self.ownership {
            Ownership::Keep => (meta.uid(), meta.gid()),
            Ownership::Root => (0, 0),
        };
        Ok(Meta {
            mode: (meta.mode() & 0o7777) as u16,
            uid,
            gid,
            mtime: meta.mtime(),
            mtime_ns: u32::try_from(meta.mtime_nsec()).unwrap_or_default(),
            xattrs: xattrs(path)?,
        })
    }
}

/// The attributes of a file itself, not of what it links to.
fn xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    use rustix::io::Errno;
    let failed = |e: Errno| ImageError::io("read the attributes of", path)(e.into());
    // The kernel's own limits on a list of names and on a value.
    let mut names = vec![0u8; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP | Errno::ACCESS | Errno::PERM) => return Ok(BTreeMap::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut out = BTreeMap::new();
    for name in names[..length]
        .split(|&b| b == 0)
        .filter(|name| is_kept(name))
    {
        let mut value = vec![0u8; 64 << 10];
        match rustix::fs::lgetxattr(path, name, &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                out.insert(name.to_vec(), value);
            }
            // Gone since it was listed.
            Err(Errno::NODATA) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(out)
}
