//! Paths inside a tree: parsing untrusted ones, and following symbolic links as the guest would, but never out.

use super::{Kind, NodeId, Tree};

/// The longest name that ext4 and Linux allow.
const MAX_NAME: usize = 255;
/// The longest path that Linux takes in one call (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// How deep directories may lie: more than any system has, and few enough to walk by recursion.
const MAX_DEPTH: usize = 1024;
/// As many symbolic links as Linux follows in one path (`MAXSYMLINKS`).
const MAX_LINKS: u32 = 40;

/// Why a path is refused or leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    #[error("it has an absolute path")]
    Absolute,
    #[error("its path contains `..`")]
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

/// Splits an archive's relative path into names. `.` and empty components vanish; everything that could lead
/// elsewhere is refused. The root itself has no components.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    if path.len() > MAX_PATH {
        return Err(PathError::NameTooLong);
    }
    if path.first() == Some(&b'/') && path.iter().any(|&b| b != b'/') {
        return Err(PathError::Absolute);
    }
    let parts: Vec<&[u8]> = path
        .split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    for part in &parts {
        if *part == b".." {
            return Err(PathError::DotDot);
        }
        if part.len() > MAX_NAME {
            return Err(PathError::NameTooLong);
        }
    }
    Ok(parts)
}

impl Tree {
    /// The node at these components from the root. Every symbolic link is followed, the last one too; an absolute one
    /// starts again at the tree's root, as it does in the guest.
    ///
    /// # Errors
    /// [`PathError::Escape`] if a link climbs above the root: in a guest that would be harmless, but no honest image
    /// has one on a path it uses.
    pub(crate) fn resolve(&self, parts: &[&[u8]]) -> Result<NodeId, PathError> {
        let mut todo: Vec<Vec<u8>> = parts.iter().rev().map(|part| part.to_vec()).collect();
        let mut trail = vec![NodeId::ROOT];
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                trail.pop();
                if trail.is_empty() {
                    return Err(PathError::Escape);
                }
                continue;
            }
            let here = *trail.last().ok_or(PathError::Escape)?;
            let entries = self.dir(here).ok_or(PathError::NotADirectory)?;
            let found = *entries.get(&part).ok_or(PathError::Missing)?;
            let Kind::Symlink(target) = &self.node(found).kind else {
                trail.push(found);
                if trail.len() > MAX_DEPTH {
                    return Err(PathError::TooDeep);
                }
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Err(PathError::LinkLoop);
            }
            if target.first() == Some(&b'/') {
                trail.truncate(1);
            }
            let steps = target
                .split(|&b| b == b'/')
                .filter(|step| !step.is_empty() && *step != b".");
            todo.extend(steps.rev().map(<[u8]>::to_vec));
        }
        trail.last().copied().ok_or(PathError::Escape)
    }

    /// The node at a guest path such as `/sbin/init`, links followed; `None` if it leads nowhere.
    pub(crate) fn find(&self, path: &str) -> Option<NodeId> {
        let parts = components(path.trim_start_matches('/').as_bytes()).ok()?;
        self.resolve(&parts).ok()
    }
}
