//! The first request of a session: both sides say what they can.

use clone_fuse::wire::{Input, Output};
use rustix::io::Errno;

use super::Result;

/// The protocol's version that this server speaks.
const VERSION: (u32, u32) = (7, 38);
/// The oldest minor version that has all that is used (sizes of requests by pages).
const OLDEST_MINOR: u32 = 28;
/// The most bytes of one write, and of one read.
const MAX_WRITE: u32 = 1 << 20;
const PAGE: u32 = 4096;

/// `FUSE_ASYNC_READ`, `FUSE_ATOMIC_O_TRUNC`, `FUSE_BIG_WRITES`, `FUSE_AUTO_INVAL_DATA`,
/// `FUSE_DO_READDIRPLUS`, `FUSE_READDIRPLUS_AUTO`, `FUSE_ASYNC_DIO`, `FUSE_PARALLEL_DIROPS`,
/// `FUSE_ABORT_ERROR`, `FUSE_MAX_PAGES`, `FUSE_CACHE_SYMLINKS`.
const OFFERED: u32 = 1
    | 1 << 3
    | 1 << 5
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 18
    | 1 << 21
    | 1 << 22
    | 1 << 23;

/// Answers `FUSE_INIT`.
///
/// Writes are not gathered in the guest (`FUSE_WRITEBACK_CACHE`), since the guest would not see what
/// others write meanwhile. Locks are left to the guest's kernel.
pub(super) fn answer(mut input: Input<'_>) -> Result<Vec<u8>> {
    let (major, minor) = (input.u32()?, input.u32()?);
    let (read_ahead, flags) = (input.u32()?, input.u32()?);
    let mut out = Output::new();
    if major > VERSION.0 {
        // The guest asks again with this major version.
        out.u32(VERSION.0).u32(VERSION.1).zeros(56);
        return Ok(out.into_bytes());
    }
    if major < VERSION.0 || minor < OLDEST_MINOR {
        return Err(Errno::PROTO);
    }
    out.u32(VERSION.0)
        .u32(minor.min(VERSION.1))
        .u32(read_ahead)
        .u32(flags & OFFERED);
    // Requests in the background, and from how many on the guest counts as congested.
    out.u16(64).u16(48);
    // The time's granularity is a nanosecond.
    out.u32(MAX_WRITE).u32(1);
    out.u16((MAX_WRITE / PAGE) as u16).u16(0);
    out.zeros(32);
    Ok(out.into_bytes())
}
