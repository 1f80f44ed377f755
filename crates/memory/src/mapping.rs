//! Guest RAM in the host's address space.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use crate::layout::RamLayout;

/// Guest RAM as devices and loaders see it: addresses checked, no dirty bitmap (the host's page
/// tables are the dirty log).
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Why RAM could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gave no memory.
    #[error("cannot map {mib} MiB of guest RAM: {source}")]
    Map {
        /// How much was asked for.
        mib: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// The mapping could not be described to `vm-memory`.
    #[error("cannot describe guest RAM: {0}")]
    Describe(String),
}

/// A mapping that is unmapped when it goes.
struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping is plain memory with no thread affinity; whoever reads or writes it does so
// through `GuestRam`, whose accesses are volatile and made for memory shared with a guest.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` itself has no methods that write.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are exactly what `mmap` returned and was asked for, nobody else
        // unmaps it, and `GuestMemory` keeps this until all users of the memory are gone.
        if let Err(error) = unsafe { munmap(self.start.as_ptr(), self.len) } {
            debug_assert!(false, "munmap: {error}");
        }
    }
}

/// A contiguous piece of guest RAM, for `KVM_SET_USER_MEMORY_REGION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub guest_start: GuestAddress,
    /// Where this process sees it.
    pub host_address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// All of a guest's RAM.
///
/// [`GuestMemory::ram`] lends views that do not own the mapping, so this value must outlive them:
/// the machine holds it until its CPUs and devices are gone.
pub struct GuestMemory {
    ram: GuestRam,
    layout: RamLayout,
    regions: Vec<Region>,
    _mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// Fresh private RAM, all zero, given by the host page by page as the guest touches it.
    pub fn anonymous(layout: &RamLayout) -> Result<Self, MemoryError> {
        Self::map(layout, libc::MAP_PRIVATE, |len, _| {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
            unsafe { mmap_anonymous(ptr::null_mut(), len, rw(), flags) }
        })
    }

    /// Fresh RAM in a memory file, for what another process must reach (vhost-user).
    pub fn shared(layout: &RamLayout) -> Result<Self, MemoryError> {
        let failed = |source: rustix::io::Errno| MemoryError::Map {
            mib: layout.size() >> 20,
            source: source.into(),
        };
        let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&file, layout.size()).map_err(failed)?;
        Self::map(layout, libc::MAP_SHARED, |len, offset| {
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            // SAFETY: a new mapping at an address of the kernel's choice touches no other memory;
            // the file is ours alone and as long as the mapping, so it cannot be cut short.
            unsafe { mmap(ptr::null_mut(), len, rw(), flags, file.as_fd(), offset) }
        })
    }

    /// Maps every range with `map`; `sharing` is `MAP_PRIVATE` or `MAP_SHARED`, whichever that
    /// does, and tells those who release pages how.
    fn map(
        layout: &RamLayout,
        sharing: libc::c_int,
        map: impl Fn(usize, u64) -> rustix::io::Result<*mut c_void>,
    ) -> Result<Self, MemoryError> {
        let (mut views, mut regions, mut mappings) = (Vec::new(), Vec::new(), Vec::new());
        for range in layout.ranges() {
            let len = range.size as usize;
            let start = map(len, range.offset).map_err(|source| MemoryError::Map {
                mib: layout.size() >> 20,
                source: source.into(),
            })?;
            let start = NonNull::new(start)
                .ok_or_else(|| MemoryError::Describe("mapped at address 0".to_owned()))?;
            let mapping = Mapping { start, len };
            // RAM does not belong in a core dump: it is large, and the guest's own.
            // SAFETY: the range was just mapped and is ours; the advice changes no content.
            let _ = unsafe { madvise(start.as_ptr(), len, Advice::LinuxDontDump) };
            // SAFETY: the mapping is of `len` bytes, readable and writable, and lives as long as
            // the `GuestMemory` that lends the view.
            let view = unsafe {
                MmapRegion::build_raw(
                    start.as_ptr().cast(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    sharing,
                )
            };
            let view =
                view.map_err(|error: MmapRegionError| MemoryError::Describe(error.to_string()))?;
            let view = GuestRegionMmap::new(view, range.start).ok_or_else(|| {
                MemoryError::Describe("RAM ends beyond the address space".to_owned())
            })?;
            views.push(Arc::new(view));
            regions.push(Region {
                guest_start: range.start,
                host_address: start.as_ptr() as u64,
                size: range.size,
            });
            mappings.push(mapping);
        }
        let ram = GuestRam::from_arc_regions(views)
            .map_err(|error| MemoryError::Describe(error.to_string()))?;
        Ok(Self {
            ram,
            layout: *layout,
            regions,
            _mappings: mappings,
        })
    }

    /// A view of all RAM. Clones are cheap; none may outlive this value.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How RAM is laid out.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The mappings, one for each contiguous piece.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
}

fn rw() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn ram_is_zero_and_writable_on_both_sides_of_the_hole() {
        let layout = RamLayout::new((3 << 30) + (16 << 20)).unwrap();
        for memory in [
            GuestMemory::anonymous(&layout).unwrap(),
            GuestMemory::shared(&layout).unwrap(),
        ] {
            assert_eq!(memory.regions().len(), 2);
            for address in [0, (3 << 30) - 8, 4 << 30, (4 << 30) + (16 << 20) - 8] {
                let address = GuestAddress(address);
                assert_eq!(memory.ram().read_obj::<u64>(address).unwrap(), 0);
                memory.ram().write_obj(address.0, address).unwrap();
                assert_eq!(memory.ram().read_obj::<u64>(address).unwrap(), address.0);
            }
            assert!(!memory.ram().address_in_range(GuestAddress(3 << 30)));
        }
    }

    #[test]
    fn views_tell_whether_they_are_shared() {
        let layout = RamLayout::new(16 << 20).unwrap();
        let shared = |memory: GuestMemory| {
            let mut regions = memory.ram().iter();
            regions.all(|region| region.flags() & libc::MAP_SHARED != 0)
        };
        assert!(shared(GuestMemory::shared(&layout).unwrap()));
        assert!(!shared(GuestMemory::anonymous(&layout).unwrap()));
    }

    #[test]
    fn more_ram_than_the_host_has_addresses_for_is_an_error() {
        let layout = RamLayout::new(1 << 46).unwrap();
        let (first, second) = (
            GuestMemory::anonymous(&layout),
            GuestMemory::anonymous(&layout),
        );
        let third = GuestMemory::anonymous(&layout);
        let errors = [first, second, third].into_iter().filter_map(Result::err);
        let message = errors.map(|error| error.to_string()).next().unwrap();
        assert!(message.contains("67108864 MiB"), "{message}");
    }
}
