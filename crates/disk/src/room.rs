//! The room that a layer that ends with its machine may take on its host.
//!
//! Such a layer lies beside those of other machines, on a file system that is not its guest's
//! alone. It may grow only while it leaves as much room free as it holds itself: one guest gets at
//! most a half of what is there, two that grow side by side a third each, and one that comes later
//! still finds room. A layer in memory has a limit, too, since that memory counts as its machine's
//! own.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{FsWord, fstat, fstatfs, fstatvfs};

use crate::error::{DiskError, io_error};

/// What a layer in memory may take.
pub const MEMORY_ROOM: u64 = 256 << 20;
/// Room is granted in steps, so that few writes ask the file system.
const GRANT: u64 = 16 << 20;
/// The kinds of file system that keep files in memory (`linux/magic.h`).
const IN_MEMORY: [FsWord; 2] = [0x0102_1994, 0x8584_58F6];

/// Whether the file system of `file` keeps its files in memory.
///
/// # Errors
/// Where the file system does not answer.
pub fn is_in_memory(file: &File) -> io::Result<bool> {
    Ok(IN_MEMORY.contains(&fstatfs(file)?.f_type))
}

/// The memory that the layer in `file`, which ends with its machine, may take.
pub fn memory_room(file: &File) -> u64 {
    match is_in_memory(file) {
        Ok(false) => 0,
        // One that cannot be asked may be in memory.
        Ok(true) | Err(_) => MEMORY_ROOM,
    }
}

/// The room of a layer: without a limit of ours where it is `durable`, a file that its owner asked
/// for by name.
pub(crate) fn of_layer(file: &Arc<File>, durable: bool) -> Result<Option<Room>, DiskError> {
    if durable {
        return Ok(None);
    }
    let room = Room::new(Arc::clone(file)).map_err(io_error("look at the layer's file system"))?;
    Ok(Some(room))
}

/// The room of one layer.
pub(crate) struct Room {
    file: Arc<File>,
    in_memory: bool,
    /// Bytes that may be taken before the file system is asked again.
    granted: u64,
}

impl Room {
    /// The room of the layer in `file`.
    pub(crate) fn new(file: Arc<File>) -> io::Result<Self> {
        Ok(Self {
            in_memory: is_in_memory(&file)?,
            file,
            granted: 0,
        })
    }

    /// Takes `bytes` that the layer will grow by.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] where it may not grow so far; the machine goes on.
    pub(crate) fn take(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.granted {
            let allowed = self.allowed()?;
            if bytes > allowed {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.granted = allowed.min(GRANT.max(bytes));
        }
        self.granted -= bytes;
        Ok(())
    }

    /// The bytes that the layer may grow by, as things are now.
    fn allowed(&self) -> io::Result<u64> {
        // In units of 512 bytes, whatever the file system's own.
        let held = fstat(&self.file)?.st_blocks as u64 * 512;
        let system = fstatvfs(&self.file)?;
        // The kernel's own file system for anonymous memory has no size.
        let free = match system.f_blocks {
            0 => u64::MAX,
            _ => system.f_bavail.saturating_mul(system.f_frsize),
        };
        Ok(allowed(held, free, self.in_memory))
    }
}

/// What a layer that holds `held` bytes may grow by where `free` are free.
fn allowed(held: u64, free: u64, in_memory: bool) -> u64 {
    // Half of the difference, so that afterwards it holds no more than is free.
    let fair = free.saturating_sub(held) / 2;
    match in_memory {
        true => fair.min(MEMORY_ROOM.saturating_sub(held)),
        false => fair,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_layer_never_holds_more_than_it_leaves_free(
            held in 0_u64..1 << 40, free in 0_u64..1 << 40, in_memory in any::<bool>(),
        ) {
            let grows = allowed(held, free, in_memory);
            prop_assert!(grows == 0 || held + grows <= free - grows);
            prop_assert!(!in_memory || grows == 0 || held + grows <= MEMORY_ROOM);
        }

        #[test]
        fn guests_that_take_all_they_can_side_by_side_get_the_same_and_leave_as_much(
            size in 1_u64 << 30..1 << 33, guests in 1_usize..20,
        ) {
            let mut held = vec![0; guests];
            loop {
                let before = held.clone();
                for guest in 0..guests {
                    let free = size - held.iter().sum::<u64>();
                    held[guest] += allowed(held[guest], free, false).min(GRANT);
                }
                if held == before {
                    break;
                }
            }
            let free = size - held.iter().sum::<u64>();
            let share = size / (guests as u64 + 1);
            let near = |bytes: u64| bytes.abs_diff(share) <= guests as u64 * GRANT;
            prop_assert!(near(free) && held.iter().all(|held| near(*held)), "{free} {held:?}");
        }
    }

    #[test]
    fn anonymous_memory_ends_at_its_limit() {
        let file = Arc::new(crate::ephemeral(None).unwrap());
        assert!(is_in_memory(&file).unwrap());
        let mut room = Room::new(Arc::clone(&file)).unwrap();
        assert!(room.take(MEMORY_ROOM + 1).is_err());
        room.take(MEMORY_ROOM).unwrap();
        // Nothing was written: it is asked anew.
        room.take(1).unwrap();
        rustix::fs::ftruncate(&file, MEMORY_ROOM).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, MEMORY_ROOM).unwrap();
        let mut room = Room::new(file).unwrap();
        let refused = room.take(1).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
    }
}
