//! Reads tar streams of image layers: old, ustar, GNU and pax headers.
//!
//! The `tar` crate decodes the header's fields; the framing is ours, because its own reader takes an extension header
//! of any size into memory and splits pax records at newlines, which binary attributes (`security.capability`)
//! contain. Here extension headers are bounded, and pax records are read by their lengths. (POSIX.1-2024 pax)

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{EntryType, Header};

/// Extension headers (long names, pax records) may have this many bytes in all for one entry.
const MAX_EXTENSION: u64 = 1 << 20;
const BLOCK: usize = 512;

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
            let size = header.entry_size()?;
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
        let sum: u32 = block.iter().enumerate().fold(0, |sum, (at, &byte)| {
            sum + if (148..156).contains(&at) {
                32
            } else {
                u32::from(byte)
            }
        });
        if header.cksum()? != sum {
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
        let size = match pax.get(&b"size"[..]) {
            Some(text) => number(text)?,
            None => header.entry_size()?,
        };
        self.begin_data(if has_data(kind) { size } else { 0 });
        let id = |key: &[u8], field: io::Result<u64>| -> io::Result<u32> {
            let id = pax.get(key).map_or(field, |text| number(text))?;
            u32::try_from(id).map_err(|_| bad("an owner's id does not fit in 32 bits"))
        };
        let (uid, gid) = (id(b"uid", header.uid())?, id(b"gid", header.gid())?);
        let (mtime, mtime_ns) = match pax.get(&b"mtime"[..]) {
            Some(text) => time(text)?,
            None => (i64::try_from(header.mtime()?).unwrap_or(i64::MAX), 0),
        };
        let device = |field: io::Result<Option<u32>>| field.map(Option::unwrap_or_default);
        let device = match kind {
            EntryType::Char | EntryType::Block => (
                device(header.device_major())?,
                device(header.device_minor())?,
            ),
            _ => (0, 0),
        };
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
            .filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value)))
            .collect();
        Ok(TarEntry {
            kind,
            path,
            link,
            size,
            mode: header.mode()?,
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

fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    while bytes.last() == Some(&0) {
        bytes.pop();
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
        let length = usize::try_from(number(&bytes[..space])?).map_err(|_| malformed())?;
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

fn number(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| bad("a number in a pax header is malformed"))
}

/// Seconds with a fraction: `1700000000.25`, `-1.5`.
fn time(text: &[u8]) -> io::Result<(i64, u32)> {
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
