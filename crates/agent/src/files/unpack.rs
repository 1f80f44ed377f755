//! Unpacks a tar archive into a directory.
//!
//! The archive may be hostile to the guest's other files. Every path in it is resolved by the kernel
//! beneath the directory (openat2(2)), links that were there before or came with the archive
//! included, so nothing outside of it is written. A file appears as a whole, under its final name.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use agent_proto::messages::{ErrorCode, Unpack, from_host};
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod,
    futimens, linkat, mkdirat, openat, openat2, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use super::{MODE_MASK, absolute};
use crate::conversation::{End, Inbox, Outbox, Refusal};
use crate::users::{self, User};

/// The most files of an archive.
const MAX_FILES: usize = 1_000_000;
/// How paths in the archive are resolved.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// The data of the archive as it arrives.
struct Arriving<'a> {
    inbox: &'a mut Inbox,
    piece: Vec<u8>,
    taken: usize,
    has_ended: bool,
    is_lost: bool,
}

impl Read for Arriving<'_> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.piece.len() && !self.has_ended {
            match self.inbox.receive() {
                Ok(Some(from_host::Kind::Data(data))) => (self.piece, self.taken) = (data, 0),
                Ok(Some(from_host::Kind::DataEnd(_))) => self.has_ended = true,
                Ok(_) => {}
                Err(_) => {
                    self.is_lost = true;
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        let rest = &self.piece[self.taken..];
        let len = rest.len().min(space.len());
        space[..len].copy_from_slice(&rest[..len]);
        self.taken += len;
        Ok(len)
    }
}

/// Unpacks an archive.
pub(crate) fn unpack(request: &Unpack, mut inbox: Inbox, outbox: &Outbox) -> Result<(), End> {
    let path = absolute(&request.path)?;
    let owner = match request.user.as_str() {
        "" => None,
        user => Some(users::find(user)?),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, path, flags, Mode::empty()).map_err(|error| {
        let what = format!("cannot unpack into {}", path.display());
        Refusal::io(what, &io::Error::from(error))
    })?;
    let mut archive = Archive::new(Arriving {
        inbox: &mut inbox,
        piece: Vec::new(),
        taken: 0,
        has_ended: false,
        is_lost: false,
    });
    let target = Target { root, owner };
    let unpacked = unpack_all(&mut archive, &target);
    let mut arriving = archive.into_inner();
    if unpacked.is_ok() {
        // What follows the archive's end is not looked at, but read.
        let _ = io::copy(&mut arriving, &mut io::sink());
    }
    if arriving.is_lost {
        return Err(End::Lost);
    }
    unpacked?;
    outbox.done()
}

fn unpack_all(archive: &mut Archive<Arriving<'_>>, target: &Target) -> Result<(), Refusal> {
    let unreadable = |error: io::Error| {
        let message = format!("cannot read the archive: {error}");
        Refusal::new(ErrorCode::Invalid, message)
    };
    for (number, entry) in archive.entries().map_err(unreadable)?.enumerate() {
        let mut entry = entry.map_err(unreadable)?;
        if number >= MAX_FILES {
            let message = format!("the archive has more than {MAX_FILES} files");
            return Err(Refusal::new(ErrorCode::Invalid, message));
        }
        let name = inner_path(&entry.path_bytes())?;
        target.unpack(&mut entry, &name).map_err(|error| {
            let what = format!("cannot unpack {}", name.display());
            match error {
                Failure::Io(error) => Refusal::io(what, &error),
                Failure::Outside => Refusal::new(
                    ErrorCode::Denied,
                    format!("{what}: it leads out of the directory"),
                ),
                Failure::Kind => Refusal::new(
                    ErrorCode::Invalid,
                    format!("{what}: it is neither a file, a directory nor a link"),
                ),
            }
        })?;
    }
    Ok(())
}

/// A path of the archive as one within the directory.
fn inner_path(bytes: &[u8]) -> Result<PathBuf, Refusal> {
    let mut inner = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(bytes)).components() {
        match part {
            Component::Normal(name) => inner.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let path = String::from_utf8_lossy(bytes);
                let message = format!("the archive has the path {path:?}, which leads out of it");
                return Err(Refusal::new(ErrorCode::Denied, message));
            }
        }
    }
    Ok(inner)
}

