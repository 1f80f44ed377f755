//! Guest RAM in the host's address space.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::layers::{LayerStack, MAX_MAPPINGS, Piece, Source};
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::PageSet;
use crate::sys::HostRange;

/// Guest RAM as devices and loaders see it: addresses checked, no dirty bitmap (the host's page
/// tables are the dirty log). Clones are cheap, and each keeps the memory mapped.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// The errors of mapping RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused memory.
    #[error("cannot map {mib} MiB of guest RAM: {source}")]
    Map {
        /// The requested size in MiB.
        mib: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// A layer could not be mapped.
    #[error("cannot map pages {pages:?} of memory layer {layer}: {source}")]
    Layer {
        /// The layer's name.
        layer: String,
        /// The pages that were to be mapped.
        pages: Range<u64>,
        /// The host's answer.
        source: io::Error,
    },
    /// The layers are of a machine with another size of RAM.
    #[error("the memory layers are of {layers} bytes of RAM, and the machine has {ram}")]
    Size {
        /// The size of RAM of the layers, in bytes.
        layers: u64,
        /// The requested size of RAM, in bytes.
        ram: u64,
    },
    /// The layers are too fragmented.
    #[error(
        "the {layers} memory layers take {mappings} mappings, and at most {MAX_MAPPINGS} are \
         allowed: flatten them"
    )]
    NeedsFlatten {
        /// The number of layers.
        layers: usize,
        /// The number of mappings that they take.
        mappings: usize,
    },
    /// The host refused advice on memory.
    #[error("cannot {what} guest RAM: {source}")]
    Advise {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The mapping could not be described to `vm-memory`.
    #[error("cannot describe guest RAM: {0}")]
    Describe(String),
}

/// A contiguous piece of guest RAM, for `KVM_SET_USER_MEMORY_REGION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The guest's address of the region.
    pub guest_start: GuestAddress,
    /// This process's address of the region.
    pub host_address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// The content of memory that was not written.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// Zeros, private to this process.
    Anonymous,
    /// A memory file, which other processes may write as well.
    Shared(Arc<File>),
    /// Layers; a written page becomes private to this process.
    Layers(LayerStack),
}

/// All of a guest's RAM.
///
/// The mappings belong to the regions inside [`GuestRam`], which its clones share. Memory is
/// unmapped when this value and the last clone are dropped, so no clone can outlive it. Addresses
/// taken from [`GuestMemory::regions`] (KVM's memory slots) do not keep it mapped: the caller that
/// registers them must keep this value until the VM is destroyed.
#[derive(Debug)]
pub struct GuestMemory {
    ram: GuestRam,
    layout: RamLayout,
    regions: Vec<Region>,
    pub(crate) backing: Backing,
}

impl GuestMemory {
    /// New private RAM, all zero, which the host provides page by page as the guest touches it.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the host has no room.
    pub fn anonymous(layout: &RamLayout) -> Result<Self, MemoryError> {
        Self::map(layout, Backing::Anonymous)
    }

