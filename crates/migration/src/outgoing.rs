//! The source's end of the stream.

use std::ops::Range;
use std::time::{Duration, Instant};

use clone_memory::GuestMemory;
use clone_memory::layout::PAGE_SIZE;
use vm_memory::Bytes;

use crate::sent_pages::SentPages;
use crate::wire::{self, MAX_BODY, MAX_PAGES, MAX_STATE_PART, REPLY_BYTES, Record, Reply};
use crate::{Link, MigrationError};

/// The size from which the records that wait are written out.
const WRITE_AT: usize = 256 << 10;
/// The number of records that are sent unpacked after one that packing did not make smaller.
const PACK_PAUSE: u32 = 15;
/// The longest part of a disk that one record makes zero, in bytes.
const MAX_ZERO_BLOCKS: u64 = 1 << 30;
/// The longest wait for the bandwidth limit, which is shorter than the patience of the other side.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes on the stream.
    pub bytes: u64,
    /// Pages with their content. A page counts each time that it is sent.
    pub data_pages: u64,
    /// Pages that were told to be zero.
    pub zero_pages: u64,
    /// Pages that were told to equal another one.
    pub equal_pages: u64,
    /// Bytes of disks with their content.
    pub disk_bytes: u64,
}

/// A VM on its way to another host.
#[derive(Debug)]
pub struct Outgoing {
    link: Link,
    /// Records that wait to be written.
    output: Vec<u8>,
    records: u64,
    sent: Sent,
    pages: SentPages,
    /// The content of the pages that are looked at.
    content: Vec<u8>,
    /// The number of records until packing is tried again.
    unpacked: u32,
    limit: Option<RateLimit>,
}

impl Outgoing {
    /// Begins a stream for a machine with `ram_bytes` of RAM. With `limit`, at most that many bytes
    /// are sent in a second.
    pub fn new(link: Link, ram_bytes: u64, limit: Option<u64>) -> Self {
        Self {
            link,
            output: wire::encode_preamble(ram_bytes).to_vec(),
            records: 0,
            sent: Sent::default(),
            pages: SentPages::default(),
            content: vec![0; MAX_BODY],
            unpacked: 0,
            limit: limit.map(RateLimit::new),
        }
    }

    /// What was sent so far.
    pub fn sent(&self) -> Sent {
        self.sent
    }

    /// Lifts the bandwidth limit: the guest is paused, and every byte keeps it waiting.
    pub fn hurry(&mut self) {
        self.limit = None;
    }

    /// Sets the longest time without progress of the connection.
    pub fn set_patience(&mut self, patience: Duration) {
        self.link.set_patience(patience);
    }

    /// Sends pages in their present state. The guest may write them meanwhile; then they must be sent
    /// again.
    ///
    /// # Errors
    /// [`MigrationError::Stream`] or [`MigrationError::Memory`].
    pub fn send_pages(
        &mut self,
        memory: &GuestMemory,
        pages: Range<u64>,
    ) -> Result<(), MigrationError> {
        let mut first = pages.start;
        while first < pages.end {
            let count = (pages.end - first).min(MAX_PAGES);
            self.send_chunk(memory, first, count)?;
            first += count;
        }
        Ok(())
    }

    /// Sends up to [`MAX_PAGES`] pages.
    fn send_chunk(
        &mut self,
        memory: &GuestMemory,
        first: u64,
        count: u64,
    ) -> Result<(), MigrationError> {
        let mut content = std::mem::take(&mut self.content);
        let read = read_pages(memory, first, &mut content[..(count * PAGE_SIZE) as usize]);
        let sent = read.and_then(|()| {
            let mut parts = Parts::default();
            for (page, bytes) in (first..first + count).zip(content.chunks(PAGE_SIZE as usize)) {
                let part = self.part_of(page, bytes);
                if let Some(whole) = parts.add(page, part) {
                    self.send_part(whole, first, &content)?;
                }
            }
            match parts.rest() {
                Some(last) => self.send_part(last, first, &content),
                None => Ok(()),
            }
        });
        self.content = content;
        sent
    }

    /// How a page with this content is sent.
    fn part_of(&mut self, page: u64, content: &[u8]) -> Kind {
        if content.iter().all(|byte| *byte == 0) {
            self.pages.forget(page);
            return Kind::Zero;
        }
        match self.pages.send(page, content) {
            Some(other) => Kind::Equal(other),
            None => Kind::Data,
        }
    }

