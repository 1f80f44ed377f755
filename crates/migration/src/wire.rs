//! The format of a migration's stream.
//!
//! The source sends the [preamble](encode_preamble), and then records: a header of 24 bytes, and a
//! body whose length the header says. All numbers are little endian.
//!
//! | record | kind | count | at | more | body |
//! | --- | --- | --- | --- | --- | --- |
//! | pages | 1 | pages, at most 64 | the first page | 0 | the pages |
//! | packed pages | 2 | pages, at most 64 | the first page | bytes of the body | an LZ4 block |
//! | zero pages | 3 | pages | the first page | 0 | |
//! | equal page | 4 | 1 | the page | the page that has the same content now | |
//! | blocks | 5 | bytes, at most 256 KiB | offset in the disk | the disk's number | the content |
//! | zero blocks | 6 | bytes | offset in the disk | the disk's number | |
//! | state | 7 | bytes, at most 64 KiB | bytes that came before | 0 | a part of the machine's state |
//! | sync | 8 | 0 | any number | 0 | |
//! | done | 9 | 0 | number of records before | 0 | |
//! | go | 10 | 0 | 0 | 0 | |
//! | abort | 11 | bytes, at most 1,024 | 0 | 0 | the reason, in UTF-8 |
//!
//! The destination sends replies: a header of 16 bytes (kind, count, at), and for a failure the
//! reason. A page is numbered by its RAM offset ([`clone_memory::layout`]).
//!
//! A body is never longer than [`MAX_BODY`], so a reader needs one buffer of that size, whatever
//! the other side says.

use clone_memory::layout::PAGE_SIZE;

/// The first bytes of a stream.
const MAGIC: [u8; 8] = *b"CLNMOVE\n";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// The size of the preamble in bytes.
pub const PREAMBLE_BYTES: usize = 24;
/// The size of a record's header in bytes.
pub const RECORD_BYTES: usize = 24;
/// The size of a reply's header in bytes.
pub const REPLY_BYTES: usize = 16;
/// The most pages in one record.
pub const MAX_PAGES: u64 = 64;
/// The largest body, in bytes.
pub const MAX_BODY: usize = (MAX_PAGES * PAGE_SIZE) as usize;
/// The most bytes of the machine's state in one record.
pub const MAX_STATE_PART: usize = 64 << 10;
/// The longest reason of an abort or a failure, in bytes.
pub const MAX_REASON: usize = 1024;

/// The problems with bytes that are no stream of this format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// The stream does not begin as a migration does.
    #[error("it is not a migration's stream")]
    NotAMigration,
    /// The stream is of another version.
    #[error("its format version is {0}, and this build reads {VERSION}")]
    Version(u32),
    /// The stream is of a machine with another size of RAM.
    #[error("it is of a machine with {found} bytes of RAM, not {expected}")]
    Ram {
        /// The size in the preamble, in bytes.
        found: u64,
        /// The size of the machine here, in bytes.
        expected: u64,
    },
    /// A record or reply of an unknown kind, or in a place where it cannot be.
    #[error("record kind {0} is unknown, or cannot be here")]
    Kind(u32),
    /// A number in a header is out of range.
    #[error("{what} {value} is out of range")]
    Range {
        /// The number's meaning.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// The body of packed pages is damaged.
    #[error("packed pages are damaged")]
    Packed,
    /// The number of records is not the one that was sent.
    #[error("{found} records came, and {sent} were sent")]
    Lost {
        /// The number of records that came.
        found: u64,
        /// The number that the source has sent.
        sent: u64,
    },
}