    /// New RAM in a memory file, which another process can map (vhost-user).
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the host has no room.
    pub fn shared(layout: &RamLayout) -> Result<Self, MemoryError> {
        let failed = |source: rustix::io::Errno| MemoryError::Map {
            mib: layout.size() >> 20,
            source: source.into(),
        };
        let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&file, layout.size()).map_err(failed)?;
        Self::map(layout, Backing::Shared(Arc::new(File::from(file))))
    }

    /// RAM on top of layers: pages are shared with all processes that map the same files until they
    /// are written, and anonymous where no layer has data.
    ///
    /// # Errors
    /// [`MemoryError::Size`], [`MemoryError::NeedsFlatten`], or the host's refusal.
    pub fn from_layers(layout: &RamLayout, stack: &LayerStack) -> Result<Self, MemoryError> {
        check_fits(layout, stack)?;
        let memory = Self::map(layout, Backing::Layers(stack.clone()))?;
        memory.map_pieces(stack)?;
        Ok(memory)
    }

    fn map_pieces(&self, stack: &LayerStack) -> Result<(), MemoryError> {
        let mut pieces = stack.pieces().iter();
        pieces.try_for_each(|piece| self.map_piece(stack, piece))?;
        self.set_kernel_advice();
        Ok(())
    }

    fn map(layout: &RamLayout, backing: Backing) -> Result<Self, MemoryError> {
        let (mut views, mut regions) = (Vec::new(), Vec::new());
        for range in layout.ranges() {
            let view = map_region(range.size as usize, range.offset, &backing);
            let view = view.map_err(|error| match error {
                MmapRegionError::Mmap(source) => MemoryError::Map {
                    mib: layout.size() >> 20,
                    source,
                },
                error => MemoryError::Describe(error.to_string()),
            })?;
            regions.push(Region {
                guest_start: range.start,
                host_address: view.as_ptr().expose_provenance() as u64,
                size: range.size,
            });
            let view = GuestRegionMmap::new(view, range.start).ok_or_else(|| {
                MemoryError::Describe("RAM ends beyond the address space".to_owned())
            })?;
            views.push(view);
        }
        let ram = GuestRam::from_regions(views)
            .map_err(|error| MemoryError::Describe(FromRangesError::from(error).to_string()))?;
        let memory = Self {
            ram,
            layout: *layout,
            regions,
            backing,
        };
        memory.set_kernel_advice();
        Ok(memory)
    }

    /// Replaces the RAM by private zero pages at the same addresses, so views and memory slots stay
    /// valid. This value is outdated afterwards (its layers are no longer mapped).
    ///
    /// # Errors
    /// [`MemoryError::Map`] or [`MemoryError::Advise`] if the host refuses.
    pub fn renewed(&self) -> Result<Self, MemoryError> {
        self.renewed_as(match &self.backing {
            Backing::Anonymous | Backing::Layers(_) => Backing::Anonymous,
            Backing::Shared(file) => Backing::Shared(Arc::clone(file)),
        })
    }

    /// Replaces the RAM by these layers at the same addresses, as [`GuestMemory::renewed`] does by
    /// zero pages.
    ///
    /// # Errors
    /// As [`GuestMemory::renewed`] and [`GuestMemory::from_layers`].
    pub fn renewed_from_layers(&self, stack: &LayerStack) -> Result<Self, MemoryError> {
        check_fits(&self.layout, stack)?;
        let memory = self.renewed_as(Backing::Layers(stack.clone()))?;
        memory.map_pieces(stack)?;
        Ok(memory)
    }

    fn renewed_as(&self, backing: Backing) -> Result<Self, MemoryError> {
        for (_, address, len) in self.host_addresses(0..self.pages()) {
            let at = ptr::with_exposed_provenance_mut(address as usize);
            match &self.backing {
                Backing::Anonymous | Backing::Layers(_) => {
                    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
                    // SAFETY: as in `map_piece`: the range lies within a mapping that `self.ram`
                    // owns, all accesses to guest memory are raw and find zeros from now on.
                    unsafe { mmap_anonymous(at, len, rw(), flags) }.map_err(|source| {
                        MemoryError::Map {
                            mib: (len >> 20) as u64,
                            source: source.into(),
                        }
                    })?;
                }
                Backing::Shared(_) => {
                    // SAFETY: the range lies within a mapping of ours; all accesses are raw.
                    unsafe { madvise(at, len, Advice::LinuxRemove) }.map_err(|source| {
                        MemoryError::Advise {
                            what: "empty",
                            source: source.into(),
                        }
                    })?;
                }
            }
        }
        let memory = Self {
            ram: self.ram.clone(),
            layout: self.layout,
            regions: self.regions.clone(),
            backing,
        };
        memory.set_kernel_advice();
        Ok(memory)
    }

    /// Maps a layer's data over the present mapping.
    fn map_piece(&self, stack: &LayerStack, piece: &Piece) -> Result<(), MemoryError> {
        let Source::Layer(index) = piece.source else {
            return Ok(());
        };
        let layer = &stack.layers()[index];
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        for (pages, address, len) in self.host_addresses(piece.pages.clone()) {
            let at = ptr::with_exposed_provenance_mut(address as usize);
            let offset = pages.start * PAGE_SIZE;
            // SAFETY: `[at, at + len)` lies within a mapping that `self.ram` owns, so this replaces
            // no memory of anybody else's, and unmapping the whole later unmaps this. No reference
            // into guest memory exists: all accesses are raw. The file is readable, and its length
            // was checked to be at least that of RAM when its index was.
            let mapped = unsafe { mmap(at, len, rw(), flags, layer.file(), offset) };
            mapped.map_err(|source| MemoryError::Layer {
                layer: layer.name().to_owned(),
                pages,
                source: source.into(),
            })?;
        }
        Ok(())
    }

    /// Sets the advice for all RAM, and again for each new mapping in it.
    ///
    /// RAM is excluded from core dumps, because it is large and belongs to the guest. A clone's RAM
    /// also uses no huge pages: with transparent huge pages set to `always`, the first byte that a
    /// clone writes where its template has no data would cost 2 MiB. A guest that boots follows the
    /// host's setting, because it touches most of its memory: huge pages save it thousands of
    /// faults.
    ///
    /// Kernels that do not know an advice lack the feature too.
    fn set_kernel_advice(&self) {
        let _ = self.advise(0..self.pages(), Advice::LinuxDontDump);
        if let Backing::Layers(_) = self.backing {
            let _ = self.advise(0..self.pages(), Advice::LinuxNoHugepage);
        }
    }

    pub(crate) fn advise(&self, pages: Range<u64>, advice: Advice) -> io::Result<()> {
        for (_, address, len) in self.host_addresses(pages) {
            let at = ptr::with_exposed_provenance_mut(address as usize);
            // SAFETY: the range lies within a mapping that `self.ram` owns. Advice that changes the
            // content of pages is harmless, since all accesses to guest memory are raw.
            unsafe { madvise(at, len, advice) }?;
        }
        Ok(())
    }

    /// Maps pages that will be read soon, without copying any: one call replaces a fault for each.
    ///
    /// # Errors
    /// [`MemoryError::Advise`] if a layer cannot be read.
    ///
    /// # Panics
    /// If `pages` reach beyond RAM.
    pub fn prefetch(&self, pages: &PageSet) -> Result<(), MemoryError> {
        let runs = pages.runs().iter();
        let mut done = runs.map(|run| self.advise(run.clone(), Advice::LinuxPopulateRead));
        done.try_for_each(|result| result)
            .map_err(|source| MemoryError::Advise {
                what: "prefetch",
                source,
            })
    }

    /// Makes private copies of pages that will be written soon: one call replaces a fault for each.
    ///
    /// # Errors
    /// [`MemoryError::Advise`] if the host is out of memory or a layer cannot be read.
    ///
    /// # Panics
    /// If `pages` reach beyond RAM.
    pub fn prefetch_for_writing(&self, pages: &PageSet) -> Result<(), MemoryError> {
        let runs = pages.runs().iter();
        let mut done = runs.map(|run| self.advise(run.clone(), Advice::LinuxPopulateWrite));
        done.try_for_each(|result| result)
            .map_err(|source| MemoryError::Advise {
                what: "prefetch",
                source,
            })
    }

    /// A view of all RAM. Clones are cheap and keep the memory mapped.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The layout of the RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The mappings, one for each contiguous piece; each takes a KVM memory slot.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The layers that the RAM was made from, if any.
    pub fn layers(&self) -> Option<&LayerStack> {
        match &self.backing {
            Backing::Layers(stack) => Some(stack),
            Backing::Anonymous | Backing::Shared(_) => None,
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.layout.size() / PAGE_SIZE
    }

    /// This process's addresses of these pages: in one piece, or in two around the PCI hole.
    fn host_addresses(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, u64, usize)> {
        assert!(pages.end <= self.pages(), "pages beyond RAM");
        host_addresses(&self.layout, &self.regions, pages)
    }

    /// The same addresses for reading and for putting content back.
    pub(crate) fn host_ranges(
        &self,
        pages: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, HostRange<'_>)> {
        self.host_addresses(pages).map(|(pages, address, len)| {
            // SAFETY: within a mapping that `self.ram` owns and that is readable and writable; the
            // value borrows from `self`. Pages are aligned, and nobody makes references into guest memory.
            (pages, unsafe { HostRange::new(address, len) })
        })
    }
}

