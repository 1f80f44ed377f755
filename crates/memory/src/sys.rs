//! The system calls that no crate wraps: `PAGEMAP_SCAN`, userfaultfd's write protection, and
//! writing guest memory to a file without making a Rust slice of it.
//!
//! `PAGEMAP_SCAN`: Linux's `Documentation/admin-guide/mm/pagemap.rst`. Asynchronous
//! write-protection: `Documentation/admin-guide/mm/userfaultfd.rst`.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl;
use rustix::mm::{UserfaultfdFlags, userfaultfd};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u64 as libc::Ioctl;
/// The most ranges that one call reports; for more, the call is repeated from where it stopped. The
/// kernel gathers 512 ranges at a time, and if it does that more than once in a call, the position
/// where it stopped is stale.
const RANGES_PER_CALL: usize = 512;

/// A query of the page tables (`PAGE_IS_*` masks).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scan {
    /// Pages must have all of these.
    pub(crate) all_of: u32,
    /// Pages must have none of these.
    pub(crate) none_of: u32,
    /// Pages must have at least one of these; zero means no condition.
    pub(crate) any_of: u32,
    /// The properties to report; neighbours that differ in them are reported separately.
    pub(crate) report: u32,
    /// Whether the matching pages are write-protected in the same step.
    pub(crate) protect: bool,
}

/// Calls `found` with each run of matching addresses in `addresses`, ascending, and with the
/// requested properties of the run.
pub(crate) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    addresses: Range<u64>,
    scan: Scan,
    mut found: impl FnMut(Range<u64>, u32),
) -> io::Result<()> {
    let empty = raw::page_region {
        start: 0,
        end: 0,
        categories: 0,
    };
    let mut ranges = vec![empty; RANGES_PER_CALL];
    let mut start = addresses.start;
    let flags = raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC;
    while start < addresses.end {
        let mut arg = raw::pm_scan_arg {
            size: size_of::<raw::pm_scan_arg>() as u64,
            flags: if scan.protect { flags.into() } else { 0 },
            start,
            end: addresses.end,
            walk_end: 0,
            vec: ranges.as_mut_ptr() as u64,
            vec_len: ranges.len() as u64,
            max_pages: 0,
            category_inverted: scan.none_of.into(),
            category_mask: (scan.all_of | scan.none_of).into(),
            category_anyof_mask: scan.any_of.into(),
            return_mask: scan.report.into(),
        };
        // SAFETY: the argument is the structure this request expects, with its own size in it, and
        // its vector is `vec_len` entries that live across the call. The call changes no memory's
        // content: write-protection of userfaultfd's kind is lifted by the kernel at a write.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        for range in &ranges[..count as usize] {
            found(range.start..range.end, range.categories as u32);
        }
        // The reported ranges are finished, even if the kernel says that it stopped earlier.
        let reported = ranges[..count as usize].last().map_or(0, |last| last.end);
        let stopped = arg.walk_end.max(reported);
        if stopped <= start {
            return Err(io::Error::other("PAGEMAP_SCAN did not advance"));
        }
        start = stopped;
    }
    Ok(())
}

/// A userfaultfd that is used only for asynchronous write protection: the kernel lifts the
/// protection itself at a write, so no thread serves faults and no access waits for one.
#[derive(Debug)]
pub(crate) struct WriteProtection {
    fd: OwnedFd,
}

