//! FUSE messages as bytes: a bounded reader of requests and a writer of replies.
//!
//! A request comes from a guest, so nothing of it is trusted: a field that is not there, a name
//! without its end or with a `/` is an [`Invalid`], never a panic.

use rustix::io::Errno;

/// The number of bytes of a request's header.
pub const IN_HEADER: usize = 40;
/// The number of bytes of a reply's header.
pub const OUT_HEADER: usize = 16;
/// The number of bytes of `struct fuse_entry_out`, with which the reply to a created file begins.
pub const ENTRY_BYTES: usize = 128;
/// The node id of the share's root directory.
pub const ROOT_ID: u64 = 1;
/// The longest name of a directory entry, in bytes (`NAME_MAX`).
pub const MAX_NAME: usize = 255;
/// The largest value of an extended attribute, in bytes (`XATTR_SIZE_MAX`).
pub const MAX_XATTR: usize = 64 << 10;
/// The longest target of a symbolic link, in bytes (`PATH_MAX` without its terminator).
pub const MAX_TARGET: usize = 4095;

/// The kinds of requests, by their numbers in the protocol.
pub mod op {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// A request that is not what its kind requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

impl From<Invalid> for Errno {
    fn from(_: Invalid) -> Self {
        Self::INVAL
    }
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InHeader {
    /// The number of bytes of the whole request.
    pub len: u32,
    /// The kind of the request ([`op`]).
    pub opcode: u32,
    /// The guest's number of the request, which the reply carries.
    pub unique: u64,
    /// The node that the request is about.
    pub node: u64,
}

impl InHeader {
    /// Decodes a header. User, group and process of the guest have no meaning on the host, and are
    /// left out.
    pub fn decode(bytes: &[u8; IN_HEADER]) -> Self {
        let mut input = Input::new(bytes);
        // The array is as long as the fields together, so none of them is missing.
        let mut word = || input.u32().unwrap_or(0);
        let (len, opcode) = (word(), word());
        let mut long = || u64::from(word()) | u64::from(word()) << 32;
        Self {
            len,
            opcode,
            unique: long(),
            node: long(),
        }
    }
}

/// Encodes the header of a reply that is followed by `body` bytes. A reply with an error has none.
pub fn out_header(unique: u64, error: Option<Errno>, body: usize) -> [u8; OUT_HEADER] {
    let mut bytes = [0; OUT_HEADER];
    let len = u32::try_from(OUT_HEADER + body).unwrap_or(u32::MAX);
    let code = error.map_or(0, |errno| -errno.raw_os_error());
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&code.to_le_bytes());
    bytes[8..].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// Reads the fields of a request in order.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// A reader of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The bytes that were not read.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Invalid> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(Invalid)?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Invalid> {
        let (front, rest) = self.0.split_first_chunk().ok_or(Invalid)?;
        self.0 = rest;
        Ok(*front)
    }

    /// The next 32-bit field.
    ///
    /// # Errors
    /// The request ends before it.
    pub fn u32(&mut self) -> Result<u32, Invalid> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next 64-bit field.
    ///
    /// # Errors
    /// The request ends before it.
    pub fn u64(&mut self) -> Result<u64, Invalid> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next text with its terminator, without it.
    ///
    /// # Errors
    /// It has no terminator.
    pub fn text(&mut self) -> Result<&'a [u8], Invalid> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Invalid)?;
        let text = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Ok(text)
    }

    /// The next text, which must be the name of an entry in a directory.
    ///
    /// # Errors
    /// [`Errno::INVAL`] for a text that can lead elsewhere (`.`, `..`, `/`) or that is empty, and
    /// [`Errno::NAMETOOLONG`].
    pub fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.text()?)
    }

    /// Checks that nothing follows.
    ///
    /// # Errors
    /// Something follows.
    pub fn end(self) -> Result<(), Invalid> {
        match self.0 {
            [] => Ok(()),
            _ => Err(Invalid),
        }
    }
}