    fn send_part(&mut self, part: Part, origin: u64, content: &[u8]) -> Result<(), MigrationError> {
        let Part { first, count, kind } = part;
        match kind {
            Kind::Zero => {
                self.sent.zero_pages += count;
                self.push(Record::ZeroPages { first, count }, &[])
            }
            Kind::Equal(other) => {
                self.sent.equal_pages += 1;
                self.push(Record::EqualPage { page: first, other }, &[])
            }
            Kind::Data => {
                self.sent.data_pages += count;
                let at = ((first - origin) * PAGE_SIZE) as usize;
                self.push_pages(
                    first,
                    count,
                    &content[at..at + (count * PAGE_SIZE) as usize],
                )
            }
        }
    }

    /// Sends data packed where that makes it an eighth smaller.
    fn push_pages(&mut self, first: u64, count: u64, content: &[u8]) -> Result<(), MigrationError> {
        if self.unpacked > 0 {
            self.unpacked -= 1;
            return self.push(Record::Pages { first, count }, content);
        }
        let packed = lz4_flex::block::compress(content);
        if packed.len() > content.len() / 8 * 7 {
            self.unpacked = PACK_PAUSE;
            return self.push(Record::Pages { first, count }, content);
        }
        let len = packed.len();
        self.push(Record::PackedPages { first, count, len }, &packed)
    }

    /// Sends a part of a disk.
    ///
    /// # Errors
    /// [`MigrationError::Stream`].
    pub fn send_blocks(
        &mut self,
        disk: u32,
        offset: u64,
        content: &[u8],
    ) -> Result<(), MigrationError> {
        for (index, part) in content.chunks(MAX_BODY).enumerate() {
            let offset = offset + (index * MAX_BODY) as u64;
            let len = part.len();
            self.sent.disk_bytes += len as u64;
            self.push(Record::Blocks { disk, offset, len }, part)?;
        }
        Ok(())
    }

    /// Tells that a part of a disk is zero.
    ///
    /// # Errors
    /// [`MigrationError::Stream`].
    pub fn send_zero_blocks(
        &mut self,
        disk: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), MigrationError> {
        let (mut offset, end) = (offset, offset + len);
        while offset < end {
            let len = (end - offset).min(MAX_ZERO_BLOCKS);
            self.push(Record::ZeroBlocks { disk, offset, len }, &[])?;
            offset += len;
        }
        Ok(())
    }