fn check_fits(layout: &RamLayout, stack: &LayerStack) -> Result<(), MemoryError> {
    if stack.layout() != layout {
        return Err(MemoryError::Size {
            layers: stack.layout().size(),
            ram: layout.size(),
        });
    }
    if stack.needs_flatten() {
        return Err(MemoryError::NeedsFlatten {
            layers: stack.layers().len(),
            mappings: stack.pieces().len(),
        });
    }
    Ok(())
}

/// The addresses of pages of RAM that is mapped as `regions`: page numbers, address and bytes of
/// each contiguous piece. Pages beyond RAM are omitted.
pub(crate) fn host_addresses(
    layout: &RamLayout,
    regions: &[Region],
    pages: Range<u64>,
) -> impl Iterator<Item = (Range<u64>, u64, usize)> {
    layout
        .ranges()
        .zip(regions)
        .filter_map(move |(range, region)| {
            let first = range.offset / PAGE_SIZE;
            let here = pages.start.max(first)..pages.end.min(first + range.size / PAGE_SIZE);
            let address = region.host_address + here.start.saturating_sub(first) * PAGE_SIZE;
            let len = here.end.saturating_sub(here.start) * PAGE_SIZE;
            (len > 0).then_some((here, address, len as usize))
        })
}

fn map_region(
    len: usize,
    offset: u64,
    backing: &Backing,
) -> Result<MmapRegion<()>, MmapRegionError> {
    let builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    match backing {
        Backing::Anonymous | Backing::Layers(_) => builder
            .with_mmap_flags(private | libc::MAP_ANONYMOUS)
            .build(),
        Backing::Shared(file) => builder
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .build(),
    }
}

