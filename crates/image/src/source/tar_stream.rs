//! Reads tar streams of image layers: old, ustar, GNU and pax headers.
//!
//! The `tar` crate knows where the header's fields lie; the framing is ours, because its own reader takes an extension
//! header of any size into memory and splits pax records at newlines, which binary attributes (`security.capability`)
//! contain. Here extension headers are bounded, and pax records are read by their lengths. Numbers are read in
//! [`super::tar_number`], as GNU tar, Go and libarchive read them. (POSIX.1-2024 pax)

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{EntryType, Header};

use super::tar_number::{self, pax_number, pax_time};

/// Extension headers (long names, pax records) may have this many bytes in all for one entry.
const MAX_EXTENSION: u64 = 1 << 20;
const BLOCK: usize = 512;
/// Pax records whose key begins like this are extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// One member of an archive, its data not included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarEntry {
    pub(crate) kind: EntryType,
    pub(crate) path: Vec<u8>,
    /// The target of a link.
    pub(crate) link: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) device: (u32, u32),
    /// Extended attributes, by full name.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A cursor over an archive's members.
pub(crate) struct TarStream<R> {
    inner: R,
    /// Data of the current member that is not read yet, then its padding.
    left: u64,
    padding: u64,
}

fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// What the extension headers before an entry say.
#[derive(Default)]
struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl<R: Read> TarStream<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            left: 0,
            padding: 0,
        }
    }

    /// The next member; whatever of the current one's data is unread is skipped. `None` at the end.
    pub(crate) fn next_entry(&mut self) -> io::Result<Option<TarEntry>> {
        let mut extensions = Extensions::default();
        let mut budget = MAX_EXTENSION;
        loop {
            self.skip_data()?;
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            let size = tar_number::unsigned(&header.as_old().size)?;
            match header.entry_type() {
                EntryType::GNULongName => {
                    extensions.long_path = Some(c_string(self.extension(size, &mut budget)?));
                }
                EntryType::GNULongLink => {
                    extensions.long_link = Some(c_string(self.extension(size, &mut budget)?));
                }
                EntryType::XHeader => {
                    let records = self.extension(size, &mut budget)?;
                    extensions.pax.extend(pax_records(&records)?);
                }
                // A comment or the commit id of `git archive`: nothing for single entries that images rely on.
                EntryType::XGlobalHeader => drop(self.extension(size, &mut budget)?),
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
    }

    /// Reads the current member's data.
    pub(crate) fn data(&mut self) -> Data<'_, R> {
        Data { stream: self }
    }

    /// The reader below; after a call of [`Self::next_entry`] it stands at the member's data.
    pub(crate) fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The reader below, at whatever place it is.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    fn skip_data(&mut self) -> io::Result<()> {
        let skip = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        if io::copy(&mut (&mut self.inner).take(skip), &mut io::sink())? < skip {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// The next header block that is not zeros; `None` at the end mark or the end of the stream.
    fn next_header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        if !is_sum_right(&header)? {
            return Err(bad("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn begin_data(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    fn extension(&mut self, size: u64, budget: &mut u64) -> io::Result<Vec<u8>> {
        *budget = budget
            .checked_sub(size)
            .ok_or_else(|| bad("an extension header has more than 1 MiB"))?;
        self.begin_data(size);
        let mut bytes = Vec::new();
        self.data().read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> io::Result<TarEntry> {
        let Extensions {
            long_path,
            long_link,
            mut pax,
        } = extensions;
        let kind = header.entry_type();
        let is_sparse = pax.keys().any(|key| key.starts_with(b"GNU.sparse."));
        if kind == EntryType::GNUSparse || is_sparse {
            return Err(bad(
                "it has a file in tar's sparse format, which image layers do not use: pack it without --sparse",
            ));
        }
        // A record without a value takes back what an earlier one set, and says nothing itself.
        pax.retain(|key, value| !value.is_empty() || key.starts_with(XATTR));
        let fields = header.as_old();
        let size = match pax.get(&b"size"[..]) {
            Some(text) => pax_number(text)?,
            None => tar_number::unsigned(&fields.size)?,
        };
        self.begin_data(if has_data(kind) { size } else { 0 });
        let id = |key: &[u8], field: &[u8]| -> io::Result<u32> {
            let id = match pax.get(key) {
                Some(text) => pax_number(text),
                None => tar_number::unsigned(field),
            };
            u32::try_from(id?).map_err(|_| bad("an owner's id does not fit in 32 bits"))
        };
        let (uid, gid) = (id(b"uid", &fields.uid)?, id(b"gid", &fields.gid)?);
        let (mtime, mtime_ns) = match pax.get(&b"mtime"[..]) {
            Some(text) => pax_time(text)?,
            None => (tar_number::signed(&fields.mtime)?, 0),
        };
        let device = match kind {
            EntryType::Char | EntryType::Block => device_numbers(header)?,
            _ => (0, 0),
        };
        // Beyond 32 bits there is nothing that a mode could mean.
        let mode = tar_number::unsigned(&fields.mode)? as u32;
        let path = pax
            .remove(&b"path"[..])
            .or(long_path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax
            .remove(&b"linkpath"[..])
            .or(long_link)
            .or_else(|| header.link_name_bytes().map(|name| name.into_owned()))
            .unwrap_or_default();
        let xattrs = pax
            .into_iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?.to_vec(), value)))
            .collect();
        Ok(TarEntry {
            kind,
            path,
            link,
            size,
            mode,
            uid,
            gid,
            mtime,
            mtime_ns,
            device,
            xattrs,
        })
    }
}

/// True for members that are followed by data.
fn has_data(kind: EntryType) -> bool {
    !matches!(
        kind,
        EntryType::Link
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Directory
            | EntryType::Fifo
    )
}

/// Data of the current member.
pub(crate) struct Data<'a, R> {
    stream: &'a mut TarStream<R>,
}

impl<R: Read> Read for Data<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.stream.left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        if want == 0 {
            return Ok(0);
        }
        let n = self.stream.inner.read(&mut buf[..want])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.stream.left -= n as u64;
        Ok(n)
    }
}

