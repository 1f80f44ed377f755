//! Directories for the layers that the clones of a live fork share.
//!
//! Such a directory is made on disk, and not in the runtime directory, which is in memory on most
//! hosts: the layers of live forks would compete for it with the guests, and with the sockets of every
//! VM. Only a user without a home has no other place. The directory is removed when no process holds
//! its [`LOCK`] any more.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use clone_api::{ApiError, Bytes, ErrorCode};
use clone_start::error::{Result, failed};

use super::Runtime;
use crate::locked_dir::{LOCK, LockedDir, is_unused, lock_in};

/// The prefix of the names of these directories.
const PREFIX: &str = ".live-";
/// The fraction of a file system, one part in this many, that live forks leave free. In the runtime
/// directory, the sockets and logs of every VM and the host's other services need that room.
const RESERVE: u64 = 16;

/// A directory that exists as long as this value or a VM holds its lock.
#[derive(Debug)]
pub struct LiveDir(LockedDir);

impl LiveDir {
    /// The directory's path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The file that every user of the directory holds a shared lock on.
    pub fn lock_path(&self) -> PathBuf {
        self.path().join(LOCK)
    }

    /// Makes a new file in the directory.
    pub fn new_file(&self, name: &str) -> Result<File> {
        self.0.new_file(name)
    }

    fn make(place: &Path) -> Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(place)
            .map_err(failed("make", place))?;
        let _place = lock_in(place)?;
        let random = clone_base::random::hex::<8>();
        let random = random.map_err(|error| ApiError::internal(&error))?;
        LockedDir::make(place.join(format!("{PREFIX}{random}"))).map(Self)
    }

    /// Removes the directory after a fork that failed.
    fn remove(self) {
        if let Err(error) = fs::remove_dir_all(self.path()) {
            // The next command sweeps the directory.
            tracing::warn!(path = %self.path().display(), %error, "a failed live fork left files");
        }
    }
}

impl Runtime {
    /// Sets the directory for live forks.
    #[must_use]
    pub fn with_live_dir(self, live: PathBuf) -> Self {
        Self {
            live: Some(live),
            ..self
        }
    }

    /// Makes a new directory and fills it with `write`, which writes about `bytes`.
    ///
    /// # Errors
    /// [`ErrorCode::OutOfSpace`] if the disk has no room; otherwise the first failure. The directory
    /// is removed in both cases.
    pub fn fill_live_dir<T>(
        &self,
        bytes: u64,
        write: impl FnOnce(&LiveDir) -> Result<T>,
    ) -> Result<(LiveDir, T)> {
        let place = self.live.as_deref().unwrap_or(&self.vms);
        let room = check_room(place, bytes)?;
        let dir = LiveDir::make(place)?;
        match write(&dir) {
            Ok(written) => Ok((dir, written)),
            Err(error) => {
                dir.remove();
                match error.code {
                    ErrorCode::OutOfSpace => Err(no_room(bytes, room, place)),
                    _ => Err(error),
                }
            }
        }
    }

