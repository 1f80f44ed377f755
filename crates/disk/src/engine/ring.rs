//! Rings that are restricted to the operations of a disk.
//!
//! A ring's operations bypass system call filters (seccomp), since the kernel executes them itself.
//! So the ring of a jailed process is restricted to a list of operations before its first one
//! (`io_uring_register(2)`, `IORING_REGISTER_RESTRICTIONS`); the kernel refuses all others, and any
//! change of the list.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};

/// The operations of disks.
const OPERATIONS: [u8; 4] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// Makes a ring that reads, writes, syncs and allocates, without any option of an entry (such as
/// linked or registered files), and whose restrictions cannot be changed.
///
/// # Errors
/// The host forbids io_uring, or its kernel has no restrictions (before Linux 5.10).
pub fn restricted_ring(entries: u32) -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .build(entries)?;
    let mut allowed = OPERATIONS.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::{squeue, types};

    fn outcome(ring: &mut IoUring, entry: squeue::Entry) -> i32 {
        // SAFETY: the entries of these tests point to nothing.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn only_what_disks_do_is_done() {
        let mut ring = restricted_ring(4).unwrap();
        let file = tempfile::tempfile().unwrap();
        let fd = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file));
        assert_eq!(outcome(&mut ring, opcode::Fsync::new(fd).build()), 0);
        let nop = opcode::Nop::new().build();
        assert_eq!(outcome(&mut ring, nop), -libc::EACCES);
        let linked = opcode::Fsync::new(fd).build().flags(squeue::Flags::IO_LINK);
        assert_eq!(outcome(&mut ring, linked), -libc::EACCES);
        // Registering files, buffers or other limits is refused as well.
        assert!(ring.submitter().register_files(&[0]).is_err());
        let mut more = [Restriction::sqe_op(opcode::Nop::CODE)];
        assert!(ring.submitter().register_restrictions(&mut more).is_err());
    }
}