enum Failure {
    Io(io::Error),
    Outside,
    Kind,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        match error {
            // The kernel's word for a path that leaves the directory.
            Errno::XDEV => Self::Outside,
            error => Self::Io(error.into()),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(_: Refusal) -> Self {
        Self::Outside
    }
}

/// The directory that an archive is unpacked into.
struct Target {
    root: OwnedFd,
    owner: Option<User>,
}

impl Target {
    fn unpack(&self, entry: &mut Entry<'_, Arriving<'_>>, path: &Path) -> Result<(), Failure> {
        let Some(name) = path.file_name() else {
            // The directory itself, which stays as it is.
            return Ok(());
        };
        let parent = self.make_directories(path.parent().unwrap_or(Path::new("")))?;
        match entry.header().entry_type() {
            EntryType::Directory => self.directory(entry, &parent, name),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(entry, &parent, name)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or(Failure::Kind)?;
                replace(&parent, name)?;
                symlinkat(OsStr::from_bytes(&target), &parent, name)?;
                self.own(entry, &parent, name)
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().ok_or(Failure::Kind)?;
                let target = inner_path(&target)?;
                let above = target.parent().unwrap_or(Path::new(""));
                let above = self.open_directory(above)?;
                let other = target.file_name().ok_or(Failure::Kind)?;
                replace(&parent, name)?;
                // A link at the end of the path is not followed.
                Ok(linkat(&above, other, &parent, name, AtFlags::empty())?)
            }
            EntryType::XGlobalHeader => Ok(()),
            _ => Err(Failure::Kind),
        }
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = match path.as_os_str().is_empty() {
            true => Path::new("."),
            false => path,
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), BENEATH)
    }

    /// Opens a directory, after making those of its path that are missing.
    fn make_directories(&self, path: &Path) -> Result<OwnedFd, Failure> {
        match self.open_directory(path) {
            Err(Errno::NOENT) => {}
            other => return Ok(other?),
        }
        let mut so_far = PathBuf::new();
        for part in path.components() {
            let above = self.open_directory(&so_far)?;
            so_far.push(part);
            match mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    if let Some(owner) = &self.owner {
                        chown(&above, part.as_os_str(), owner.uid.get(), owner.gid.get())?;
                    }
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.open_directory(path)?)
    }

    fn directory(
        &self,
        entry: &Entry<'_, Arriving<'_>>,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), Failure> {
        match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = match openat(parent, name, flags, Mode::empty()) {
            // A link to a directory that was there before is left as it is.
            Err(Errno::LOOP | Errno::NOTDIR) => return Ok(()),
            other => other?,
        };
        self.own(entry, parent, name)?;
        Ok(fchmod(&made, mode(entry)?)?)
    }

    fn file(
        &self,
        entry: &mut Entry<'_, Arriving<'_>>,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), Failure> {
        let mut random = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let fresh = format!(".unpack.{:016x}", u64::from_ne_bytes(random));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(parent, &*fresh, flags, Mode::from_raw_mode(0o600))?;
        let written = self.fill(entry, parent, &fresh, file.into());
        let placed = written.and_then(|()| Ok(renameat(parent, &*fresh, parent, name)?));
        if placed.is_err() {
            // What was not finished is not kept.
            let _ = unlinkat(parent, &*fresh, AtFlags::empty());
        }
        placed
    }

    fn fill(
        &self,
        entry: &mut Entry<'_, Arriving<'_>>,
        parent: &OwnedFd,
        fresh: &str,
        mut file: File,
    ) -> Result<(), Failure> {
        let expected = entry.size();
        let copied = io::copy(entry, &mut file)?;
        if copied != expected {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.own(entry, parent, OsStr::new(fresh))?;
        fchmod(&file, mode(entry)?)?;
        let seconds = entry.header().mtime()?;
        let time = Timespec {
            tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        // A file system that cannot store the time has the present one.
        let _ = futimens(&file, &times);
        Ok(())
    }

    /// Sets the owner of a file that was just made.
    fn own(
        &self,
        entry: &Entry<'_, Arriving<'_>>,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), Failure> {
        let (uid, gid) = match &self.owner {
            Some(owner) => (owner.uid.get(), owner.gid.get()),
            // Only root can give files away.
            None if !rustix::process::geteuid().is_root() => return Ok(()),
            None => {
                let header = entry.header();
                let number = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
                (
                    number(header.uid()?).ok_or(Failure::Kind)?,
                    number(header.gid()?).ok_or(Failure::Kind)?,
                )
            }
        };
        Ok(chown(parent, name, uid, gid)?)
    }
}

/// Removes what has the name of a new link. A directory is not removed.
fn replace(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn chown(parent: &OwnedFd, name: &OsStr, uid: u32, gid: u32) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    chownat(
        parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
}

fn mode(entry: &Entry<'_, Arriving<'_>>) -> io::Result<Mode> {
    Ok(Mode::from_raw_mode(entry.header().mode()? & MODE_MASK))
}