    /// Waits until the destination has applied everything, so that nothing of it is left for the
    /// pause.
    ///
    /// # Errors
    /// [`MigrationError::Stream`], or [`MigrationError::Refused`] if the destination gave up.
    pub fn settle(&mut self) -> Result<(), MigrationError> {
        let number = self.records;
        self.push(Record::Sync { number }, &[])?;
        self.flush()?;
        match self.reply()? {
            Reply::Synced(found) if found == number => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Sends the machine's state, which is the last of everything, and waits until the destination
    /// could run the guest.
    ///
    /// # Errors
    /// [`MigrationError::Stream`], or [`MigrationError::Refused`] if the destination gave up.
    pub fn finish(&mut self, state: &[u8]) -> Result<(), MigrationError> {
        let mut at = 0;
        for part in state.chunks(MAX_STATE_PART) {
            let len = part.len();
            self.push(Record::State { at, len }, part)?;
            at += len as u64;
        }
        let records = self.records;
        self.push(Record::Done { records }, &[])?;
        self.flush()?;
        match self.reply()? {
            Reply::Ready => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Gives the VM to the destination.
    ///
    /// # Errors
    /// Returns whether a byte of the word may have reached the destination. If none has, the VM is
    /// still the source's.
    pub fn go(&mut self) -> Result<(), (bool, MigrationError)> {
        let word = Record::Go.encode();
        self.sent.bytes += word.len() as u64;
        self.link.write_all(&word).map_err(|(written, source)| {
            let failed = MigrationError::stream("give it the VM")(source);
            (written > 0, failed)
        })
    }

    /// Waits for the destination's answer to [`Outgoing::go`]: whether the guest runs there, or was
    /// discarded, for the reason returned.
    ///
    /// # Errors
    /// [`MigrationError::Stream`] or [`MigrationError::Wire`]; then it is not known which of the two.
    pub fn outcome(&mut self) -> Result<Option<String>, MigrationError> {
        match self.reply()? {
            Reply::Running => Ok(None),
            Reply::Failed(reason) => Ok(Some(reason)),
            other => Err(unexpected(other)),
        }
    }

    /// Tells the destination that the VM stays here, as far as it still listens.
    pub fn abort(mut self, reason: &str) {
        let reason = wire::cut(reason);
        let mut word = Record::Abort { len: reason.len() }.encode().to_vec();
        word.extend(reason);
        // Records that wait are of no use any more, but one that was begun must be completed.
        let rest = std::mem::take(&mut self.output);
        let _ = self.link.write_all(&rest);
        let _ = self.link.write_all(&word);
    }

    fn reply(&mut self) -> Result<Reply, MigrationError> {
        let mut header = [0; REPLY_BYTES];
        let failed = || MigrationError::stream("read its answer");
        self.link.read_exact(&mut header).map_err(failed())?;
        let (reply, len) = Reply::decode(&header)?;
        if !matches!(reply, Reply::Failed(_)) {
            return Ok(reply);
        }
        let mut reason = vec![0; len];
        self.link.read_exact(&mut reason).map_err(failed())?;
        Ok(Reply::Failed(wire::printable(&reason)))
    }

    fn push(&mut self, record: Record, body: &[u8]) -> Result<(), MigrationError> {
        self.records += 1;
        self.output.extend(record.encode());
        self.output.extend(body);
        match self.output.len() >= WRITE_AT {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), MigrationError> {
        let len = self.output.len() as u64;
        if let Some(limit) = &mut self.limit {
            limit.take(len);
        }
        let written = self.link.write_all(&self.output);
        self.output.clear();
        self.sent.bytes += len;
        written.map_err(|(_, source)| MigrationError::stream("send the VM")(source))
    }
}

fn unexpected(reply: Reply) -> MigrationError {
    match reply {
        Reply::Failed(reason) => MigrationError::Refused(reason),
        Reply::Synced(_) => wire::WireError::Kind(1).into(),
        Reply::Ready => wire::WireError::Kind(2).into(),
        Reply::Running => wire::WireError::Kind(3).into(),
    }
}

fn read_pages(memory: &GuestMemory, first: u64, content: &mut [u8]) -> Result<(), MigrationError> {
    let failed = |reason: String| MigrationError::Memory {
        what: "read",
        reason,
    };
    for (page, bytes) in (first..).zip(content.chunks_mut(PAGE_SIZE as usize)) {
        let address = memory.layout().address_of(page * PAGE_SIZE);
        let address = address.ok_or_else(|| failed(format!("there is no page {page}")))?;
        let read = memory.ram().read_slice(bytes, address);
        read.map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}

/// How pages are sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Data,
    Equal(u64),
}

/// Pages that one record can tell.
struct Part {
    first: u64,
    count: u64,
    kind: Kind,
}

/// Gathers neighbouring pages of one kind.
#[derive(Default)]
struct Parts(Option<Part>);

impl Parts {
    /// Adds the next page; returns the part before it if the page belongs to another.
    fn add(&mut self, page: u64, kind: Kind) -> Option<Part> {
        match &mut self.0 {
            Some(part) if part.kind == kind && !matches!(kind, Kind::Equal(_)) => {
                part.count += 1;
                None
            }
            _ => self.0.replace(Part {
                first: page,
                count: 1,
                kind,
            }),
        }
    }

    fn rest(self) -> Option<Part> {
        self.0
    }
}

/// A limit to the bytes in a second.
#[derive(Debug)]
struct RateLimit {
    bytes_per_second: u64,
    /// The moment at which everything so far would have been sent at that rate.
    free_at: Instant,
}

impl RateLimit {
    fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            free_at: Instant::now(),
        }
    }

    /// Waits until `bytes` more may be sent.
    fn take(&mut self, bytes: u64) {
        let now = Instant::now();
        let wait = self.free_at.saturating_duration_since(now);
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.free_at = self.free_at.max(now) + takes.min(MAX_WAIT);
    }
}
