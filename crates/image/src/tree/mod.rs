//! A file tree in memory: the one form that every source is turned into and every image is made from.
//!
//! Only metadata and names are held here; file contents stay in a spool file or on the host ([`Content`]). As nothing
//! is ever unpacked onto the host's file system, no archive can write outside its own tree, and no privilege is
//! needed for owners, device nodes or extended attributes.

mod content;
mod host_file;
mod path;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub(crate) use content::{Content, ContentReader, Spool};
pub(crate) use host_file::{HostDir, HostFile, changed};
pub(crate) use path::{MAX_DEPTH, PathError, components};

use crate::{ImageError, Result};

/// Index of a node in its [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub(crate) const ROOT: Self = Self(0);

    /// For tables indexed by node.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Owner, permissions, time and extended attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits with set-id and sticky bits: the low twelve bits of `st_mode`.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Modification time in seconds since 1970, and nanoseconds.
    pub(crate) mtime: i64,
    pub(crate) mtime_ns: u32,
    /// By full name (`security.capability`), as `getxattr` gives the value.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Meta {
    /// Metadata of something that belongs to root.
    pub(crate) fn root(mode: u16, mtime: i64) -> Self {
        Self {
            mode,
            mtime,
            ..Self::default()
        }
    }
}

/// What a node is.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Dir(BTreeMap<Vec<u8>, NodeId>),
    File(Content),
    Symlink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

impl Kind {
    pub(crate) fn empty_dir() -> Self {
        Self::Dir(BTreeMap::new())
    }
}

/// An inode of the tree. Several directory entries may name one node: hard links.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// How much a tree may hold, so that no input can exhaust the host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Directory entries and nodes ever made, deleted ones included.
    pub entries: u64,
    /// Bytes of file contents ever read, deleted ones included.
    pub content_bytes: u64,
    /// Bytes of names, link targets and extended attributes.
    pub metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            content_bytes: 256 << 30,
            metadata_bytes: 1 << 30,
        }
    }
}

/// The tree. Nodes that no entry names any more stay in the arena and are left out of the image.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    limits: Limits,
    entries: u64,
    metadata_bytes: u64,
}

impl Tree {
    /// A tree of one empty root directory.
    pub(crate) fn new(limits: Limits) -> Self {
        let root = Node {
            meta: Meta::root(0o755, 0),
            kind: Kind::empty_dir(),
        };
        Self {
            nodes: vec![root],
            limits,
            entries: 0,
            metadata_bytes: 0,
        }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// The number of nodes in the arena; every [`NodeId::index`] is below it.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A directory's entries in order of name bytes; `None` for anything else.
    pub(crate) fn dir(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.node(id).kind {
            Kind::Dir(entries) => Some(entries),
            _ => None,
        }
    }

    /// The entry of this name, not followed if it is a symbolic link.
    pub(crate) fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.dir(dir)?.get(name).copied()
    }

    /// Adds a node that no entry names yet.
    pub(crate) fn add(&mut self, node: Node) -> Result<NodeId> {
        let target = if let Kind::Symlink(target) = &node.kind {
            target.len()
        } else {
            0
        };
        let xattrs: usize = node
            .meta
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        self.charge(target + xattrs)?;
        let id = u32::try_from(self.nodes.len()).map_err(|_| self.too_many())?;
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    /// Names a node in a directory, in place of what had this name before.
    ///
    /// # Panics
    /// If `dir` is not a directory: callers have resolved it.
    pub(crate) fn enter(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<()> {
        self.charge(name.len())?;
        match &mut self.node_mut(dir).kind {
            Kind::Dir(entries) => entries.insert(name.to_vec(), node),
            _ => panic!("entering a name into a node that is no directory"),
        };
        Ok(())
    }

    /// Removes an entry; true if there was one.
    pub(crate) fn remove(&mut self, dir: NodeId, name: &[u8]) -> bool {
        match &mut self.node_mut(dir).kind {
            Kind::Dir(entries) => entries.remove(name).is_some(),
            _ => false,
        }
    }

    /// Adds a node under a name; a directory that is there already keeps its entries and takes the new metadata.
    pub(crate) fn put(&mut self, dir: NodeId, name: &[u8], node: Node) -> Result<NodeId> {
        if matches!(node.kind, Kind::Dir(_))
            && let Some(old) = self.child(dir, name)
            && self.dir(old).is_some()
        {
            self.node_mut(old).meta = node.meta;
            return Ok(old);
        }
        let id = self.add(node)?;
        self.enter(dir, name, id)?;
        Ok(id)
    }

    /// Puts a node at a path of the guest (`/etc/hostname`); missing parents are made, links in them followed.
    pub(crate) fn put_at(&mut self, path: &str, node: Node) -> Result<NodeId> {
        let mtime = node.meta.mtime;
        let refused = |e: PathError| ImageError::malformed(format!("the image's {path}"), e);
        let parts = components(path.as_bytes()).map_err(refused)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(refused(PathError::Empty));
        };
        let parent = self.make_dirs(parents, mtime)?.map_err(refused)?.dir;
        self.put(parent, name, node)
    }

    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.entries += 1;
        self.metadata_bytes += bytes as u64;
        if self.entries > self.limits.entries {
            return Err(self.too_many());
        }
        if self.metadata_bytes > self.limits.metadata_bytes {
            return Err(ImageError::Limit {
                what: "the size of names and attributes in the image".to_owned(),
                limit: format!("{} bytes", self.limits.metadata_bytes),
                advice: "this is far beyond any usual image: check where it comes from",
            });
        }
        Ok(())
    }

    fn too_many(&self) -> ImageError {
        ImageError::Limit {
            what: "the number of files in the image".to_owned(),
            limit: self.limits.entries.to_string(),
            advice: "check where the image comes from, or raise the limit",
        }
    }

    /// The limits this tree was made with.
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }
}
