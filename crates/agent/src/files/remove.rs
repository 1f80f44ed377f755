//! Removes files and directories, step by step from one open directory to the next, so that a link
//! that somebody puts in place of a directory leads nowhere.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use agent_proto::messages::{ErrorCode, RemoveFile};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, unlinkat};
use rustix::io::Errno;

use super::absolute;
use crate::conversation::Refusal;

/// The deepest tree that is removed. Each level holds one descriptor.
const MAX_DEPTH: usize = 256;

/// A directory that is being emptied.
struct Level {
    directory: OwnedFd,
    entries: Dir,
    /// Its name in the directory above.
    name: CString,
}

/// Why a removal stopped.
enum Stop {
    Failed(Errno),
    TooMany,
    TooDeep,
    OtherFileSystem,
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Self {
        Self::Failed(error)
    }
}

/// Removes a file, or a directory with its content where that is requested.
pub(crate) fn remove(request: &RemoveFile) -> Result<(), Refusal> {
    let path = absolute(&request.path)?;
    let what = || format!("cannot remove {}", path.display());
    if path.parent().is_none() || path.file_name().is_none() {
        return Err(Refusal::new(ErrorCode::Invalid, what()));
    }
    let removed = match request.recursive {
        true => remove_tree(path, request.limit),
        false => remove_one(path).map_err(Stop::Failed),
    };
    removed.map_err(|stop| match stop {
        Stop::Failed(Errno::NOTEMPTY) if !request.recursive => {
            let message = format!("{}: the directory is not empty", what());
            Refusal::new(ErrorCode::Invalid, message)
        }
        Stop::Failed(error) => Refusal::io(what(), &io::Error::from(error)),
        Stop::TooMany => Refusal::new(
            ErrorCode::Exhausted,
            format!(
                "{}: it has more than {} files, which are removed at a time; request it again",
                what(),
                request.limit
            ),
        ),
        Stop::TooDeep => Refusal::new(
            ErrorCode::Invalid,
            format!("{}: it is deeper than {MAX_DEPTH} directories", what()),
        ),
        Stop::OtherFileSystem => Refusal::new(
            ErrorCode::Invalid,
            format!("{}: another file system is mounted in it", what()),
        ),
    })
}

fn remove_one(path: &Path) -> Result<(), Errno> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => unlinkat(CWD, path, AtFlags::REMOVEDIR),
        other => other,
    }
}

fn remove_tree(path: &Path, limit: u64) -> Result<(), Stop> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return Ok(other?),
    }
    let device = rustix::fs::lstat(path)?.st_dev;
    let open = |level: Option<&Level>, name: &CString| -> Result<Level, Stop> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match level {
            Some(level) => openat(&level.directory, name, flags, Mode::empty())?,
            None => openat(CWD, path, flags, Mode::empty())?,
        };
        if fstat(&directory)?.st_dev != device {
            return Err(Stop::OtherFileSystem);
        }
        Ok(Level {
            entries: Dir::read_from(&directory)?,
            directory,
            name: name.clone(),
        })
    };
    let mut levels = vec![open(None, &CString::default())?];
    let mut removed = 0;
    while let Some(level) = levels.last_mut() {
        if let Some(entry) = level.entries.read() {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_bytes() == b"." || name.to_bytes() == b".." {
                continue;
            }
            if removed >= limit {
                return Err(Stop::TooMany);
            }
            let is_directory = match entry.file_type() {
                FileType::Directory => true,
                FileType::Unknown => {
                    let facts =
                        rustix::fs::statat(&level.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(facts.st_mode) == FileType::Directory
                }
                _ => false,
            };
            if !is_directory {
                remove_entry(level, name, AtFlags::empty())?;
                removed += 1;
                continue;
            }
            let name = name.to_owned();
            if levels.len() >= MAX_DEPTH {
                return Err(Stop::TooDeep);
            }
            let next = open(levels.last(), &name)?;
            levels.push(next);
            continue;
        }
        let Some(empty) = levels.pop() else { break };
        drop((empty.entries, empty.directory));
        match levels.last() {
            Some(above) => remove_entry(above, &empty.name, AtFlags::REMOVEDIR)?,
            None => unlinkat(CWD, path, AtFlags::REMOVEDIR)?,
        }
        removed += 1;
    }
    Ok(())
}

/// Removes an entry of a directory. It may have gone already.
fn remove_entry(level: &Level, name: &std::ffi::CStr, flags: AtFlags) -> Result<(), Errno> {
    match unlinkat(&level.directory, name, flags) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}
