//! Writing little-endian fields at the offsets that the format's tables give.

/// Puts a field into a structure's bytes; the offsets are constants of the format and inside the structure.
pub(super) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

/// The low 16 bits.
pub(super) fn low16(value: u64) -> [u8; 2] {
    ((value & 0xffff) as u16).to_le_bytes()
}

/// Bits 16 to 31.
pub(super) fn mid16(value: u64) -> [u8; 2] {
    low16(value >> 16)
}

/// The low 32 bits.
pub(super) fn low32(value: u64) -> [u8; 4] {
    ((value & 0xffff_ffff) as u32).to_le_bytes()
}

/// Bits 32 to 63.
pub(super) fn high32(value: u64) -> [u8; 4] {
    low32(value >> 32)
}
