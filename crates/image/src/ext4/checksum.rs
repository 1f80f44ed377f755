//! CRC32C as ext4 uses it: the raw register, without the inversions of the usual form.

/// Continues a checksum. A file system's own seed is `crc(!0, uuid)`.
pub(super) fn crc(register: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!register, data)
}

/// The seed of everything that belongs to one inode: its number, then its generation, which is always 0 here.
pub(super) fn inode_seed(seed: u32, inode: u32) -> u32 {
    crc(crc(seed, &inode.to_le_bytes()), &[0; 4])
}
