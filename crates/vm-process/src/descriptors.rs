//! The descriptors that a VM's process keeps when it starts.
//!
//! The launcher may have left anything open: files of a user's shell, another VM's tap that a
//! careless library made inheritable, a database. So the process begins by closing everything but
//! the standard streams. Its resources come later, with its description, over the Unix socket on
//! its standard input ([`clone_start::document`]).

use std::fs::File;
use std::io;

/// Closes every descriptor but the three standard ones.
///
/// The process must call this before anything else, while it owns no other descriptor.
pub(super) fn close_inherited() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: the process has just begun, has one thread, and has opened nothing: no owner of one
    // of these descriptors exists that could use it afterwards.
    match unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces the launcher's socket on standard input by `/dev/null`.
pub(super) fn detach_stdin() -> io::Result<()> {
    let null = File::open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdin(null)?)
}
