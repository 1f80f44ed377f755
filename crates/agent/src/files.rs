//! Files of the guest: copies them in and out. What directories hold, archives and changes are in
//! the modules of this one.

pub(crate) mod directory;
pub(crate) mod pack;
pub(crate) mod remove;
pub(crate) mod unpack;
pub(crate) mod watch;

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use agent_proto::CHUNK;
use agent_proto::messages::{ErrorCode, FileInfo, Get, GetRange, Put, from_agent, from_host};

use crate::conversation::{End, Inbox, Outbox, Refusal};
use crate::replace::{FreshFile, end_of_links};
use crate::users;

/// Permission bits that may be set.
const MODE_MASK: u32 = 0o7777;

/// Writes a file beside its final path, then renames it: readers see the old file or the new one as
/// a whole, and a lost connection leaves nothing. In a directory, the file keeps its own name;
/// links are followed, as `cp` does.
pub(crate) fn put(request: &Put, mut inbox: Inbox, outbox: &Outbox) -> Result<(), End> {
    let owner = users::find(&request.user)?;
    let path = landing(request)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot write {}", path.display()), error);
    let target = end_of_links(&path).map_err(|error| failed(&error))?;
    refuse_special(&target)?;
    let mut fresh = FreshFile::beside(&target).map_err(|error| failed(&error))?;
    loop {
        match inbox.receive()? {
            Some(from_host::Kind::Data(data)) => {
                fresh
                    .file
                    .write_all(&data)
                    .map_err(|error| failed(&error))?;
            }
            Some(from_host::Kind::DataEnd(_)) => break,
            _ => {}
        }
    }
    let mode = fs::Permissions::from_mode(request.mode & MODE_MASK);
    fchown(&fresh.file, Some(owner.uid.get()), Some(owner.gid.get()))
        .and_then(|()| fresh.file.set_permissions(mode))
        // Without the sync, a crash could leave the name with an empty file.
        .and_then(|()| fresh.file.sync_all())
        .and_then(|()| fresh.rename_to(&target))
        .map_err(|error| failed(&error))?;
    outbox.done()
}

/// The destination of a file: under its own name if the path is a directory, otherwise the path
/// itself.
fn landing(request: &Put) -> Result<PathBuf, Refusal> {
    let path = absolute(&request.path)?;
    let name = Path::new(&request.name);
    match name.file_name() {
        Some(own) if own == name && path.is_dir() => Ok(path.join(own)),
        _ => Ok(path.to_owned()),
    }
}

/// Refuses to replace a device or a socket, which other programs use, by a regular file.
fn refuse_special(path: &Path) -> Result<(), Refusal> {
    let Ok(metadata) = fs::metadata(path) else {
        return Ok(());
    };
    let kind = metadata.file_type();
    let what = if kind.is_dir() {
        "a folder"
    } else if kind.is_file() {
        return Ok(());
    } else {
        "a device, a pipe or a socket"
    };
    let message = format!("cannot write {}: it is {what}", path.display());
    Err(Refusal::new(ErrorCode::Invalid, message))
}

/// Sends a regular file.
pub(crate) fn get(request: &Get, outbox: &Outbox) -> Result<(), End> {
    send(&request.path, 0, u64::MAX, outbox)
}

/// Sends a part of a regular file.
pub(crate) fn get_range(request: &GetRange, outbox: &Outbox) -> Result<(), End> {
    send(&request.path, request.offset, request.length, outbox)
}

fn send(path: &str, offset: u64, length: u64, outbox: &Outbox) -> Result<(), End> {
    let path = absolute(path)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot read {}", path.display()), error);
    // Opening or reading a pipe or a device could block forever.
    let metadata = fs::metadata(path).map_err(|error| failed(&error))?;
    if !metadata.is_file() {
        let message = format!("cannot read {}: it is not a regular file", path.display());
        return Err(Refusal::new(ErrorCode::Invalid, message).into());
    }
    let mut file = File::open(path).map_err(|error| failed(&error))?;
    let info = FileInfo {
        size: metadata.len(),
        mode: metadata.permissions().mode() & MODE_MASK,
    };
    if offset > 0 {
        file.seek(SeekFrom::Start(offset.min(i64::MAX as u64)))
            .map_err(|error| failed(&error))?;
    }
    outbox.send(from_agent::Kind::File(info))?;
    let mut file = file.take(length);
    let mut chunk = vec![0; CHUNK];
    loop {
        let len = file.read(&mut chunk).map_err(|error| failed(&error))?;
        if len == 0 {
            return outbox.done();
        }
        outbox.send(from_agent::Kind::Data(chunk[..len].to_vec()))?;
    }
}

fn absolute(path: &str) -> Result<&Path, Refusal> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(Path::new(path))
    } else {
        Err(Refusal::new(
            ErrorCode::Invalid,
            format!("{path:?} is not an absolute path"),
        ))
    }
}
