//! What directories hold: pages of them, facts about files, and new names.

use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use agent_proto::messages::{
    Directory, ErrorCode, FileEntry, FileKind, ListDirectory, MAX_ENTRIES, MAX_PAGE_BYTES,
    MakeDirectory, RenameFile, StatFile,
};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{MODE_MASK, absolute};
use crate::conversation::Refusal;
use crate::users::{self, User};

/// A page of a directory in the order of names. Memory is bounded by the page, however large the
/// directory is. A file that goes away meanwhile is left out.
pub(crate) fn list(request: &ListDirectory) -> Result<Directory, Refusal> {
    let path = absolute(&request.path)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot list {}", path.display()), error);
    let limit = request.limit.clamp(1, MAX_ENTRIES) as usize;
    let mut names: BinaryHeap<Vec<u8>> = BinaryHeap::with_capacity(limit + 2);
    for entry in fs::read_dir(path).map_err(|error| failed(&error))? {
        let name = entry
            .map_err(|error| failed(&error))?
            .file_name()
            .into_vec();
        if name > request.after {
            names.push(name);
        }
        // One more than the page shows whether there is another page.
        if names.len() > limit + 1 {
            names.pop();
        }
    }
    let mut more = names.len() > limit;
    let names = names.into_sorted_vec();
    let mut entries = Vec::new();
    let mut size = 0;
    for name in names.into_iter().take(limit) {
        let path = path.join(OsStr::from_bytes(&name));
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let entry = describe(name, &metadata, &path);
        size += entry.name.len() + entry.target.len();
        if size > MAX_PAGE_BYTES {
            more = true;
            break;
        }
        entries.push(entry);
    }
    Ok(Directory { entries, more })
}

/// Describes a file.
pub(crate) fn stat(request: &StatFile) -> Result<FileEntry, Refusal> {
    let path = absolute(&request.path)?;
    let metadata = match request.follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    };
    let what = || format!("cannot find {}", path.display());
    let metadata = metadata.map_err(|error| Refusal::io(what(), &error))?;
    let name = path.file_name().unwrap_or_default().as_bytes().to_vec();
    Ok(describe(name, &metadata, path))
}

fn describe(name: Vec<u8>, metadata: &Metadata, path: &Path) -> FileEntry {
    let file_type = metadata.file_type();
    let (kind, target) = if file_type.is_file() {
        (FileKind::Regular, None)
    } else if file_type.is_dir() {
        (FileKind::Directory, None)
    } else if file_type.is_symlink() {
        (FileKind::Link, fs::read_link(path).ok())
    } else {
        (FileKind::Special, None)
    };
    let nanoseconds = metadata.mtime_nsec() / 1_000_000;
    FileEntry {
        name,
        kind: kind.into(),
        size: metadata.len(),
        mode: metadata.permissions().mode() & MODE_MASK,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_ms: metadata
            .mtime()
            .saturating_mul(1000)
            .saturating_add(nanoseconds),
        target: target.map_or_else(Vec::new, |it| it.into_os_string().into_vec()),
    }
}

/// Makes a directory, and with `parents` those above it.
pub(crate) fn make(request: &MakeDirectory) -> Result<(), Refusal> {
    let path = absolute(&request.path)?;
    let owner = users::find(&request.user)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot make {}", path.display()), error);
    if !request.parents {
        return make_one(path, request.mode, &owner).map_err(|error| failed(&error));
    }
    let mut so_far = PathBuf::new();
    for part in path.components() {
        so_far.push(part);
        if so_far.is_dir() {
            continue;
        }
        match make_one(&so_far, request.mode, &owner) {
            // Somebody else has made it meanwhile.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && so_far.is_dir() => {}
            made => made.map_err(|error| failed(&error))?,
        }
    }
    Ok(())
}

fn make_one(path: &Path, mode: u32, owner: &User) -> io::Result<()> {
    // Nobody else reaches it before it has its owner.
    DirBuilder::new().mode(0o700).create(path)?;
    lchown(path, Some(owner.uid.get()), Some(owner.gid.get()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode & MODE_MASK))
}

/// Renames a file or a directory.
pub(crate) fn rename(request: &RenameFile) -> Result<(), Refusal> {
    let (from, to) = (absolute(&request.from)?, absolute(&request.to)?);
    let flags = match request.replace {
        true => RenameFlags::empty(),
        false => RenameFlags::NOREPLACE,
    };
    renameat_with(CWD, from, CWD, to, flags).map_err(|error| {
        let what = format!("cannot rename {} to {}", from.display(), to.display());
        match error {
            rustix::io::Errno::XDEV => Refusal::new(
                ErrorCode::Invalid,
                format!("{what}: they are on different file systems"),
            ),
            rustix::io::Errno::EXIST => {
                Refusal::new(ErrorCode::Invalid, format!("{what}: it exists"))
            }
            error => Refusal::io(what, &error.into()),
        }
    })
}