/// The header of a record: its kind and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The content of pages follows.
    Pages {
        /// The first page.
        first: u64,
        /// The number of pages.
        count: u64,
    },
    /// The content of pages follows as an LZ4 block.
    PackedPages {
        /// The first page.
        first: u64,
        /// The number of pages.
        count: u64,
        /// The length of the body in bytes.
        len: usize,
    },
    /// These pages are zero.
    ZeroPages {
        /// The first page.
        first: u64,
        /// The number of pages.
        count: u64,
    },
    /// The page has the content that another one has at this point of the stream.
    EqualPage {
        /// The page.
        page: u64,
        /// The other one.
        other: u64,
    },
    /// The content of a part of a disk follows.
    Blocks {
        /// The disk's number in the description.
        disk: u32,
        /// The offset in bytes.
        offset: u64,
        /// The length in bytes.
        len: usize,
    },
    /// A part of a disk is zero.
    ZeroBlocks {
        /// The disk's number in the description.
        disk: u32,
        /// The offset in bytes.
        offset: u64,
        /// The length in bytes.
        len: u64,
    },
    /// A part of the machine's state follows.
    State {
        /// The number of bytes that came before.
        at: u64,
        /// The length of the part.
        len: usize,
    },
    /// The destination is to say when it has come to this point.
    Sync {
        /// A number for the reply.
        number: u64,
    },
    /// Everything was sent.
    Done {
        /// The number of records before this one.
        records: u64,
    },
    /// The destination has the VM from now on.
    Go,
    /// The source keeps the VM; the reason follows.
    Abort {
        /// The length of the reason.
        len: usize,
    },
}

/// What the destination says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Everything up to a [`Record::Sync`] is applied.
    Synced(u64),
    /// Everything is applied and checked, and the guest could run.
    Ready,
    /// The guest runs.
    Running,
    /// The destination has discarded the VM, and never runs it.
    Failed(String),
}

/// The first bytes of a stream for a machine with `ram_bytes` of RAM.
pub fn encode_preamble(ram_bytes: u64) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..].copy_from_slice(&ram_bytes.to_le_bytes());
    bytes
}

/// Checks the first bytes of a stream for a machine with `ram_bytes` of RAM.
///
/// # Errors
/// [`WireError::NotAMigration`], [`WireError::Version`] or [`WireError::Ram`].
pub fn check_preamble(bytes: &[u8; PREAMBLE_BYTES], ram_bytes: u64) -> Result<(), WireError> {
    if bytes[..8] != MAGIC || bytes[12..16] != [0; 4] {
        return Err(WireError::NotAMigration);
    }
    match u32_at(bytes, 8) {
        VERSION => {}
        other => return Err(WireError::Version(other)),
    }
    match u64_at(bytes, 16) {
        found if found == ram_bytes => Ok(()),
        found => Err(WireError::Ram {
            found,
            expected: ram_bytes,
        }),
    }
}

impl Record {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let (kind, count, at, more) = match *self {
            Self::Pages { first, count } => (1, count, first, 0),
            Self::PackedPages { first, count, len } => (2, count, first, len as u64),
            Self::ZeroPages { first, count } => (3, count, first, 0),
            Self::EqualPage { page, other } => (4, 1, page, other),
            Self::Blocks { disk, offset, len } => (5, len as u64, offset, disk.into()),
            Self::ZeroBlocks { disk, offset, len } => (6, len, offset, disk.into()),
            Self::State { at, len } => (7, len as u64, at, 0),
            Self::Sync { number } => (8, 0, number, 0),
            Self::Done { records } => (9, 0, records, 0),
            Self::Go => (10, 0, 0, 0),
            Self::Abort { len } => (11, len as u64, 0, 0),
        };
        let kind: u32 = kind;
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&(count as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&at.to_le_bytes());
        bytes[16..].copy_from_slice(&more.to_le_bytes());
        bytes
    }

    /// Reads a header, and checks its numbers against the sizes of the machine here.
    ///
    /// # Errors
    /// [`WireError::Kind`] or [`WireError::Range`].
    pub fn decode(bytes: &[u8; RECORD_BYTES], machine: &MachineSizes) -> Result<Self, WireError> {
        let (kind, count) = (u32_at(bytes, 0), u64::from(u32_at(bytes, 4)));
        let (at, more) = (u64_at(bytes, 8), u64_at(bytes, 16));
        let body = |most: usize| within("a length of", count, 1, most as u64);
        let unused = |value: u64| within("a field that is not used:", value, 0, 0);
        Ok(match kind {
            1 | 2 => {
                within("a number of pages of", count, 1, MAX_PAGES)?;
                machine.check_pages(at, count)?;
                if kind == 2 {
                    let len = within("a length of", more, 1, count * PAGE_SIZE)? as usize;
                    return Ok(Self::PackedPages {
                        first: at,
                        count,
                        len,
                    });
                }
                unused(more)?;
                Self::Pages { first: at, count }
            }
            3 => {
                unused(more)?;
                machine.check_pages(at, count)?;
                Self::ZeroPages { first: at, count }
            }
            4 => {
                within("a number of pages of", count, 1, 1)?;
                machine.check_pages(at, 1)?;
                machine.check_pages(more, 1)?;
                Self::EqualPage {
                    page: at,
                    other: more,
                }
            }
            5 => {
                let len = body(MAX_BODY)?;
                let disk = machine.check_blocks(more, at, len)?;
                Self::Blocks {
                    disk,
                    offset: at,
                    len: len as usize,
                }
            }
            6 => {
                let disk = machine.check_blocks(more, at, count)?;
                Self::ZeroBlocks {
                    disk,
                    offset: at,
                    len: count,
                }
            }
            7 => {
                unused(more)?;
                let len = body(MAX_STATE_PART)? as usize;
                Self::State { at, len }
            }
            8 => Self::Sync { number: at },
            9 => Self::Done { records: at },
            10 => Self::Go,
            11 => Self::Abort {
                len: within("a length of", count, 0, MAX_REASON as u64)? as usize,
            },
            other => return Err(WireError::Kind(other)),
        })
    }

    /// The length of the body that follows, in bytes.
    pub fn body_len(&self) -> usize {
        match *self {
            Self::Pages { count, .. } => (count * PAGE_SIZE) as usize,
            Self::PackedPages { len, .. }
            | Self::Blocks { len, .. }
            | Self::State { len, .. }
            | Self::Abort { len } => len,
            _ => 0,
        }
    }
}

