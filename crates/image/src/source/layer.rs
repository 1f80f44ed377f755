//! Merges tar layers into a tree, as OCI's image specification says, whiteouts and opaque directories included.
//! (OCI image-spec, `layer.md`)
//!
//! Layers are untrusted. Paths cannot leave the tree, because there is nothing else here to reach; names that try are
//! refused all the same, since no honest image has them.

use std::collections::HashSet;
use std::io::{self, Read};

use tar::EntryType;

use super::tar_stream::{TarEntry, TarStream};
use crate::tree::{Kind, Meta, Node, NodeId, PathError, Spool, Tree, components};
use crate::{ImageError, Result};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that old AUFS hosts left in layers: neither they nor what lies below them are files of the image.
const AUFS: &[u8] = b".wh..wh.";

/// Merges one layer's members into a tree.
pub(crate) struct LayerMerge<'a> {
    tree: &'a mut Tree,
    spool: &'a mut Spool,
    /// The layer's name, for messages.
    what: String,
    /// Entries that this layer itself made: its whiteouts hide only what lies below.
    ours: HashSet<(NodeId, Vec<u8>)>,
}

impl<'a> LayerMerge<'a> {
    pub(crate) fn new(tree: &'a mut Tree, spool: &'a mut Spool, what: impl Into<String>) -> Self {
        Self {
            tree,
            spool,
            what: what.into(),
            ours: HashSet::new(),
        }
    }

    /// Merges a whole tar stream and reads it to its end, so that digests over it are complete.
    ///
    /// # Errors
    /// [`ImageError::Malformed`] names the member and what is wrong with it.
    pub(crate) fn merge(mut self, stream: impl Read) -> Result<()> {
        let mut tar = TarStream::new(stream);
        while let Some(entry) = tar.next_entry().map_err(|e| self.broken(&e))? {
            self.member(&entry, &mut tar)?;
        }
        // What follows the end mark is padding; it counts for the digest, and is bounded by the caller's reader.
        io::copy(&mut tar.into_inner(), &mut io::sink()).map_err(|e| self.broken(&e))?;
        Ok(())
    }

    fn broken(&self, e: &io::Error) -> ImageError {
        let reason = match e.kind() {
            io::ErrorKind::UnexpectedEof => "it is truncated".to_owned(),
            _ => e.to_string(),
        };
        ImageError::malformed(self.what.clone(), reason)
    }

    fn refuse(&self, entry: &TarEntry, reason: impl std::fmt::Display) -> ImageError {
        let path = String::from_utf8_lossy(&entry.path);
        ImageError::malformed(self.what.clone(), format!("{path:?} is refused: {reason}"))
    }