fn rw() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer_writer::{Checksums, LayerWriter};
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
    fn a_view_keeps_the_memory_mapped() {
        let layout = RamLayout::new(1 << 20).unwrap();
        let memory = GuestMemory::anonymous(&layout).unwrap();
        let ram = memory.ram().clone();
        drop(memory);
        ram.write_obj(7_u64, GuestAddress(4096)).unwrap();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(4096)).unwrap(), 7);
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

    /// The flags that the kernel shows for each mapping of RAM.
    fn mapping_flags(memory: &GuestMemory) -> Vec<String> {
        let ram: Vec<Range<u64>> = memory
            .regions()
            .iter()
            .map(|region| region.host_address..region.host_address + region.size)
            .collect();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_ram = false;
        let mut flags = Vec::new();
        for line in smaps.lines() {
            let first = line.split_whitespace().next().unwrap();
            if let Some((start, end)) = first.split_once('-') {
                let [start, end] = [start, end].map(|it| u64::from_str_radix(it, 16).unwrap());
                is_ram = ram.iter().any(|it| it.start < end && start < it.end);
            } else if let Some(shown) = line.strip_prefix("VmFlags:")
                && is_ram
            {
                flags.push(shown.to_owned());
            }
        }
        flags
    }

    fn has(flags: &str, flag: &str) -> bool {
        flags.split_whitespace().any(|it| it == flag)
    }

    fn refuses_huge_pages(memory: &GuestMemory) -> bool {
        let flags = mapping_flags(memory);
        assert!(!flags.is_empty());
        flags.iter().all(|it| has(it, "nh"))
    }

    fn follows_the_host(memory: &GuestMemory) -> bool {
        let flags = mapping_flags(memory);
        assert!(!flags.is_empty());
        !flags.iter().any(|it| has(it, "nh") || has(it, "hg"))
    }

    /// RAM over a layer that has data in two of its pages.
    fn layered(layout: &RamLayout) -> GuestMemory {
        let source = GuestMemory::anonymous(layout).unwrap();
        let pages: PageSet = [1..2, 700..701].into_iter().collect();
        for page in [1, 700] {
            let address = GuestAddress(page * PAGE_SIZE);
            source.ram().write_obj(page, address).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let mut writer = LayerWriter::new(file, "base", *layout, None).unwrap();
        writer.copy(&source, &pages).unwrap();
        let layer = writer.finish(Checksums::Transient).unwrap();
        GuestMemory::from_layers(layout, &LayerStack::new(vec![layer]).unwrap()).unwrap()
    }

    #[test]
    fn a_clones_ram_takes_no_huge_pages_and_a_booted_guests_follows_the_host() {
        let layout = RamLayout::new(8 << 20).unwrap();
        let clone = layered(&layout);
        // The layer's data and the holes around it are mappings of their own.
        assert!(mapping_flags(&clone).len() > 2);
        assert!(refuses_huge_pages(&clone));
        let booted = GuestMemory::anonymous(&layout).unwrap();
        assert!(follows_the_host(&booted));
        // A clone that reboots has nothing in common with its template any more.
        assert!(follows_the_host(&clone.renewed().unwrap()));
    }
}
