//! Finds the pages that a guest has changed; the host's page tables serve as the log.
//!
//! - [`GuestMemory::private_pages`]: the pages that are no longer shared with the layers below.
//!   It costs nothing while the guest runs.
//! - [`ChangeTracker`]: the pages that changed since a point in time, by asynchronous write
//!   protection of all mapped pages. Pages that are not mapped need no protection, since mapping
//!   them shows. So no markers are left for them (`UFFD_FEATURE_WP_UNPOPULATED`), which would
//!   look like swapped pages.
//!
//! Both detect writes by the guest, by this process and by the kernel on its behalf (vhost,
//! `read`). They do not detect writes by direct memory access to pages that were pinned before the
//! tracker was armed (`O_DIRECT`, VFIO); the caller must wait for such requests before it arms the
//! tracker.
//!
//! While a tracker exists, layer pages that the host reclaims may look swapped, hence private: a
//! snapshot then contains them needlessly, with the right content.
//!
//! A page that was returned to the host (`MADV_DONTNEED`: balloon, free page reporting) has the
//! content of the layers below, and is no longer private. The guest has declared its content
//! unused.
//!
//! Needs Linux 6.7 (`PAGEMAP_SCAN`, `UFFD_FEATURE_WP_ASYNC`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN,
};
use rustix::fs::{SeekFrom, seek};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::layout::{PAGE_SIZE, RamLayout};
use crate::mapping::{Backing, GuestMemory, GuestRam, Region, host_addresses};
use crate::pages::PageSet;
use crate::sys::{Scan, WriteProtection, pagemap_scan};

/// The errors of finding changed pages.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The page tables could not be opened.
    #[error("cannot open /proc/self/pagemap: {0}")]
    Open(io::Error),
    /// The kernel lacks a feature.
    #[error(
        "the kernel cannot {what}: Linux 6.7 or newer is needed, and this is {}",
        kernel()
    )]
    Unsupported {
        /// The missing feature.
        what: &'static str,
    },
    /// A call to the kernel failed.
    #[error("cannot {what}: {source}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The memory is shared, so other processes may write it.
    #[error("cannot track changes of shared guest RAM: other processes' writes would be missed")]
    Shared,
}

fn kernel() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// This process's page tables. The process that owns the memory must open them (after any `fork`),
/// before a jail removes `/proc`.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the page tables so that they do not show physical frame numbers, even to root.
    ///
    /// At each read, the kernel checks whether the opener of the file had `CAP_SYS_ADMIN`, not
    /// whether the reader has it. So a descriptor opened by root would show physical addresses as
    /// long as it exists. The scans here need no frame numbers.
    ///
    /// # Errors
    /// [`DirtyError::Open`].
    pub fn open() -> Result<Self, DirtyError> {
        without_capability(CapabilitySet::SYS_ADMIN, || {
            File::open("/proc/self/pagemap")
        })
        .map(Self)
        .map_err(DirtyError::Open)
    }

    /// Duplicates the descriptor.
    ///
    /// # Errors
    /// [`DirtyError::Open`] if there are no more file descriptors.
    pub fn try_clone(&self) -> Result<Self, DirtyError> {
        self.0.try_clone().map(Self).map_err(DirtyError::Open)
    }

    /// Calls `found` with each matching run of these pages, ascending.
    pub(crate) fn scan(
        &self,
        layout: &RamLayout,
        regions: &[Region],
        pages: Range<u64>,
        scan: Scan,
        mut found: impl FnMut(Range<u64>, u32),
    ) -> Result<(), DirtyError> {
        for (here, address, len) in host_addresses(layout, regions, pages) {
            let addresses = address..address + len as u64;
            let page = |at: u64| here.start + (at - address) / PAGE_SIZE;
            pagemap_scan(self.0.as_fd(), addresses, scan, |run, categories| {
                found(page(run.start)..page(run.end), categories);
            })
            .map_err(|error| failed("scan page tables", error))?;
        }
        Ok(())
    }
}

