//! Numbers in tar headers, as GNU tar, Go's `archive/tar` and libarchive read them.
//!
//! A field holds octal digits, padded with spaces or NULs on either side; a blank one is 0. Where the first bit is set,
//! the rest is a big-endian number in two's complement (GNU's base-256). Pax records hold decimal text.

use std::io;

fn bad(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// A field that cannot be negative: a size, an id, a mode.
pub(super) fn unsigned(field: &[u8]) -> io::Result<u64> {
    u64::try_from(signed(field)?).map_err(|_| bad("a number in a header is negative"))
}

/// A field that may be negative: a time before 1970.
pub(super) fn signed(field: &[u8]) -> io::Result<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> io::Result<i64> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t' | 0);
    let from = field
        .iter()
        .position(|b| !is_blank(b))
        .unwrap_or(field.len());
    let mut digits = field[from..].iter().take_while(|b| !is_blank(b));
    // Fields have at most 12 digits of three bits.
    digits.try_fold(0i64, |sum, &digit| match digit {
        b'0'..=b'7' => Ok(sum << 3 | i64::from(digit - b'0')),
        _ => Err(bad("a number in a header is malformed")),
    })
}

/// The bit after the first is the sign; eight bytes are all that a number here can need.
fn base_256(field: &[u8]) -> io::Result<i64> {
    let too_large = || bad("a number in a header is too large");
    let negative = field.first().is_some_and(|first| first & 0x40 != 0);
    let fill = if negative { 0xff } else { 0 };
    let mut bytes = field.to_vec();
    if let Some(first) = bytes.first_mut() {
        // The marker bit, made the sign's.
        *first = (*first & 0x7f) | (fill & 0x80);
    }
    let skip = bytes.len().saturating_sub(8);
    let (high, low) = bytes.split_at(skip);
    if high.iter().any(|&byte| byte != fill) {
        return Err(too_large());
    }
    let mut wide = [fill; 8];
    wide[8 - low.len()..].copy_from_slice(low);
    let value = i64::from_be_bytes(wide);
    if (value < 0) == negative {
        Ok(value)
    } else {
        Err(too_large())
    }
}

/// A decimal number of a pax record.
pub(super) fn pax_number(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| bad("a number in a pax header is malformed"))
}

/// Seconds with a fraction: `1700000000.25`, `-1.5`.
pub(super) fn pax_time(text: &[u8]) -> io::Result<(i64, u32)> {
    let malformed = || bad("a time in a pax header is malformed");
    let text = std::str::from_utf8(text).map_err(|_| malformed())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| malformed())?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(malformed());
    }
    let digits: String = fraction
        .chars()
        .chain(std::iter::repeat('0'))
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().map_err(|_| malformed())?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Ok((seconds.saturating_sub(1), 1_000_000_000 - nanoseconds));
    }
    Ok((seconds, nanoseconds))
}