impl WriteProtection {
    /// Opens a userfaultfd with this feature; `Unsupported` if the kernel lacks it.
    pub(crate) fn new() -> io::Result<Self> {
        // The user-mode-only flag needs no privilege. It limits the faults that a handler receives,
        // and asynchronous protection has no handler: writes by the kernel are recorded as well.
        let flags = UserfaultfdFlags::CLOEXEC
            | UserfaultfdFlags::NONBLOCK
            | UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY);
        // SAFETY: a new userfaultfd has nothing registered and so affects no memory.
        let fd = unsafe { userfaultfd(flags) }?;
        let mut api = raw::uffdio_api {
            api: raw::UFFD_API.into(),
            features: raw::UFFD_FEATURE_WP_ASYNC.into(),
            ioctls: 0,
        };
        // SAFETY: the argument is the structure that this request reads and writes.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), op(ioctl::UFFDIO_API), &mut api) };
        if done < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EINVAL) => io::ErrorKind::Unsupported.into(),
                _ => error,
            });
        }
        Ok(Self { fd })
    }

    /// Registers these addresses, so that their pages can be protected.
    pub(crate) fn register(&self, addresses: Range<u64>) -> io::Result<()> {
        let mut register = raw::uffdio_register {
            range: raw::uffdio_range {
                start: addresses.start,
                len: addresses.end - addresses.start,
            },
            mode: raw::UFFDIO_REGISTER_MODE_WP.into(),
            ioctls: 0,
        };
        let fd = self.fd.as_raw_fd();
        // SAFETY: the argument is the structure that this request reads and writes. Registering
        // changes no content, and asynchronous protection never leaves a thread waiting.
        let done = unsafe { libc::ioctl(fd, op(ioctl::UFFDIO_REGISTER), &mut register) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl WriteProtection {
    /// Lifts the protection of these addresses, which are registered.
    pub(crate) fn lift(&self, addresses: Range<u64>) -> io::Result<()> {
        let mut lift = raw::uffdio_writeprotect {
            range: raw::uffdio_range {
                start: addresses.start,
                len: addresses.end - addresses.start,
            },
            // Without the flag to protect.
            mode: 0,
        };
        let fd = self.fd.as_raw_fd();
        loop {
            // SAFETY: the argument is the structure that this request reads. Lifting the protection
            // changes no content.
            let done = unsafe { libc::ioctl(fd, op(ioctl::UFFDIO_WRITEPROTECT), &mut lift) };
            if done >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // Another thread is changing the mappings of this process.
            if error.raw_os_error() != Some(libc::EAGAIN) {
                return Err(error);
            }
        }
    }
}

fn op(request: u32) -> libc::Ioctl {
    libc::Ioctl::from(request)
}

/// Guest memory for reading, copying and putting back: an address range that stays mapped and readable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostRange<'a> {
    address: *const u8,
    len: usize,
    memory: PhantomData<&'a ()>,
}

impl HostRange<'_> {
    /// # Safety
    /// `[address, address + len)` stays mapped, readable and writable for as long as `'a`, `address`
    /// is aligned to 8 bytes, and no Rust reference to the memory is alive (guest memory: all
    /// accesses are raw).
    pub(crate) unsafe fn new(address: u64, len: usize) -> Self {
        let address = std::ptr::with_exposed_provenance(address as usize);
        Self {
            address,
            len,
            memory: PhantomData,
        }
    }

    /// The number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether these bytes, a multiple of whole words, are zero at this moment. The guest may be
    /// writing them.
    pub(crate) fn is_zero(&self, bytes: Range<usize>) -> bool {
        assert!(
            bytes.end <= self.len && bytes.start.is_multiple_of(8) && bytes.end.is_multiple_of(8)
        );
        let words = bytes.step_by(8);
        words.into_iter().all(|at| {
            // SAFETY: in range (checked above) of memory that `new`'s caller keeps mapped, and
            // aligned since the start and the step are.
            let word = unsafe { self.address.add(at).cast::<u64>() };
            // SAFETY: as above; volatile since the guest writes this memory as it likes.
            unsafe { word.read_volatile() == 0 }
        })
    }

    /// Reads these bytes from a file. The kernel writes them without a slice or a buffer.
    pub(crate) fn read_from(&self, bytes: Range<usize>, file: &File, at: u64) -> io::Result<()> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len);
        let (mut start, mut at) = (bytes.start, at);
        while start < bytes.end {
            // SAFETY: in range of memory that `new`'s caller keeps mapped.
            let to = unsafe { self.address.add(start) };
            let fd = file.as_fd().as_raw_fd();
            // SAFETY: the kernel writes `bytes.end - start` bytes to guest memory, which is mapped,
            // writable, and accessed by nobody through a reference.
            let read = unsafe {
                libc::pread(
                    fd,
                    to.cast_mut().cast(),
                    bytes.end - start,
                    at as libc::off_t,
                )
            };
            match read {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                1.. => (start, at) = (start + read as usize, at + read as u64),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Sets these bytes to zero.
    pub(crate) fn zero(&self, bytes: Range<usize>) {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len);
        // SAFETY: in range of memory that `new`'s caller keeps mapped.
        let start = unsafe { self.address.add(bytes.start) }.cast_mut();
        // SAFETY: as above; the memory is writable, and nobody accesses it through a reference.
        unsafe { start.write_bytes(0, bytes.end - bytes.start) };
    }

    /// Writes these bytes to a file. The kernel copies them without a slice or a buffer.
    pub(crate) fn write_to(&self, bytes: Range<usize>, file: &File, at: u64) -> io::Result<()> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len);
        let (mut start, mut at) = (bytes.start, at);
        while start < bytes.end {
            // SAFETY: in range of memory that `new`'s caller keeps mapped.
            let from = unsafe { self.address.add(start) };
            let fd = file.as_fd().as_raw_fd();
            // SAFETY: the kernel reads `bytes.end - start` bytes from memory that is mapped and
            // readable; that the guest may write it meanwhile harms nothing but the content.
            let wrote =
                unsafe { libc::pwrite(fd, from.cast(), bytes.end - start, at as libc::off_t) };
            match wrote {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                1.. => (start, at) = (start + wrote as usize, at + wrote as u64),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}
