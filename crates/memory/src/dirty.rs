//! Which pages a guest has changed: the host's page tables are the log.
//!
//! - [`GuestMemory::private_pages`]: what is no longer shared with the layers below. It costs
//!   nothing while the guest runs.
//! - [`ChangeTracker`]: what changed since a point in time, by asynchronous write-protection of
//!   all pages that are mapped. The others need none: they show when they come. So no markers are
//!   left in empty places (`UFFD_FEATURE_WP_UNPOPULATED`), which would look like swapped pages.
//!
//! Both see writes by the guest, by this process and by the kernel on its behalf (vhost, `read`).
//! They do not see writes by direct memory access to pages that were pinned before the tracker
//! was armed (`O_DIRECT`, VFIO): such requests must be waited for before arming.
//!
//! While a tracker exists, pages of layers that the host reclaims may look swapped, hence private:
//! a snapshot then holds them needlessly, with the right content.
//!
//! A page given back to the host (`MADV_DONTNEED`: balloon, free page reporting) is as the layers
//! below have it, and not private any more. The guest has said that it does not care for it.
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

/// Why changes could not be found.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// No page tables to read.
    #[error("cannot open /proc/self/pagemap: {0}")]
    Open(io::Error),
    /// The kernel does not know how.
    #[error(
        "the kernel cannot {what}: Linux 6.7 or newer is needed, and this is {}",
        kernel()
    )]
    Unsupported {
        /// What it was asked for.
        what: &'static str,
    },
    /// The kernel failed.
    #[error("cannot {what}: {source}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// Memory that others may write.
    #[error("cannot track changes of shared guest RAM: other processes' writes would be missed")]
    Shared,
}

fn kernel() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// This process's page tables. To be opened before a jail takes `/proc` away, by the process whose
/// memory it is (after any `fork`).
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens them, in a way that does not show physical frame numbers, even to root.
    ///
    /// At each read the kernel asks whether the one who opened the file had `CAP_SYS_ADMIN`, not
    /// whether the reader has it: a descriptor opened by root would show where pages lie in the
    /// host's memory for as long as it exists. The scans here need no frame numbers.
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

    /// Another handle of the same.
    ///
    /// # Errors
    /// [`DirtyError::Open`] if there are no more file descriptors.
    pub fn try_clone(&self) -> Result<Self, DirtyError> {
        self.0.try_clone().map(Self).map_err(DirtyError::Open)
    }

    /// Calls `found` with each run of these pages that matches, ascending.
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

/// Does `work` while the calling thread's effective set lacks `capability`.
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

/// Pages of a private mapping that are this process's own: not a layer's, and not the zero page
/// that reading untouched memory gives. Swapped ones are the same but for their place.
const PRIVATE: Scan = Scan {
    all_of: 0,
    none_of: NOT_PRIVATE,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    report: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    protect: false,
};

/// What no private page is.
const NOT_PRIVATE: u32 = PAGE_IS_FILE | PAGE_IS_PFNZERO;

/// Protects all pages there are, and tells which of them are private.
const ARM: Scan = Scan {
    all_of: 0,
    none_of: 0,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    report: NOT_PRIVATE,
    protect: true,
};

/// Pages that were written or first mapped since the others were protected; protects them. It does
/// not ask what they are: to find out takes a look at each page there is, six times as long.
const TOUCHED: Scan = Scan {
    all_of: PAGE_IS_WRITTEN,
    report: PAGE_IS_WRITTEN,
    ..ARM
};

/// Touched pages no further apart than this are looked at with one call.
const NEARBY: u64 = 64;

impl GuestMemory {
    /// The pages that differ from the layers below, or from zero where there are none (as far as
    /// can be told without reading them): what a snapshot of this guest has to hold. While the
    /// guest runs the answer is old when it comes.
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

/// Pages of layers that are mapped.
const MAPPED: Scan = Scan {
    all_of: PAGE_IS_FILE | PAGE_IS_PRESENT,
    none_of: 0,
    any_of: 0,
    report: PAGE_IS_PRESENT,
    protect: false,
};

impl GuestMemory {
    /// The pages of layers that were touched and not written: what a record of a guest's first
    /// moments brings in ahead, beside [`GuestMemory::private_pages`].
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

/// The pages of a memory file that were ever written.
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
/// While it exists, the first write to each private page after each point costs a short fault in
/// the kernel; nothing waits for another thread. Dropping it ends that.
#[derive(Debug)]
pub struct ChangeTracker {
    pagemap: Pagemap,
    layout: RamLayout,
    regions: Vec<Region>,
    /// Protection goes with this.
    _protection: WriteProtection,
    /// Keeps the memory mapped: other memory at its addresses must not be protected.
    _ram: GuestRam,
}

impl ChangeTracker {
    /// Makes this memory's pages protectable. Nothing is protected before [`ChangeTracker::arm`].
    /// A process can have one tracker of the same memory at a time.
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
            _protection: protection,
            _ram: memory.ram().clone(),
        })
    }

    /// Starts to track: gives all private pages, and from then on every page written is in what
    /// [`ChangeTracker::take_changed`] gives. No write falls between the two: each page is listed
    /// and protected in one step.
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

    /// The pages written since the last call, or since [`ChangeTracker::arm`]; tracking goes on.
    ///
    /// # Errors
    /// [`DirtyError::Failed`]. Pages may have been lost to it: copy all private pages instead.
    pub fn take_changed(&self) -> Result<PageSet, DirtyError> {
        let mut touched = PageSet::new();
        self.scan(0..self.pages(), TOUCHED, |run, _| touched.append(run))?;
        // Those that were only read are not private. One that is written between the two scans is
        // taken now and will be again.
        let mut private = PageSet::new();
        for run in touched.bridged(NEARBY).runs() {
            self.scan(run.clone(), PRIVATE, |run, _| private.append(run))?;
        }
        Ok(touched.intersection(&private))
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
