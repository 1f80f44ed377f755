//! Files of guests between the API and the agent's protocol.

use agent_proto::messages::{self, ChangeKind};
use army_api::files::{
    ArchivePath, FileChange, FileChangeKind, FileEntry, FileKind, FilePage, ListFiles, MAX_ENTRIES,
    MakeDirectory, RemoveFile, RenameFile, StatFile, WatchFiles,
};

use crate::{Error, ErrorKind, Result};

/// The permissions of a new directory, where the client does not say.
const DEFAULT_DIRECTORY_MODE: u32 = 0o755;
/// The most files that one request removes.
const MAX_REMOVED: u64 = 100_000;

/// Checks a path in a guest.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where it is not absolute.
pub fn check_path(path: &str) -> Result<()> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    let path = path.escape_debug();
    let message = format!("`{path}` is not an absolute path in the guest");
    Err(Error::new(ErrorKind::InvalidRequest, message))
}

/// Permissions in octal.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`].
pub fn mode(text: &str) -> Result<u32> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| *mode <= 0o7777).ok_or_else(|| {
        let message = format!("invalid permissions `{}`", text.escape_debug());
        Error::new(ErrorKind::InvalidRequest, message)
    })
}

/// A request for a page of a directory in the agent's protocol.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`], as of all functions here.
pub fn list(request: ListFiles) -> Result<messages::ListDirectory> {
    check_path(&request.path)?;
    let after = match request.after {
        None => Vec::new(),
        Some(after) => from_hex(&after).ok_or_else(|| {
            let message = "`after` must be the `next` of a page";
            Error::new(ErrorKind::InvalidRequest, message)
        })?,
    };
    Ok(messages::ListDirectory {
        path: request.path,
        after,
        limit: request.limit.unwrap_or(MAX_ENTRIES),
    })
}

/// A page of a directory.
pub fn page(page: messages::Directory) -> FilePage {
    let last = page.entries.last().filter(|_| page.more);
    FilePage {
        next: last.map(|last| to_hex(&last.name)),
        entries: page.entries.into_iter().map(entry).collect(),
    }
}

/// What an agent says of a file.
pub fn entry(entry: messages::FileEntry) -> FileEntry {
    use agent_proto::messages::FileKind as Kind;
    let kind = match entry.kind() {
        Kind::Regular => FileKind::File,
        Kind::Directory => FileKind::Directory,
        Kind::Link => FileKind::Link,
        Kind::Special => FileKind::Special,
    };
    let (name, lossy_name) = text(&entry.name);
    let (target, lossy_target) = text(&entry.target);
    FileEntry {
        name,
        kind,
        size_bytes: entry.size,
        mode: format!("{:o}", entry.mode & 0o7777),
        uid: entry.uid,
        gid: entry.gid,
        modified_ms: entry.modified_ms,
        target: (kind == FileKind::Link).then_some(target),
        lossy: lossy_name || lossy_target,
    }
}

/// A question about a file in the agent's protocol.
pub fn stat(request: StatFile) -> Result<messages::StatFile> {
    check_path(&request.path)?;
    Ok(messages::StatFile {
        path: request.path,
        follow: request.follow,
    })
}

/// A new directory in the agent's protocol.
pub fn make(request: MakeDirectory) -> Result<messages::MakeDirectory> {
    check_path(&request.path)?;
    let text = request.mode.as_deref();
    Ok(messages::MakeDirectory {
        path: request.path,
        mode: text.map_or(Ok(DEFAULT_DIRECTORY_MODE), mode)?,
        user: request.user.unwrap_or_default(),
        parents: request.parents,
    })
}

/// A removal in the agent's protocol.
pub fn remove(request: RemoveFile) -> Result<messages::RemoveFile> {
    check_path(&request.path)?;
    Ok(messages::RemoveFile {
        path: request.path,
        recursive: request.recursive,
        limit: MAX_REMOVED,
    })
}

