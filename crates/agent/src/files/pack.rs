//! Sends a directory as a tar archive. Links in it are stored and not followed, and devices, pipes
//! and sockets are left out.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use agent_proto::CHUNK;
use agent_proto::messages::{ErrorCode, FileInfo, Pack, from_agent};
use tar::{Builder, EntryType, Header};

use super::{MODE_MASK, absolute};
use crate::conversation::{End, Outbox, Refusal};

/// The most files of an archive.
const MAX_FILES: u64 = 1_000_000;
/// The deepest tree of an archive.
const MAX_DEPTH: usize = 256;

/// Bytes that become messages.
struct Messages<'a> {
    outbox: &'a Outbox,
    waiting: Vec<u8>,
}

impl Write for Messages<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK - self.waiting.len();
        let taken = bytes.len().min(room);
        self.waiting.extend_from_slice(&bytes[..taken]);
        if self.waiting.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let data = std::mem::take(&mut self.waiting);
        let sent = self.outbox.send(from_agent::Kind::Data(data));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Sends a directory, or a file by its own name.
pub(crate) fn pack(request: &Pack, outbox: &Outbox) -> Result<(), End> {
    let path = absolute(&request.path)?;
    let failed = |error: &io::Error| Refusal::io(format!("cannot read {}", path.display()), error);
    // The path itself may be a link; what is in the directory is not followed.
    let path = fs::canonicalize(path).map_err(|error| failed(&error))?;
    let metadata = fs::metadata(&path).map_err(|error| failed(&error))?;
    if !metadata.is_dir() && !metadata.is_file() {
        let message = format!("{} is neither a directory nor a file", path.display());
        return Err(Refusal::new(ErrorCode::Invalid, message).into());
    }
    if metadata.is_dir() {
        fs::read_dir(&path).map_err(|error| failed(&error))?;
    }
    outbox.send(from_agent::Kind::File(FileInfo {
        size: 0,
        mode: metadata.permissions().mode() & MODE_MASK,
    }))?;
    let messages = Messages {
        outbox,
        waiting: Vec::with_capacity(CHUNK),
    };
    let mut builder = Builder::new(messages);
    let packed = pack_tree(&mut builder, &path, metadata.is_dir());
    let sent = packed
        .and_then(|()| builder.into_inner())
        .and_then(|mut messages| messages.flush());
    match sent {
        Ok(()) => outbox.done(),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(End::Lost),
        Err(error) => Err(failed(&error).into()),
    }
}

/// A directory whose content is being packed.
struct Level {
    entries: fs::ReadDir,
    path: PathBuf,
    /// Its path in the archive.
    name: PathBuf,
}

fn pack_tree(builder: &mut Builder<Messages<'_>>, root: &Path, is_dir: bool) -> io::Result<()> {
    if !is_dir {
        let name = root.file_name().map(PathBuf::from).unwrap_or_default();
        return pack_one(builder, root, &name).map(drop);
    }
    let mut levels = vec![Level {
        entries: fs::read_dir(root)?,
        path: root.to_owned(),
        name: PathBuf::new(),
    }];
    let mut files = 0;
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.entries.next() else {
            levels.pop();
            continue;
        };
        let own: OsString = entry?.file_name();
        let (path, name) = (level.path.join(&own), level.name.join(&own));
        files += 1;
        if files > MAX_FILES {
            let message = format!("it has more than {MAX_FILES} files");
            return Err(io::Error::other(message));
        }
        if pack_one(builder, &path, &name)? {
            if levels.len() >= MAX_DEPTH {
                let message = format!("it is deeper than {MAX_DEPTH} directories");
                return Err(io::Error::other(message));
            }
            match fs::read_dir(&path) {
                Ok(entries) => levels.push(Level {
                    entries,
                    path,
                    name,
                }),
                // It has gone meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Packs one file. Returns whether it is a directory, whose content follows. A file that goes away
/// meanwhile is left out.
fn pack_one(builder: &mut Builder<Messages<'_>>, path: &Path, name: &Path) -> io::Result<bool> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let mut header = Header::new_gnu();
    header.set_mode(metadata.permissions().mode() & MODE_MASK);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(metadata.mtime().max(0).unsigned_abs());
    header.set_size(0);
    let file_type = metadata.file_type();
    if file_type.is_dir() {
        header.set_entry_type(EntryType::Directory);
        builder.append_data(&mut header, name, io::empty())?;
        return Ok(true);
    }
    if file_type.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        let target = fs::read_link(path)?;
        builder.append_link(&mut header, name, target)?;
        return Ok(false);
    }
    if !file_type.is_file() {
        return Ok(false);
    }
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    let file = File::options()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(false);
    }
    let size = metadata.len();
    header.set_entry_type(EntryType::Regular);
    header.set_size(size);
    // The header has said the size: a file that shrinks meanwhile ends with zeros.
    let content = file.chain(io::repeat(0)).take(size);
    builder.append_data(&mut header, name, content)?;
    Ok(false)
}
