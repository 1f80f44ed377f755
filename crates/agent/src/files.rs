//! Files in and out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use agent_proto::CHUNK;
use agent_proto::messages::{ErrorCode, FileInfo, Get, Put, from_agent, from_host};

use crate::session::{End, Inbox, Outbox, Refusal};
use crate::users;

/// Permission bits that may be set.
const MODE_MASK: u32 = 0o7777;

/// Writes a file beside its final place, then renames it: readers see the old one or the new one,
/// whole, and a lost connection leaves nothing.
pub(crate) fn put(request: &Put, mut inbox: Inbox, outbox: &Outbox) -> Result<(), End> {
    let path = absolute(&request.path)?;
    let owner = users::find(&request.user)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot write {}", path.display()), error);
    refuse_special(path)?;
    let mut fresh = FreshFile::create(path).map_err(|error| failed(&error))?;
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
    chown(&fresh.beside, Some(owner.uid), Some(owner.gid))
        .and_then(|()| fresh.file.set_permissions(mode))
        .and_then(|()| fresh.keep(path))
        .map_err(|error| failed(&error))?;
    outbox.done()
}

/// A rename would put a plain file in the place of a device or a socket that others use.
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

/// A file under a temporary name, which goes away unless it is kept.
struct FreshFile {
    file: File,
    beside: PathBuf,
    kept: bool,
}

impl FreshFile {
    fn create(path: &Path) -> io::Result<Self> {
        let name = path
            .file_name()
            .ok_or(io::ErrorKind::InvalidInput)?
            .to_string_lossy();
        let mut random = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        // Names may be as long as the file system allows already.
        let short: String = name.chars().take(40).collect();
        let beside = path.with_file_name(format!(".{short}.{:016x}", u64::from_ne_bytes(random)));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        Ok(Self {
            file,
            beside,
            kept: false,
        })
    }

    fn keep(&mut self, path: &Path) -> io::Result<()> {
        // Else a crash could leave the name with nothing behind it.
        self.file.sync_all()?;
        fs::rename(&self.beside, path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for FreshFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.beside);
        }
    }
}

/// Sends a regular file.
pub(crate) fn get(request: &Get, outbox: &Outbox) -> Result<(), End> {
    let path = absolute(&request.path)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot read {}", path.display()), error);
    // A pipe or a device would make the open or the reads wait for ever.
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
    outbox.send(from_agent::Kind::File(info))?;
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
