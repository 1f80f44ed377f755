//! Watches files: sends the events of inotify(7) to the host until the host closes the connection.
//!
//! The kernel's queue drops events that the host does not read in time; the host then gets a change
//! of the kind `Lost`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent_proto::messages::{
    ChangeKind, Empty, ErrorCode, FileChange, WatchFiles, from_agent::Kind,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::absolute;
use crate::conversation::{End, Inbox, Outbox, Refusal};

/// The most directories that one watch has.
const MAX_DIRECTORIES: usize = 4096;
/// The events of one read.
const BUFFER: usize = 16 << 10;

const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);

/// Watches a directory or a file until the host hangs up, or until it is gone.
pub(crate) fn watch(request: &WatchFiles, mut inbox: Inbox, outbox: &Outbox) -> Result<(), End> {
    let path = absolute(&request.path)?;
    let mut watched = Watched::begin(path, request.recursive)?;
    outbox.send(Kind::Watching(Empty {}))?;
    let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
    loop {
        wait(&watched.queue, &mut inbox)?;
        if watched.pass_on(&mut buffer, outbox)? {
            return outbox.done();
        }
    }
}

/// Waits until something has happened. The host says nothing more, and may hang up.
fn wait(queue: &OwnedFd, inbox: &mut Inbox) -> Result<(), End> {
    loop {
        let host = inbox.stream().as_fd();
        let mut handles = [
            PollFd::from_borrowed_fd(queue.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(host, PollFlags::IN),
        ];
        match poll(&mut handles, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return Err(End::Lost),
        }
        let [events, host] = handles.map(|it| !it.revents().is_empty());
        if host {
            inbox.receive()?;
        }
        if events {
            return Ok(());
        }
    }
}

struct Watched {
    queue: OwnedFd,
    root: PathBuf,
    recursive: bool,
    /// The watched directories, relative to the root, by the kernel's number.
    directories: HashMap<i32, PathBuf>,
}

impl Watched {
    fn begin(root: &Path, recursive: bool) -> Result<Self, Refusal> {
        let failed = |error: Errno| {
            let what = format!("cannot watch {}", root.display());
            match error {
                Errno::NOSPC | Errno::MFILE => {
                    let message = format!("{what}: the guest's limit of watches is reached");
                    Refusal::new(ErrorCode::Exhausted, message)
                }
                error => Refusal::io(what, &io::Error::from(error)),
            }
        };
        let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let mut watched = Self {
            queue: queue.map_err(failed)?,
            root: root.to_owned(),
            recursive,
            directories: HashMap::new(),
        };
        watched.add(Path::new("")).map_err(failed)?;
        if recursive && !watched.add_below(PathBuf::new()).map_err(failed)? {
            let message = format!(
                "cannot watch {}: it has more than {MAX_DIRECTORIES} directories",
                root.display()
            );
            return Err(Refusal::new(ErrorCode::Exhausted, message));
        }
        Ok(watched)
    }

    fn add(&mut self, relative: &Path) -> Result<(), Errno> {
        let mut flags = WATCHED;
        let path = match relative.as_os_str().is_empty() {
            true => self.root.clone(),
            false => {
                flags |= WatchFlags::DONT_FOLLOW | WatchFlags::ONLYDIR;
                self.root.join(relative)
            }
        };
        let number = inotify::add_watch(&self.queue, path, flags)?;
        self.directories.insert(number, relative.to_owned());
        Ok(())
    }

    /// Adds the directories below one. Returns false where there are too many.
    fn add_below(&mut self, relative: PathBuf) -> Result<bool, Errno> {
        let mut waiting = vec![relative];
        while let Some(relative) = waiting.pop() {
            // What has gone meanwhile, or cannot be read, is left out.
            let Ok(entries) = fs::read_dir(self.root.join(&relative)) else {
                continue;
            };
            for entry in entries.flatten() {
                if !entry.file_type().is_ok_and(|it| it.is_dir()) {
                    continue;
                }
                if self.directories.len() >= MAX_DIRECTORIES {
                    return Ok(false);
                }
                let below = relative.join(entry.file_name());
                match self.add(&below) {
                    Ok(()) => waiting.push(below),
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(true)
    }

    /// Passes on what has happened. Returns whether what is watched is gone.
    fn pass_on(&mut self, buffer: &mut [MaybeUninit<u8>], outbox: &Outbox) -> Result<bool, End> {
        let mut changes = Vec::new();
        let mut made = Vec::new();
        let mut is_gone = false;
        {
            let mut reader = inotify::Reader::new(&self.queue, buffer);
            loop {
                let event = match reader.next() {
                    Ok(event) => event,
                    Err(Errno::INTR) => continue,
                    Err(_) => break,
                };
                let flags = event.events();
                if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                    changes.push(change(ChangeKind::Lost, Path::new(""), false));
                    continue;
                }
                if flags.contains(ReadFlags::IGNORED) {
                    let ended = self.directories.remove(&event.wd());
                    is_gone |= ended.is_some_and(|it| it.as_os_str().is_empty());
                    continue;
                }
                let Some(directory) = self.directories.get(&event.wd()) else {
                    continue;
                };
                let is_directory = flags.contains(ReadFlags::ISDIR);
                let path = match event.file_name() {
                    Some(name) => directory.join(std::ffi::OsStr::from_bytes(name.to_bytes())),
                    // The directory that contains this one reports the event, too.
                    None if !directory.as_os_str().is_empty() => continue,
                    None => PathBuf::new(),
                };
                if let Some(kind) = kind(flags) {
                    changes.push(change(kind, &path, is_directory));
                }
                let is_new = flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
                if self.recursive && is_directory && is_new {
                    made.push(path);
                }
                if reader.is_buffer_empty() {
                    break;
                }
            }
        }
        for path in made {
            let is_whole = self.add(&path).and_then(|()| self.add_below(path));
            if !matches!(is_whole, Ok(true) | Err(Errno::NOENT | Errno::NOTDIR)) {
                changes.push(change(ChangeKind::Lost, Path::new(""), false));
            }
        }
        for change in changes {
            outbox.send(Kind::Change(change))?;
        }
        Ok(is_gone)
    }
}

fn change(kind: ChangeKind, path: &Path, is_directory: bool) -> FileChange {
    FileChange {
        kind: kind.into(),
        path: path.as_os_str().as_bytes().to_vec(),
        is_directory,
    }
}

fn kind(flags: ReadFlags) -> Option<ChangeKind> {
    let kinds = [
        (ReadFlags::CREATE, ChangeKind::Created),
        (ReadFlags::MODIFY, ChangeKind::Modified),
        (ReadFlags::CLOSE_WRITE, ChangeKind::Written),
        (ReadFlags::DELETE, ChangeKind::Removed),
        (ReadFlags::DELETE_SELF, ChangeKind::Removed),
        (ReadFlags::MOVED_FROM, ChangeKind::MovedAway),
        (ReadFlags::MOVE_SELF, ChangeKind::MovedAway),
        (ReadFlags::MOVED_TO, ChangeKind::MovedHere),
        (ReadFlags::ATTRIB, ChangeKind::Attributes),
    ];
    kinds
        .into_iter()
        .find(|(flag, _)| flags.contains(*flag))
        .map(|(_, kind)| kind)
}