/// Whether the header has the checksum that it says: of its bytes, with spaces in place of the sum. Some old writers
/// added bytes up as signed numbers.
fn is_sum_right(header: &Header) -> io::Result<bool> {
    let promised = tar_number::unsigned(&header.as_old().cksum)?;
    let bytes = header.as_bytes().iter().enumerate();
    let bytes = bytes.map(|(at, &byte)| if (148..156).contains(&at) { b' ' } else { byte });
    let unsigned: u64 = bytes.clone().map(u64::from).sum();
    let signed: i64 = bytes.map(|byte| i64::from(byte.cast_signed())).sum();
    Ok(promised == unsigned || i64::try_from(promised) == Ok(signed))
}

/// The numbers of a device node; headers older than POSIX's have none.
fn device_numbers(header: &Header) -> io::Result<(u32, u32)> {
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (_, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        _ => return Ok((0, 0)),
    };
    let number = |field: &[u8]| {
        u32::try_from(tar_number::unsigned(field)?)
            .map_err(|_| bad("a device's number does not fit in 32 bits"))
    };
    Ok((number(major)?, number(minor)?))
}

/// The bytes before the first NUL.
fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&b| b == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// Splits `LENGTH KEY=VALUE\n` records by their lengths.
fn pax_records(mut bytes: &[u8]) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let malformed = || bad("a pax header is malformed");
    let mut records = BTreeMap::new();
    while !bytes.is_empty() {
        let space = bytes
            .iter()
            .take(20)
            .position(|&b| b == b' ')
            .ok_or_else(malformed)?;
        let length = usize::try_from(pax_number(&bytes[..space])?).map_err(|_| malformed())?;
        let (record, rest) = bytes.split_at_checked(length).ok_or_else(malformed)?;
        let body = record
            .get(space + 1..)
            .and_then(|body| body.strip_suffix(b"\n"))
            .ok_or_else(malformed)?;
        let equals = body.iter().position(|&b| b == b'=').ok_or_else(malformed)?;
        records.insert(body[..equals].to_vec(), body[equals + 1..].to_vec());
        bytes = rest;
    }
    Ok(records)
}