/// Runs `work` while the calling thread's effective set lacks `capability`.
fn without_capability<T>(
    capability: CapabilitySet,
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let before = capabilities(None)?;
    let reduced = CapabilitySets {
        effective: before.effective - capability,
        ..before
    };
    set_capabilities(None, reduced)?;
    let done = work();
    set_capabilities(None, before)?;
    done
}

fn failed(what: &'static str, source: io::Error) -> DirtyError {
    match source.raw_os_error() {
        Some(libc::ENOTTY | libc::ENOSYS) => DirtyError::Unsupported { what },
        _ if source.kind() == io::ErrorKind::Unsupported => DirtyError::Unsupported { what },
        _ => DirtyError::Failed { what, source },
    }
}

/// Private pages of a private mapping: neither a layer's, nor the zero page that reads of untouched
/// memory map. Swapped pages count as well.
const PRIVATE: Scan = Scan {
    all_of: 0,
    none_of: NOT_PRIVATE,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    report: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    protect: false,
};

/// Properties that no private page has.
const NOT_PRIVATE: u32 = PAGE_IS_FILE | PAGE_IS_PFNZERO;

/// Protects all present pages, and reports which of them are private.
const ARM: Scan = Scan {
    all_of: 0,
    none_of: 0,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    report: NOT_PRIVATE,
    protect: true,
};

/// Pages that were written or first mapped since the others were protected; protects them. The
/// query does not request their kind, since that makes the kernel examine each present page, which
/// takes six times as long.
const TOUCHED: Scan = Scan {
    all_of: PAGE_IS_WRITTEN,
    report: PAGE_IS_WRITTEN,
    ..ARM
};

/// Touched pages at most this many pages apart are examined with one call.
const NEARBY: u64 = 64;

impl GuestMemory {
    /// The pages that differ from the layers below, or from zero if there are none (as far as can
    /// be known without reading them); a snapshot of this guest must contain them. While the guest
    /// runs, the result may be outdated when it is returned.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] on an old kernel.
    pub fn private_pages(&self, pagemap: &Pagemap) -> Result<PageSet, DirtyError> {
        match &self.backing {
            Backing::Anonymous | Backing::Layers(_) => {
                let mut private = PageSet::new();
                let all = 0..self.pages();
                pagemap.scan(self.layout(), self.regions(), all, PRIVATE, |run, _| {
                    private.append(run);
                })?;
                Ok(private)
            }
            Backing::Shared(file) => {
                allocated(file).map_err(|error| failed("find data in shared guest RAM", error))
            }
        }
    }
}

/// Mapped pages of layers.
const MAPPED: Scan = Scan {
    all_of: PAGE_IS_FILE | PAGE_IS_PRESENT,
    none_of: 0,
    any_of: 0,
    report: PAGE_IS_PRESENT,
    protect: false,
};

impl GuestMemory {
    /// The pages of layers that were read and not written. A record for prefetching a clone's first
    /// pages contains these besides [`GuestMemory::private_pages`].
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] on an old kernel.
    pub fn mapped_pages(&self, pagemap: &Pagemap) -> Result<PageSet, DirtyError> {
        let mut mapped = PageSet::new();
        let all = 0..self.pages();
        pagemap.scan(self.layout(), self.regions(), all, MAPPED, |run, _| {
            mapped.append(run);
        })?;
        Ok(mapped)
    }
}

/// The pages of a memory file that have been written.
fn allocated(file: &File) -> io::Result<PageSet> {
    let mut pages = PageSet::new();
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(pages),
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?;
        pages.append(start / PAGE_SIZE..at.div_ceil(PAGE_SIZE));
    }
}

/// Finds the pages that changed since a point in time.
///
/// While the tracker exists, the first write to each private page after each point costs a short
/// fault in the kernel; no access waits for another thread. Dropping the tracker ends this.
#[derive(Debug)]
pub struct ChangeTracker {
    pagemap: Pagemap,
    layout: RamLayout,
    regions: Vec<Region>,
    /// Dropping this lifts the protection.
    protection: WriteProtection,
    /// Keeps the memory mapped, since other memory at its addresses must not be protected.
    _ram: GuestRam,
}

