//! The destination's end of the stream. Everything that it reads may be hostile.

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, LayerStack};
use vm_memory::Bytes;

use crate::wire::{
    self, MAX_BODY, MachineSizes, PREAMBLE_BYTES, RECORD_BYTES, Record, Reply, WireError,
};
use crate::{Link, MigrationError};

/// The disks that blocks are written to.
pub trait Blocks {
    /// The size of each disk in bytes; 0 for one that keeps its content.
    fn sizes(&self) -> Vec<u64>;
    /// Writes a part of a disk.
    ///
    /// # Errors
    /// The system's.
    fn write(&mut self, disk: u32, offset: u64, content: &[u8]) -> std::io::Result<()>;
    /// Makes a part of a disk zero.
    ///
    /// # Errors
    /// The system's.
    fn zero(&mut self, disk: u32, offset: u64, len: u64) -> std::io::Result<()>;
}

/// A VM that has arrived.
#[derive(Debug, Default)]
pub struct Received {
    /// The machine's state, not yet decoded.
    pub state: Vec<u8>,
    /// The pages whose content came.
    pub data_pages: u64,
    /// The bytes that came.
    pub bytes: u64,
}

/// Receives a VM into `memory` and `blocks`, up to the end of its state, which has at most
/// `max_state` bytes. No byte after that is read.
///
/// # Errors
/// [`MigrationError::Wire`] for what cannot be, [`MigrationError::Refused`] if the source keeps the
/// VM, and the host's. Memory and disks are then of no use.
pub fn receive(
    link: &mut Link,
    memory: &GuestMemory,
    blocks: &mut dyn Blocks,
    max_state: u64,
) -> Result<Received, MigrationError> {
    let broken = || MigrationError::stream("receive the VM");
    let mut preamble = [0; PREAMBLE_BYTES];
    link.read_exact(&mut preamble).map_err(broken())?;
    wire::check_preamble(&preamble, memory.layout().size())?;
    let sizes = MachineSizes {
        pages: memory.layout().size() / PAGE_SIZE,
        disks: blocks.sizes(),
    };
    let mut incoming = Incoming {
        memory,
        blocks,
        max_state,
        occupied: Occupied::of(memory),
        buffer: vec![0; MAX_BODY],
        received: Received {
            bytes: PREAMBLE_BYTES as u64,
            ..Received::default()
        },
    };
    let mut body = vec![0; MAX_BODY];
    let mut records = 0_u64;
    loop {
        let mut header = [0; RECORD_BYTES];
        link.read_exact(&mut header).map_err(broken())?;
        let record = Record::decode(&header, &sizes)?;
        let body = &mut body[..record.body_len()];
        link.read_exact(body).map_err(broken())?;
        incoming.received.bytes += (RECORD_BYTES + body.len()) as u64;
        match record {
            Record::Sync { number } => {
                let reply = Reply::Synced(number).encode();
                let sent = link.write_all(&reply);
                sent.map_err(|(_, error)| MigrationError::stream("answer")(error))?;
            }
            Record::Done { records: sent } => {
                return match sent == records {
                    true => Ok(incoming.received),
                    false => Err(WireError::Lost {
                        found: records,
                        sent,
                    }
                    .into()),
                };
            }
            Record::Abort { .. } => {
                return Err(MigrationError::Refused(wire::printable(body)));
            }
            record => incoming.apply(record, body)?,
        }
        records += 1;
    }
}

struct Incoming<'a> {
    memory: &'a GuestMemory,
    blocks: &'a mut dyn Blocks,
    max_state: u64,
    occupied: Occupied,
    /// Unpacked pages, and pages that are copied.
    buffer: Vec<u8>,
    received: Received,
}

