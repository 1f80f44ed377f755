//! Reads signals from a descriptor, so that they can be passed on to a guest's command.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// A descriptor from which arriving signals are read. They no longer have their default effect.
pub(super) struct Signals(File);

impl Signals {
    /// Blocks `signals` in the whole process, and makes the descriptor. This must be called before
    /// any other thread starts, since threads inherit the blocked signals.
    pub(super) fn take(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the pointer is to a writable set, which the call makes an empty one.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: the call above has initialised it.
        let mut set = unsafe { set.assume_init() };
        for &signal in signals {
            // SAFETY: `set` is an initialised set; a signal that does not exist is refused.
            if unsafe { libc::sigaddset(&mut set, signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: `set` is an initialised set, and no old set is asked for.
        let blocked = unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if blocked != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `set` is an initialised set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self(File::from(fd)))
    }

    /// Waits for the next signal.
    pub(super) fn next(&mut self) -> io::Result<i32> {
        // signalfd(2): 128 bytes for each signal, whose number is the first 32 bits.
        let mut info = [0; 128];
        self.0.read_exact(&mut info)?;
        Ok(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