impl ChangeTracker {
    /// Registers this memory's pages for protection. Nothing is protected before
    /// [`ChangeTracker::arm`]. A process can have one tracker of the same memory at a time.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] on an old kernel, [`DirtyError::Shared`] for shared memory.
    pub fn new(memory: &GuestMemory, pagemap: Pagemap) -> Result<Self, DirtyError> {
        if matches!(memory.backing, Backing::Shared(_)) {
            return Err(DirtyError::Shared);
        }
        let protection = WriteProtection::new()
            .map_err(|error| failed("write-protect memory asynchronously", error))?;
        for region in memory.regions() {
            let addresses = region.host_address..region.host_address + region.size;
            protection
                .register(addresses)
                .map_err(|error| failed("register memory with userfaultfd", error))?;
        }
        Ok(Self {
            pagemap,
            layout: *memory.layout(),
            regions: memory.regions().to_vec(),
            protection,
            _ram: memory.ram().clone(),
        })
    }

    /// Starts tracking and returns all private pages. Every page written from then on is returned
    /// by [`ChangeTracker::take_changed`]. No write falls between the two, since each page is
    /// listed and protected in one step.
    ///
    /// # Errors
    /// [`DirtyError::Failed`].
    pub fn arm(&self) -> Result<PageSet, DirtyError> {
        let mut private = PageSet::new();
        self.scan(0..self.pages(), ARM, |run, is| {
            if is & NOT_PRIVATE == 0 {
                private.append(run);
            }
        })?;
        Ok(private)
    }

    /// The pages written since the last call, or since [`ChangeTracker::arm`]; tracking continues.
    ///
    /// # Errors
    /// [`DirtyError::Failed`]. Changed pages may have been lost then, so the caller must copy all
    /// private pages.
    pub fn take_changed(&self) -> Result<PageSet, DirtyError> {
        let mut touched = PageSet::new();
        self.scan(0..self.pages(), TOUCHED, |run, _| touched.append(run))?;
        // Pages that were only read are not private. A page that is written between the two scans
        // is returned now and once more by the next call.
        let mut private = PageSet::new();
        for run in touched.bridged(NEARBY).runs() {
            self.scan(run.clone(), PRIVATE, |run, _| private.append(run))?;
        }
        Ok(touched.intersection(&private))
    }

    /// Lifts the protection of these pages, which the host is about to put back: a protected page that
    /// is dropped would leave a mark in the page tables that looks like a page in swap. They are
    /// reported as changed until [`ChangeTracker::take_as_unchanged`].
    ///
    /// # Errors
    /// [`DirtyError::Failed`].
    pub fn unprotect(&self, pages: &PageSet) -> Result<(), DirtyError> {
        for run in pages.bridged(NEARBY).runs() {
            for (_, address, len) in host_addresses(&self.layout, &self.regions, run.clone()) {
                self.protection
                    .lift(address..address + len as u64)
                    .map_err(|error| failed("lift the write protection of memory", error))?;
            }
        }
        Ok(())
    }

    /// Takes the present content of these pages, which the host has just put back, as unchanged.
    /// Nobody may write to RAM meanwhile.
    ///
    /// # Errors
    /// [`DirtyError::Failed`].
    pub fn take_as_unchanged(&self, pages: &PageSet) -> Result<(), DirtyError> {
        let runs = pages.bridged(NEARBY);
        let mut runs = runs.runs().iter();
        runs.try_for_each(|run| self.scan(run.clone(), TOUCHED, |_, _| {}))
    }

    fn pages(&self) -> u64 {
        self.layout.size() / PAGE_SIZE
    }

    fn scan(
        &self,
        pages: Range<u64>,
        scan: Scan,
        found: impl FnMut(Range<u64>, u32),
    ) -> Result<(), DirtyError> {
        self.pagemap
            .scan(&self.layout, &self.regions, pages, scan, found)
    }
}

#[cfg(test)]
mod tests;