/// The name of an entry in a directory: one step that does not lead out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// As for [`Input::name`].
    pub fn new(text: &'a [u8]) -> Result<Self, Errno> {
        match text {
            b"" | b"." | b".." => Err(Errno::INVAL),
            _ if text.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::INVAL),
            _ if text.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(Self(text)),
        }
    }

    /// The bytes of the name.
    pub fn as_bytes(self) -> &'a [u8] {
        self.0
    }
}

/// Writes the fields of a reply in order.
#[derive(Clone, Debug, Default)]
pub struct Output(Vec<u8>);

impl Output {
    /// An empty reply.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a 16-bit field.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds a 32-bit field.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds a 64-bit field.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds `count` zero bytes.
    pub fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// The number of bytes so far.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A read or a write: the fields that `fuse_read_in` and `fuse_write_in` have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The handle of the open file.
    pub handle: u64,
    /// The place in the file, in bytes.
    pub offset: u64,
    /// The number of bytes.
    pub size: u32,
    /// `FUSE_READ_*` or `FUSE_WRITE_*`.
    pub kind_flags: u32,
    /// The flags that the guest's file was opened with (`O_APPEND`).
    pub flags: u32,
}

impl Transfer {
    /// The number of bytes of the structure.
    pub const BYTES: usize = 40;
    /// `FUSE_WRITE_CACHE`: the guest writes back pages of its cache, to the place where they belong.
    pub const WRITE_CACHE: u32 = 1;

    /// Decodes the structure that follows the header of a read or a write.
    ///
    /// # Errors
    /// The request is too short.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        let mut input = Input::new(bytes);
        let (handle, offset) = (input.u64()?, input.u64()?);
        let (size, kind_flags) = (input.u32()?, input.u32()?);
        let _lock_owner = input.u64()?;
        let flags = input.u32()?;
        let _padding = input.u32()?;
        Ok(Self {
            handle,
            offset,
            size,
            kind_flags,
            flags,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_one_step_into_its_directory() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"../x", b"a\0b"] {
            assert_eq!(Name::new(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(Name::new(&[b'x'; 65_536]), Err(Errno::NAMETOOLONG));
        for good in [&b"..."[..], b".x", b"\xFF\xFE", &[b'x'; MAX_NAME]] {
            assert_eq!(Name::new(good).unwrap().as_bytes(), good);
        }
    }

    #[test]
    fn a_text_needs_its_terminator() {
        let mut input = Input::new(b"old\0new\0");
        assert_eq!(input.text(), Ok(&b"old"[..]));
        assert_eq!(input.name().unwrap().as_bytes(), b"new");
        assert_eq!(input.end(), Ok(()));
        assert_eq!(Input::new(b"old").text(), Err(Invalid));
    }

    #[test]
    fn headers_are_those_of_the_protocol() {
        let mut bytes = [0; IN_HEADER];
        bytes[..4].copy_from_slice(&48_u32.to_le_bytes());
        bytes[4..8].copy_from_slice(&op::LOOKUP.to_le_bytes());
        bytes[8..16].copy_from_slice(&0x1_0000_0002_u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&3_u64.to_le_bytes());
        let header = InHeader::decode(&bytes);
        assert_eq!((header.len, header.opcode), (48, op::LOOKUP));
        assert_eq!((header.unique, header.node), (0x1_0000_0002, 3));
        let out = out_header(7, Some(Errno::NOENT), 0);
        assert_eq!(out[..8], [16, 0, 0, 0, 0xFE, 0xFF, 0xFF, 0xFF]);
        assert_eq!(out_header(7, None, 88)[..8], [104, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut input = Input::new(&bytes);
            let _ = (input.u32(), input.u64(), input.name(), input.text(), input.bytes(9));
            prop_assert!(input.rest().len() <= bytes.len());
            let _ = Transfer::decode(&bytes);
        }
    }
}
