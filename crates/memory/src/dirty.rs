//! Which pages a guest has changed: the host's page tables are the log.
//!
//! - [`GuestMemory::private_pages`]: what is no longer shared with the layers below. It costs
//!   nothing while the guest runs.
//! - [`ChangeTracker`]: what changed since a point in time, by asynchronous write-protection of
//!   the private pages. The others need none: a page that becomes private was written.
//!
//! Both see writes by the guest, by this process and by the kernel on its behalf (vhost, `read`).
//! They do not see writes by direct memory access to pages that were pinned before the tracker
//! was armed (`O_DIRECT`, VFIO): such requests must be waited for before arming.
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

use crate::layout::{PAGE_SIZE, RamLayout};
use crate::mapping::{Backing, GuestMemory, GuestRam, Region};
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
    /// Opens them.
    ///
    /// # Errors
    /// [`DirtyError::Open`].
    pub fn open() -> Result<Self, DirtyError> {
        File::open("/proc/self/pagemap")
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

    /// Calls `found` with each run of pages that matches, ascending.
    pub(crate) fn scan(
        &self,
        layout: &RamLayout,
        regions: &[Region],
        scan: Scan,
        mut found: impl FnMut(Range<u64>, u32),
    ) -> Result<(), DirtyError> {
        for (range, region) in layout.ranges().zip(regions) {
            let first = range.offset / PAGE_SIZE;
            let addresses = region.host_address..region.host_address + region.size;
            let page = |address: u64| first + (address - region.host_address) / PAGE_SIZE;
            pagemap_scan(self.0.as_fd(), addresses, scan, |run, categories| {
                found(page(run.start)..page(run.end), categories);
            })
            .map_err(|error| failed("scan page tables", error))?;
        }
        Ok(())
    }

    fn pages(
        &self,
        layout: &RamLayout,
        regions: &[Region],
        scan: Scan,
    ) -> Result<PageSet, DirtyError> {
        let mut pages = PageSet::new();
        self.scan(layout, regions, scan, |run, _| pages.append(run))?;
        Ok(pages)
    }
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
    none_of: PAGE_IS_FILE | PAGE_IS_PFNZERO,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    report: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    protect: false,
};

/// Of these, the ones written since they were protected; they are protected again.
const WRITTEN: Scan = Scan {
    all_of: PAGE_IS_WRITTEN,
    protect: true,
    ..PRIVATE
};

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
                pagemap.pages(self.layout(), self.regions(), PRIVATE)
            }
            Backing::Shared(file) => {
                allocated(file).map_err(|error| failed("find data in shared guest RAM", error))
            }
        }
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
        // Pages still protected from an earlier point are private as well: so all are asked for.
        let armed = Scan {
            all_of: 0,
            ..WRITTEN
        };
        self.pagemap.pages(&self.layout, &self.regions, armed)
    }

    /// The pages written since the last call, or since [`ChangeTracker::arm`]; tracking goes on.
    ///
    /// # Errors
    /// [`DirtyError::Failed`]. Pages may have been lost to it: copy all private pages instead.
    pub fn take_changed(&self) -> Result<PageSet, DirtyError> {
        self.pagemap.pages(&self.layout, &self.regions, WRITTEN)
    }
}

#[cfg(test)]
mod tests;