impl Incoming<'_> {
    fn apply(&mut self, record: Record, body: &[u8]) -> Result<(), MigrationError> {
        match record {
            Record::Pages { first, count } => {
                self.received.data_pages += count;
                self.write(first, body)
            }
            Record::PackedPages { first, count, .. } => {
                self.received.data_pages += count;
                let len = (count * PAGE_SIZE) as usize;
                let mut buffer = std::mem::take(&mut self.buffer);
                let unpacked = lz4_flex::block::decompress_into(body, &mut buffer[..len]);
                let written = match unpacked {
                    Ok(found) if found == len => self.write(first, &buffer[..len]),
                    _ => Err(WireError::Packed.into()),
                };
                self.buffer = buffer;
                written
            }
            Record::ZeroPages { first, count } => self.zero(first, count),
            Record::EqualPage { page, other } => {
                let mut content = [0; PAGE_SIZE as usize];
                self.read(other, &mut content)?;
                self.write(page, &content)
            }
            Record::Blocks { disk, offset, .. } => {
                let written = self.blocks.write(disk, offset, body);
                written.map_err(|source| MigrationError::Disk {
                    what: "write",
                    disk,
                    source,
                })
            }
            Record::ZeroBlocks { disk, offset, len } => {
                let written = self.blocks.zero(disk, offset, len);
                written.map_err(|source| MigrationError::Disk {
                    what: "write zeros to",
                    disk,
                    source,
                })
            }
            Record::State { at, .. } => {
                let state = &mut self.received.state;
                let len = state.len() as u64;
                if at != len || len + body.len() as u64 > self.max_state {
                    let what = "a place in the state of";
                    return Err(WireError::Range { what, value: at }.into());
                }
                state.extend(body);
                Ok(())
            }
            // The word to run comes only after the answer to the last record.
            Record::Go => Err(WireError::Kind(10).into()),
            Record::Sync { .. } | Record::Done { .. } | Record::Abort { .. } => Ok(()),
        }
    }

    fn write(&mut self, first: u64, content: &[u8]) -> Result<(), MigrationError> {
        for (page, bytes) in (first..).zip(content.chunks(PAGE_SIZE as usize)) {
            let address = self.address(page)?;
            let written = self.memory.ram().write_slice(bytes, address);
            written.map_err(|error| failed("write", error.to_string()))?;
            self.occupied.set(page, true);
        }
        Ok(())
    }

    fn read(&self, page: u64, content: &mut [u8]) -> Result<(), MigrationError> {
        let read = self.memory.ram().read_slice(content, self.address(page)?);
        read.map_err(|error| failed("read", error.to_string()))
    }

    /// Writes zeros to those pages that may be something else; the others take no memory.
    fn zero(&mut self, first: u64, count: u64) -> Result<(), MigrationError> {
        for page in first..first + count {
            if self.occupied.has(page) {
                self.write(page, &[0; PAGE_SIZE as usize])?;
                self.occupied.set(page, false);
            }
        }
        Ok(())
    }

    fn address(&self, page: u64) -> Result<vm_memory::GuestAddress, MigrationError> {
        let address = self.memory.layout().address_of(page * PAGE_SIZE);
        address.ok_or_else(|| failed("find", format!("there is no page {page}")))
    }
}

fn failed(what: &'static str, reason: String) -> MigrationError {
    MigrationError::Memory { what, reason }
}

/// The pages that may not be zero: one bit each.
struct Occupied(Vec<u64>);

impl Occupied {
    /// The pages that the layers under `memory`, which nothing has written to, have data for.
    fn of(memory: &GuestMemory) -> Self {
        let pages = memory.layout().size() / PAGE_SIZE;
        let mut occupied = Self(vec![0; pages.div_ceil(64) as usize]);
        let data = memory.layers().map(LayerStack::pages_with_data);
        for page in data.unwrap_or_default().runs().iter().cloned().flatten() {
            occupied.set(page, true);
        }
        occupied
    }

    fn has(&self, page: u64) -> bool {
        self.0[(page / 64) as usize] >> (page % 64) & 1 != 0
    }

    fn set(&mut self, page: u64, occupied: bool) {
        let word = &mut self.0[(page / 64) as usize];
        *word = *word & !(1 << (page % 64)) | u64::from(occupied) << (page % 64);
    }
}

#[cfg(test)]
mod tests;