/// The sizes that the numbers of a record must lie within.
#[derive(Clone, Debug, Default)]
pub struct MachineSizes {
    /// The number of pages of RAM.
    pub pages: u64,
    /// The sizes of the disks in bytes; 0 for one that nothing may be written to.
    pub disks: Vec<u64>,
}

impl MachineSizes {
    fn check_pages(&self, first: u64, count: u64) -> Result<(), WireError> {
        within("a number of pages of", count, 1, self.pages)?;
        within("page", first, 0, self.pages - count).map(drop)
    }

    fn check_blocks(&self, disk: u64, offset: u64, len: u64) -> Result<u32, WireError> {
        let found = usize::try_from(disk).ok();
        let size = found.and_then(|disk| self.disks.get(disk)).copied();
        let size = size.filter(|size| *size > 0).ok_or(WireError::Range {
            what: "disk",
            value: disk,
        })?;
        within("a length of", len, 1, size)?;
        within("a disk's offset of", offset, 0, size - len)?;
        Ok(disk as u32)
    }
}

fn within(what: &'static str, value: u64, least: u64, most: u64) -> Result<u64, WireError> {
    match (least..=most).contains(&value) {
        true => Ok(value),
        false => Err(WireError::Range { what, value }),
    }
}

impl Reply {
    /// The reply's bytes. A reason that is too long is cut.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, at, reason): (u32, u64, &[u8]) = match self {
            Self::Synced(number) => (1, *number, &[]),
            Self::Ready => (2, 0, &[]),
            Self::Running => (3, 0, &[]),
            Self::Failed(reason) => (4, 0, cut(reason)),
        };
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((reason.len() as u32).to_le_bytes());
        bytes.extend(at.to_le_bytes());
        bytes.extend(reason);
        bytes
    }

    /// Reads a header; for a failure, also the length of the reason that follows.
    ///
    /// # Errors
    /// [`WireError::Kind`] or [`WireError::Range`].
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<(Self, usize), WireError> {
        let len = u64::from(u32_at(bytes, 4));
        let reply = match u32_at(bytes, 0) {
            1 => Self::Synced(u64_at(bytes, 8)),
            2 => Self::Ready,
            3 => Self::Running,
            4 => {
                let len = within("a length of", len, 0, MAX_REASON as u64)?;
                return Ok((Self::Failed(String::new()), len as usize));
            }
            other => return Err(WireError::Kind(other)),
        };
        within("a length of", len, 0, 0)?;
        Ok((reply, 0))
    }
}

/// The beginning of a reason, at most [`MAX_REASON`] bytes.
pub(crate) fn cut(reason: &str) -> &[u8] {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason.as_bytes()[..end]
}

/// The text of a reason from the other side: printable, on one line.
pub(crate) fn printable(reason: &[u8]) -> String {
    let text = String::from_utf8_lossy(reason);
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests;