    /// Removes the directories that no clone needs any more.
    pub(super) fn sweep_live(&self) -> Result<()> {
        for place in self.live_places() {
            let entries = match fs::read_dir(place) {
                Ok(entries) => entries,
                // The directory is made by the first live fork.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed("list", place)(error)),
            };
            let _place = lock_in(place)?;
            for entry in entries {
                let entry = entry.map_err(failed("list", place))?;
                if entry
                    .file_name()
                    .as_encoded_bytes()
                    .starts_with(PREFIX.as_bytes())
                {
                    remove_unused(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    /// The places where there may be such directories: former releases made them in the runtime
    /// directory.
    fn live_places(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.vms.as_path()).chain(self.live.as_deref())
    }
}

/// The room in `place`, in bytes, which has to suffice for `bytes`.
///
/// # Errors
/// [`ErrorCode::OutOfSpace`].
pub(super) fn check_room(place: &Path, bytes: u64) -> Result<u64> {
    let room = room_at(place)?;
    match room < bytes {
        true => Err(no_room(bytes, room, place)),
        false => Ok(room),
    }
}

/// The bytes available to states of VMs on the file system of `place`, which need not exist yet.
fn room_at(place: &Path) -> Result<u64> {
    let there = place.ancestors().find(|path| path.exists());
    let there = there.unwrap_or(place);
    let found = rustix::fs::statvfs(there)
        .map_err(|error| failed("measure the room in", there)(error.into()))?;
    // A tmpfs without a limit reports no blocks.
    if found.f_blocks == 0 {
        return Ok(u64::MAX);
    }
    let free = found.f_bavail.saturating_sub(found.f_blocks / RESERVE);
    Ok(free * found.f_frsize)
}

fn no_room(bytes: u64, room: u64, place: &Path) -> ApiError {
    let message = format!(
        "the state of the VM has no room: it takes about {}, and there is room for {} in {}",
        Bytes(bytes),
        Bytes(room),
        place.display()
    );
    ApiError::new(ErrorCode::OutOfSpace, message)
        .advise("make room there, or take a snapshot to a disk that has room and fork that")
}

/// Removes a directory if no process holds its lock.
fn remove_unused(dir: &Path) -> Result<()> {
    if !is_unused(dir) {
        return Ok(());
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clone_memory::{Checksums, GuestMemory, LayerWriter, PageSet, RamLayout};
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use clone_start::error::storage_failed;

    const MIB: u64 = 1 << 20;

    /// A runtime directory with so much room, in a mount of this thread's own.
    struct SmallRun {
        root: tempfile::TempDir,
        runtime: Runtime,
    }

    impl SmallRun {
        fn new(mib: u64) -> Self {
            // SAFETY: the mounts of this thread alone become its own; it shares no file system
            // attributes that another thread counts on.
            let alone = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
            assert_eq!(alone, 0, "{}", io::Error::last_os_error());
            let private = rustix::mount::MountPropagationFlags::PRIVATE
                | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            let root = tempfile::tempdir().unwrap();
            let run = root.path().join("run");
            fs::create_dir(&run).unwrap();
            let size = std::ffi::CString::new(format!("size={mib}M")).unwrap();
            mount(
                "tmpfs",
                &run,
                "tmpfs",
                MountFlags::empty(),
                Some(size.as_c_str()),
            )
            .unwrap();
            let runtime = Runtime::at(&run).unwrap();
            let runtime = runtime.with_live_dir(root.path().join("disk"));
            Self { root, runtime }
        }

        fn run(&self) -> PathBuf {
            self.root.path().join("run/vms")
        }

        fn disk(&self) -> PathBuf {
            self.root.path().join("disk")
        }
    }

    impl Drop for SmallRun {
        fn drop(&mut self) {
            let _ = unmount(self.root.path().join("run"), UnmountFlags::DETACH);
        }
    }

    fn live_dirs(place: &Path) -> usize {
        let entries = fs::read_dir(place).map(Iterator::collect::<Vec<_>>);
        let entries = entries.unwrap_or_default().into_iter().flatten();
        let is_live = |name: std::ffi::OsString| name.to_string_lossy().starts_with(PREFIX);
        entries.filter(|entry| is_live(entry.file_name())).count()
    }

    fn write(dir: &LiveDir, bytes: u64) -> Result<()> {
        let mut file = dir.new_file("memory")?;
        let written = (0..bytes / MIB).try_for_each(|_| file.write_all(&[7; MIB as usize]));
        written.map_err(|error| storage_failed(&error))
    }

    #[test]
    fn a_live_fork_is_on_disk_however_small_it_is() {
        let host = SmallRun::new(32);
        let (dir, ()) = host
            .runtime
            .fill_live_dir(MIB, |dir| write(dir, MIB))
            .unwrap();
        assert!(dir.path().starts_with(host.disk()));
        assert_eq!(live_dirs(&host.run()), 0);
    }

    #[test]
    fn the_layer_of_a_large_guest_does_not_fill_a_small_run() {
        let host = SmallRun::new(16);
        let layout = RamLayout::new(64 * MIB).unwrap();
        let memory = GuestMemory::anonymous(&layout).unwrap();
        let content = vec![7_u8; 48 << 20];
        memory.ram().write_slice(&content, GuestAddress(0)).unwrap();
        let pages: PageSet = std::iter::once(0..(48 << 20) / 4096).collect();
        let copy = |dir: &LiveDir| {
            let file = dir.new_file("memory")?;
            let mut writer = LayerWriter::new(file, "memory", layout, None)
                .map_err(|error| storage_failed(&error))?;
            let copied = writer.copy(&memory, &pages);
            copied.map_err(|error| storage_failed(&error))?;
            let layer = writer.finish(Checksums::Transient);
            layer.map_err(|error| storage_failed(&error))
        };
        let (dir, _) = host.runtime.fill_live_dir(MIB, copy).unwrap();
        assert!(dir.path().starts_with(host.disk()));
        assert_eq!(live_dirs(&host.run()), 0);
    }

    #[test]
    fn where_the_disk_has_no_room_the_refusal_says_so_and_nothing_is_left() {
        let mut host = SmallRun::new(16);
        // The small file system stands for a disk.
        host.runtime.live = Some(host.root.path().join("run/disk"));
        for estimate in [MIB, 1 << 40] {
            let filled = host
                .runtime
                .fill_live_dir(estimate, |dir| write(dir, 64 * MIB));
            let error = filled.map(drop).unwrap_err();
            assert_eq!(error.code, ErrorCode::OutOfSpace);
            assert!(error.message.contains("run/disk"), "{error}");
            assert!(error.advice.is_some());
            assert_eq!(live_dirs(&host.run()), 0);
            assert_eq!(live_dirs(&host.root.path().join("run/disk")), 0);
        }
    }

    #[test]
    fn another_failure_is_told_at_once_and_nothing_is_left() {
        let host = SmallRun::new(16);
        let filled = host.runtime.fill_live_dir(MIB, |dir| {
            dir.new_file("memory")?;
            Err::<(), _>(ApiError::new(ErrorCode::Conflict, "the VM is ending"))
        });
        assert_eq!(filled.map(drop).unwrap_err().code, ErrorCode::Conflict);
        assert_eq!((live_dirs(&host.run()), live_dirs(&host.disk())), (0, 0));
    }

    #[test]
    fn a_directory_is_swept_wherever_it_is_when_nobody_needs_it() {
        let host = SmallRun::new(16);
        let fill = || host.runtime.fill_live_dir(MIB, |dir| write(dir, MIB));
        let (kept, ()) = fill().unwrap();
        let (left, ()) = fill().unwrap();
        // A former release made it in the runtime directory.
        let former = LiveDir::make(&host.run()).unwrap();
        drop((left, former));
        assert_eq!((live_dirs(&host.run()), live_dirs(&host.disk())), (1, 2));
        host.runtime.sweep().unwrap();
        assert_eq!((live_dirs(&host.run()), live_dirs(&host.disk())), (0, 1));
        assert!(kept.path().join("memory").exists());
        drop(kept);
        host.runtime.sweep().unwrap();
        assert_eq!(live_dirs(&host.disk()), 0);
    }
}
