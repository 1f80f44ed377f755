//! The stream of a VM that comes from another host.
#![no_main]

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{GuestMemory, RamLayout};
use clone_migration::{Blocks, Link, receive, wire};

const PAGES: u64 = 64;
const DISK: u64 = 1 << 20;
const MAX_STATE: u64 = 64 << 10;

/// A disk that checks what it is asked.
struct Disk;

impl Blocks for Disk {
    fn sizes(&self) -> Vec<u64> {
        vec![DISK, 0]
    }

    fn write(&mut self, disk: u32, offset: u64, content: &[u8]) -> io::Result<()> {
        self.zero(disk, offset, content.len() as u64)
    }

    fn zero(&mut self, disk: u32, offset: u64, len: u64) -> io::Result<()> {
        assert!(disk == 0 && offset + len <= DISK);
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // What does not fit into the socket's buffer would wait for a reader.
    let bytes = &bytes[..bytes.len().min(64 << 10)];
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let link = |stream: UnixStream| {
        let other = stream.try_clone().expect("a descriptor");
        Link::new(stream.into(), other.into(), Duration::from_secs(5)).expect("a link")
    };
    // Open until the end: libFuzzer's process does not ignore the signal of a write that nobody reads.
    let end = ours.try_clone().expect("a descriptor");
    let mut sender = link(ours);
    let mut receiver = link(theirs);
    // Most inputs begin as a stream does; the rest of the fuzzer's time is better spent.
    if bytes.first().is_some_and(|byte| *byte != 0) {
        let preamble = wire::encode_preamble(PAGES * PAGE_SIZE);
        sender.write_all(&preamble).expect("room");
    }
    sender.write_all(bytes.get(1..).unwrap_or_default()).expect("room");
    end.shutdown(Shutdown::Write).expect("an end of the stream");
    let layout = RamLayout::new(PAGES * PAGE_SIZE).expect("a size of RAM");
    let memory = GuestMemory::anonymous(&layout).expect("memory");
    if let Ok(received) = receive(&mut receiver, &memory, &mut Disk, MAX_STATE) {
        assert!(received.state.len() as u64 <= MAX_STATE);
    }
});
