//! Paths inside a tree: parsing untrusted ones, and following symbolic links as the guest would, but never out.

use super::{Kind, Meta, Node, NodeId, Tree};
use crate::Result;

/// The longest name that ext4 and Linux allow.
const MAX_NAME: usize = 255;
/// The longest path that Linux takes in one call (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// The depth limit of directories: more than any system has, and few enough for recursion.
pub(crate) const MAX_DEPTH: usize = 1024;
/// The most symbolic links in one path, as in Linux (`MAXSYMLINKS`).
const MAX_LINKS: u32 = 40;

/// The reason why a path is refused or does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    #[error("its path leads out of the image by `..`")]
    DotDot,
    #[error("its path is empty")]
    Empty,
    #[error("its path contains a NUL byte")]
    Nul,
    #[error("its path is longer than 4096 bytes, or a name in it longer than 255")]
    NameTooLong,
    #[error("its path has more than 1024 directories")]
    TooDeep,
    #[error("a symbolic link in its path leads out of the image")]
    Escape,
    #[error("its path has too many symbolic links")]
    LinkLoop,
    #[error("its path leads through something that is not a directory")]
    NotADirectory,
    #[error("its path leads nowhere")]
    Missing,
}

/// Splits an archive's path into names. Archives name their members from the root of the image, with or without a
/// slash before it (`/etc/x`, `./etc/x`, `etc//x`); `..` takes back the name before it, as it does for other
/// unpackers. The root itself has no components.
///
/// # Errors
/// [`PathError::DotDot`] for a path that climbs above the root, which no honest image has.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    if path.len() > MAX_PATH {
        return Err(PathError::NameTooLong);
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop().ok_or(PathError::DotDot)?),
            part if part.len() > MAX_NAME => return Err(PathError::NameTooLong),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

/// The state of resolving a path in a tree.
struct Walk {
    /// The remaining names, the next one last.
    todo: Vec<Vec<u8>>,
    /// The directories from the root to the present one.
    trail: Vec<NodeId>,
    /// The number of symbolic links that were followed.
    links: u32,
}

/// The result of a [`Walk`].
enum Reached {
    /// The walk reached the path's end.
    End(NodeId),
    /// The walk reached a directory that has no entry of the next name.
    Missing { dir: NodeId, name: Vec<u8> },
}

impl Walk {
    fn new(parts: &[&[u8]]) -> Self {
        Self {
            todo: parts.iter().rev().map(|part| part.to_vec()).collect(),
            trail: vec![NodeId::ROOT],
            links: 0,
        }
    }

    /// Goes on to the path's end or to a missing entry, following every symbolic link on the way, the last one too.
    fn advance(&mut self, tree: &Tree) -> Result<Reached, PathError> {
        while let Some(name) = self.todo.pop() {
            if name == b".." {
                self.trail.pop();
                if self.trail.is_empty() {
                    return Err(PathError::Escape);
                }
                continue;
            }
            let dir = *self.trail.last().ok_or(PathError::Escape)?;
            let entries = tree.dir(dir).ok_or(PathError::NotADirectory)?;
            let Some(&found) = entries.get(&name) else {
                return Ok(Reached::Missing { dir, name });
            };
            match &tree.node(found).kind {
                Kind::Symlink(target) => self.follow(target)?,
                _ => self.enter(found)?,
            }
        }
        self.trail
            .last()
            .map(|&end| Reached::End(end))
            .ok_or(PathError::Escape)
    }

    fn enter(&mut self, node: NodeId) -> Result<(), PathError> {
        self.trail.push(node);
        if self.trail.len() > MAX_DEPTH {
            return Err(PathError::TooDeep);
        }
        Ok(())
    }

    /// Puts the target of a link before the rest of the path; an absolute one starts again at the tree's root, as it
    /// does in the guest.
    fn follow(&mut self, target: &[u8]) -> Result<(), PathError> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(PathError::LinkLoop);
        }
        if target.first() == Some(&b'/') {
            self.trail.truncate(1);
        }
        let steps = target
            .split(|&b| b == b'/')
            .filter(|step| !step.is_empty() && *step != b".");
        self.todo.extend(steps.rev().map(<[u8]>::to_vec));
        Ok(())
    }
}

/// A directory that a path led to, and the entries that were made on the way.
pub(crate) struct MadeDirs {
    pub(crate) dir: NodeId,
    pub(crate) new: Vec<(NodeId, Vec<u8>)>,
}

impl Tree {
    /// The node at these components from the root. Every symbolic link is followed, the last one too.
    ///
    /// # Errors
    /// [`PathError::Escape`] if a link climbs above the root: in a guest that would be harmless, but no honest image
    /// has one on a path it uses.
    pub(crate) fn resolve(&self, parts: &[&[u8]]) -> Result<NodeId, PathError> {
        match Walk::new(parts).advance(self)? {
            Reached::End(node) => Ok(node),
            Reached::Missing { .. } => Err(PathError::Missing),
        }
    }

    /// The directory at these components, links followed. Missing directories are made (owned by root, mode 0755),
    /// those that a dangling link points to among them: images ship `usr/local -> ../var/usrlocal` without
    /// `var/usrlocal`, and files below `usr/local`.
    pub(crate) fn make_dirs(
        &mut self,
        parts: &[&[u8]],
        mtime: i64,
    ) -> Result<Result<MadeDirs, PathError>> {
        let mut walk = Walk::new(parts);
        let mut new = Vec::new();
        loop {
            let (dir, name) = match walk.advance(self) {
                Ok(Reached::End(dir)) if self.dir(dir).is_some() => {
                    return Ok(Ok(MadeDirs { dir, new }));
                }
                Ok(Reached::End(_)) => return Ok(Err(PathError::NotADirectory)),
                Ok(Reached::Missing { name, .. }) if name.len() > MAX_NAME => {
                    return Ok(Err(PathError::NameTooLong));
                }
                Ok(Reached::Missing { dir, name }) => (dir, name),
                Err(e) => return Ok(Err(e)),
            };
            let made = Node {
                meta: Meta::root(0o755, mtime),
                kind: Kind::empty_dir(),
            };
            let made = self.put(dir, &name, made)?;
            if let Err(e) = walk.enter(made) {
                return Ok(Err(e));
            }
            new.push((dir, name));
        }
    }

    /// The node at a guest path such as `/sbin/init`, links followed; `None` if it leads nowhere.
    pub(crate) fn find(&self, path: &str) -> Option<NodeId> {
        let parts = components(path.trim_start_matches('/').as_bytes()).ok()?;
        self.resolve(&parts).ok()
    }
}
