//! Returns memory that the guest has given up to the host.

use std::io;

use rustix::mm::{Advice, madvise};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::virtio::GuestRam;

/// A range of guest-physical memory, in whole 4 KiB pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// Its first byte.
    pub start: GuestAddress,
    /// Its length in bytes.
    pub len: u64,
}

/// Releases memory whose content the guest has given up.
pub trait ReleaseRanges: Send {
    /// Releases `ranges`, which are sorted, disjoint and inside RAM. The guest may touch them again
    /// at any time, and must then find memory with any content that it could have seen before.
    fn release(&mut self, ranges: &[GuestRange]) -> io::Result<()>;
}

/// Releases pages of mapped RAM: private mappings drop their copies (`MADV_DONTNEED`; what a clone
/// had changed reverts to the template's page), shared ones punch holes into their file
/// (`MADV_REMOVE`).
pub struct DiscardRam {
    ram: GuestRam,
}

impl DiscardRam {
    /// Makes a releaser for `ram`, which it keeps mapped.
    pub fn new(ram: GuestRam) -> Self {
        Self { ram }
    }
}

impl ReleaseRanges for DiscardRam {
    fn release(&mut self, ranges: &[GuestRange]) -> io::Result<()> {
        for range in ranges {
            let mut start = range.start;
            let mut left = range.len;
            while left > 0 {
                let (region, at) = self
                    .ram
                    .to_region_addr(start)
                    .ok_or_else(|| io::Error::other(format!("{start:?} is not in RAM")))?;
                let len = left.min(region.len() - at.raw_value());
                discard(region, at, len)?;
                start = GuestAddress(start.raw_value() + len);
                left -= len;
            }
        }
        Ok(())
    }
}

fn discard(region: &impl RegionFlags, at: MemoryRegionAddress, len: u64) -> io::Result<()> {
    let advice = if region.is_shared() {
        Advice::LinuxRemove
    } else {
        Advice::LinuxDontNeed
    };
    let address = region.get_host_address(at).map_err(io::Error::other)?;
    // SAFETY: `address` and `len` lie in one live mapping of guest RAM (`at + len` is held to the
    // region by the caller), which no Rust reference points into: it is only reached by volatile
    // accesses, which allow for a page whose content changes.
    unsafe { madvise(address.cast(), len as usize, advice) }?;
    Ok(())
}

/// The properties of a mapping that decide how its pages are discarded.
trait RegionFlags: GuestMemoryRegion {
    fn is_shared(&self) -> bool;
}

impl RegionFlags for vm_memory::GuestRegionMmap<()> {
    fn is_shared(&self) -> bool {
        self.flags() & libc::MAP_SHARED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{Bytes, FileOffset, GuestRegionMmap, MmapRegion};

    const LEN: usize = 1 << 20;

    fn ram_on(file: &File, flags: i32) -> GuestRam {
        let region = MmapRegion::build(
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
        );
        let region = GuestRegionMmap::new(region.unwrap(), GuestAddress(0)).unwrap();
        GuestRam::from_regions(vec![region]).unwrap()
    }

    fn memfd() -> File {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("ram", flags).unwrap());
        file.set_len(LEN as u64).unwrap();
        file
    }

    fn release(ram: &GuestRam, start: u64, len: u64) {
        let range = GuestRange {
            start: GuestAddress(start),
            len,
        };
        DiscardRam::new(ram.clone()).release(&[range]).unwrap();
    }

    #[test]
    fn released_pages_of_a_shared_file_are_holes() {
        use std::os::unix::fs::MetadataExt;
        let file = memfd();
        let ram = ram_on(&file, libc::MAP_SHARED);
        ram.write_slice(&[7; LEN], GuestAddress(0)).unwrap();
        let full = file.metadata().unwrap().blocks();
        release(&ram, 0x1000, 0x4000);
        assert_eq!(full - file.metadata().unwrap().blocks(), 0x4000 / 512);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 0);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0xfff)).unwrap(), 7);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 7);
    }

    #[test]
    fn released_pages_of_a_clone_revert_to_the_template() {
        let template = memfd();
        ram_on(&template, libc::MAP_SHARED)
            .write_slice(&[1; LEN], GuestAddress(0))
            .unwrap();
        let clone = ram_on(&template, libc::MAP_PRIVATE);
        clone.write_slice(&[2; LEN], GuestAddress(0)).unwrap();
        release(&clone, 0x1000, 0x1000);
        assert_eq!(clone.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 1);
        assert_eq!(clone.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 2);
    }

    #[test]
    fn memory_that_is_not_there_cannot_be_released() {
        let ram = crate::virtio::testing::ram(LEN);
        let range = GuestRange {
            start: GuestAddress(LEN as u64 - 0x1000),
            len: 0x2000,
        };
        assert!(DiscardRam::new(ram).release(&[range]).is_err());
    }
}