/// A new name in the agent's protocol.
pub fn rename(request: RenameFile) -> Result<messages::RenameFile> {
    check_path(&request.from)?;
    check_path(&request.to)?;
    Ok(messages::RenameFile {
        from: request.from,
        to: request.to,
        replace: request.replace,
    })
}

/// A request for an archive in the agent's protocol.
pub fn pack(request: ArchivePath) -> Result<messages::Pack> {
    check_path(&request.path)?;
    Ok(messages::Pack { path: request.path })
}

/// An archive to unpack in the agent's protocol.
pub fn unpack(request: ArchivePath) -> Result<messages::Unpack> {
    check_path(&request.path)?;
    Ok(messages::Unpack {
        path: request.path,
        user: request.user.unwrap_or_default(),
    })
}

/// Files to watch in the agent's protocol.
pub fn watch(request: WatchFiles) -> Result<messages::WatchFiles> {
    check_path(&request.path)?;
    Ok(messages::WatchFiles {
        path: request.path,
        recursive: request.recursive,
    })
}

/// Converts a change of a file from the agent's form to the API's.
pub fn change(change: &messages::FileChange) -> FileChange {
    let kind = match change.kind() {
        ChangeKind::Other => FileChangeKind::Other,
        ChangeKind::Created => FileChangeKind::Created,
        ChangeKind::Modified => FileChangeKind::Modified,
        ChangeKind::Written => FileChangeKind::Written,
        ChangeKind::Removed => FileChangeKind::Removed,
        ChangeKind::MovedAway => FileChangeKind::MovedAway,
        ChangeKind::MovedHere => FileChangeKind::MovedHere,
        ChangeKind::Attributes => FileChangeKind::Attributes,
        ChangeKind::Lost => FileChangeKind::Lost,
    };
    FileChange {
        kind,
        path: text(&change.path).0,
        directory: change.is_directory,
    }
}

/// Bytes as text, and whether bytes had to be replaced.
fn text(bytes: &[u8]) -> (String, bool) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), false),
        Err(_) => (String::from_utf8_lossy(bytes).into_owned(), true),
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
    (is_hex && digits.len().is_multiple_of(2)).then(|| {
        let pairs = digits.chunks(2);
        let byte = |pair: &[u8]| {
            let digit = |digit: u8| char::from(digit).to_digit(16).unwrap_or_default() as u8;
            digit(pair[0]) << 4 | digit(pair[1])
        };
        pairs.map(byte).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_any_bytes_is_shown_and_is_a_cursor() {
        let name = vec![b'a', 0xff, b'\n'];
        let directory = messages::Directory {
            entries: vec![messages::FileEntry {
                name: name.clone(),
                mode: 0o100_644,
                ..messages::FileEntry::default()
            }],
            more: true,
        };
        let page = page(directory);
        assert!(page.entries[0].lossy && page.entries[0].name == "a\u{fffd}\n");
        assert_eq!(page.entries[0].mode, "644");
        let request = ListFiles {
            path: "/".into(),
            after: page.next,
            ..ListFiles::default()
        };
        assert_eq!(list(request.clone()).unwrap().after, name);
        for wrong in ["x", "0", "0g"] {
            let request = ListFiles {
                after: Some(wrong.into()),
                ..request.clone()
            };
            assert!(list(request).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_path_is_absolute_and_permissions_are_octal() {
        for path in ["", "x", "./x", "/a\0b"] {
            assert!(check_path(path).is_err());
        }
        let with_mode = |mode: Option<&str>| {
            let mode = mode.map(str::to_owned);
            let path = "/d".to_owned();
            let request = MakeDirectory {
                path,
                mode,
                ..MakeDirectory::default()
            };
            make(request).map(|made| made.mode)
        };
        assert_eq!(with_mode(None).unwrap(), 0o755);
        assert_eq!(with_mode(Some("1777")).unwrap(), 0o1777);
        assert!(with_mode(Some("10000")).is_err() && with_mode(Some("8")).is_err());
    }
}