    fn member(&mut self, entry: &TarEntry, tar: &mut TarStream<impl Read>) -> Result<()> {
        let parts = components(&entry.path).map_err(|e| self.refuse(entry, e))?;
        let Some((&name, parents)) = parts.split_last() else {
            // The root directory's own entry.
            if entry.kind == EntryType::Directory {
                self.tree.node_mut(NodeId::ROOT).meta = meta_of(entry);
                return Ok(());
            }
            return Err(self.refuse(entry, PathError::Empty));
        };
        if parts.iter().any(|part| part.starts_with(AUFS)) && name != OPAQUE {
            return Ok(());
        }
        if name.starts_with(WHITEOUT) {
            return self.whiteout(entry, parents, name);
        }
        let parent = self.parent(entry, parents)?;
        self.ours.insert((parent, name.to_vec()));
        if entry.kind == EntryType::Link {
            return self.hard_link(entry, parent, name);
        }
        let kind = match entry.kind {
            EntryType::Directory => Kind::empty_dir(),
            EntryType::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(self.refuse(entry, "its target is empty or has a NUL byte"));
                }
                Kind::Symlink(entry.link.clone())
            }
            EntryType::Char => Kind::CharDevice {
                major: entry.device.0,
                minor: entry.device.1,
            },
            EntryType::Block => Kind::BlockDevice {
                major: entry.device.0,
                minor: entry.device.1,
            },
            EntryType::Fifo => Kind::Fifo,
            // Old archives mark directories by a slash at the end of the name.
            EntryType::Regular if entry.path.ends_with(b"/") => Kind::empty_dir(),
            EntryType::Regular | EntryType::Continuous => {
                let taken = self.spool.take(tar.data(), entry.size)?;
                Kind::File(taken.map_err(|e| self.broken(&e))?)
            }
            other => {
                return Err(self.refuse(
                    entry,
                    format!("its type {:?} is unknown", other.as_byte() as char),
                ));
            }
        };
        self.tree.put(
            parent,
            name,
            Node {
                meta: meta_of(entry),
                kind,
            },
        )?;
        Ok(())
    }

    /// The directory an entry goes into. Layers may leave parents out; they may also name a directory by a path
    /// through a link (`lib/x` where `lib` is a link to `usr/lib`), which is followed, and made to lead somewhere if it
    /// dangles.
    fn parent(&mut self, entry: &TarEntry, parents: &[&[u8]]) -> Result<NodeId> {
        let made = self
            .tree
            .make_dirs(parents, entry.mtime)?
            .map_err(|e| self.refuse(entry, e))?;
        self.ours.extend(made.new);
        Ok(made.dir)
    }

    fn hard_link(&mut self, entry: &TarEntry, parent: NodeId, name: &[u8]) -> Result<()> {
        let parts = components(&entry.link)
            .map_err(|e| self.refuse(entry, format!("as a hard link, {e}")))?;
        let found = parts.split_last().and_then(|(last, above)| {
            let dir = self.tree.resolve(above).ok()?;
            self.tree.child(dir, last)
        });
        match found {
            Some(node) if self.tree.dir(node).is_none() => self.tree.enter(parent, name, node),
            Some(_) => Err(self.refuse(entry, "it is a hard link to a directory")),
            None => {
                let target = String::from_utf8_lossy(&entry.link).into_owned();
                Err(self.refuse(
                    entry,
                    format!("it is a hard link to {target:?}, which does not exist"),
                ))
            }
        }
    }

    fn whiteout(&mut self, entry: &TarEntry, parents: &[&[u8]], name: &[u8]) -> Result<()> {
        let parent = match self.tree.resolve(parents) {
            Ok(parent) => parent,
            // Nothing is there to be hidden.
            Err(PathError::Missing | PathError::NotADirectory) => return Ok(()),
            Err(e) => return Err(self.refuse(entry, e)),
        };
        let hidden = &name[WHITEOUT.len()..];
        if name == OPAQUE {
            self.hide_below(parent);
        } else if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(self.refuse(entry, "it is a whiteout of nothing"));
        } else {
            self.hide(parent, hidden);
        }
        Ok(())
    }

    /// Hides what lower layers put under this name; true if nothing of this layer's is left there.
    fn hide(&mut self, dir: NodeId, name: &[u8]) -> bool {
        let Some(child) = self.tree.child(dir, name) else {
            return true;
        };
        // A directory link count of one path each: no entry leads back up, so this ends.
        let empty = self.hide_below(child);
        if self.ours.contains(&(dir, name.to_vec())) || !empty {
            return false;
        }
        self.tree.remove(dir, name);
        true
    }

    /// Hides everything of lower layers in this directory; true if nothing of this layer's is left in it.
    fn hide_below(&mut self, dir: NodeId) -> bool {
        let names: Vec<Vec<u8>> = self
            .tree
            .dir(dir)
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect();
        let mut empty = true;
        for name in &names {
            empty &= self.hide(dir, name);
        }
        empty
    }
}

fn meta_of(entry: &TarEntry) -> Meta {
    Meta {
        mode: (entry.mode & 0o7777) as u16,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_ns: entry.mtime_ns,
        xattrs: entry
            .xattrs
            .iter()
            .filter(|(name, _)| is_kept(name))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect(),
    }
}

/// Attributes that mean something in another system. Overlay file systems' own bookkeeping does not.
pub(super) fn is_kept(name: &[u8]) -> bool {
    let kept: [&[u8]; 5] = [
        b"user.",
        b"security.",
        b"trusted.",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    kept.iter().any(|prefix| name.starts_with(prefix))
        && !name.starts_with(b"trusted.overlay.")
        && !name.starts_with(b"user.overlay.")
}
