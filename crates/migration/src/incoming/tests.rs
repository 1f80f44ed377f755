use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use clone_memory::{Checksums, GuestMemory, LayerStack, LayerWriter, PageSet, Pagemap, RamLayout};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{Outgoing, Sent};

const PAGES: u64 = 64;
const DISK: usize = 1 << 20;

/// One disk in memory, and one that nothing may be written to.
struct Disks(Vec<u8>);

impl Blocks for Disks {
    fn sizes(&self) -> Vec<u64> {
        vec![0, self.0.len() as u64]
    }

    fn write(&mut self, disk: u32, offset: u64, content: &[u8]) -> io::Result<()> {
        assert_eq!(disk, 1);
        let at = offset as usize;
        self.0[at..at + content.len()].copy_from_slice(content);
        Ok(())
    }

    fn zero(&mut self, disk: u32, offset: u64, len: u64) -> io::Result<()> {
        self.write(disk, offset, &vec![0; len as usize])
    }
}

fn layout() -> RamLayout {
    RamLayout::new(PAGES * PAGE_SIZE).unwrap()
}

fn links(patience: Duration) -> (Link, Link) {
    let (a, b) = UnixStream::pair().unwrap();
    let link = |stream: UnixStream| {
        let other = stream.try_clone().unwrap();
        Link::new(stream.into(), other.into(), patience).unwrap()
    };
    (link(a), link(b))
}

fn outgoing(link: Link, limit: Option<u64>) -> Outgoing {
    Outgoing::new(link, PAGES * PAGE_SIZE, limit)
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.layout().size() as usize];
    let read = memory.ram().read_slice(&mut bytes, GuestAddress(0));
    read.unwrap();
    bytes
}

/// A template whose pages have their numbers as content.
fn template() -> LayerStack {
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    for page in 0..PAGES / 2 {
        fill(&memory, page, page as u8 + 1);
    }
    let file = tempfile::tempfile().unwrap();
    let mut writer = LayerWriter::new(file, "base", layout(), None).unwrap();
    let all: PageSet = std::iter::once(0..PAGES).collect();
    writer.copy(&memory, &all).unwrap();
    LayerStack::new(vec![writer.finish(Checksums::Transient).unwrap()]).unwrap()
}

fn fill(memory: &GuestMemory, page: u64, byte: u8) {
    let address = GuestAddress(page * PAGE_SIZE);
    let written = memory
        .ram()
        .write_slice(&[byte; PAGE_SIZE as usize], address);
    written.unwrap();
}

/// The destination, in a thread.
fn destination(
    mut link: Link,
    memory: GuestMemory,
) -> std::thread::JoinHandle<(Result<Received, MigrationError>, GuestMemory, Vec<u8>)> {
    std::thread::spawn(move || {
        let mut disks = Disks(vec![7; DISK]);
        let received = receive(&mut link, &memory, &mut disks, 1 << 20);
        if received.is_ok() {
            let _ = link.write_all(&Reply::Ready.encode());
        }
        (received, memory, disks.0)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Whatever is written in whatever order, the destination has the same in the end: over the
    /// template's pages, with equal pages and zeros among them, sent in several rounds.
    #[test]
    fn the_destination_has_what_the_source_has(
        rounds in prop::collection::vec(
            prop::collection::vec((0..PAGES, 0_u8..5), 0..40), 1..5
        )
    ) {
        let stack = template();
        let of_template = || GuestMemory::from_layers(&layout(), &stack).unwrap();
        let (here, there) = (of_template(), of_template());
        let (ours, theirs) = links(Duration::from_secs(20));
        let destination = destination(theirs, there);
        let mut outgoing = outgoing(ours, None);
        for writes in rounds {
            for (page, byte) in &writes {
                fill(&here, *page, *byte);
            }
            let changed: PageSet = writes.iter().map(|(page, _)| *page..*page + 1).collect();
            for run in changed.runs() {
                outgoing.send_pages(&here, run.clone()).unwrap();
            }
            outgoing.settle().unwrap();
        }
        outgoing.finish(&[5; 100_000]).unwrap();
        let (received, there, _) = destination.join().unwrap();
        prop_assert_eq!(received.unwrap().state, vec![5; 100_000]);
        prop_assert!(content(&there) == content(&here));
    }
}

#[test]
fn blocks_arrive_and_zero_blocks_are_zero() {
    let (ours, theirs) = links(Duration::from_secs(20));
    let destination = destination(theirs, GuestMemory::anonymous(&layout()).unwrap());
    let mut outgoing = outgoing(ours, Some(64 << 20));
    outgoing.send_blocks(1, 4096, &vec![1; 300_000]).unwrap();
    outgoing.send_zero_blocks(1, 8192, 4096).unwrap();
    outgoing.finish(b"state").unwrap();
    assert_eq!(outgoing.sent().disk_bytes, 300_000);
    let mut expected = vec![7; DISK];
    expected[4096..4096 + 300_000].fill(1);
    expected[8192..12288].fill(0);
    let (received, _, disk) = destination.join().unwrap();
    received.unwrap();
    assert!(disk == expected);
}

#[test]
fn equal_pages_and_zeros_take_next_to_nothing_and_zeros_no_memory() {
    let (here, there) = (
        GuestMemory::anonymous(&layout()).unwrap(),
        GuestMemory::anonymous(&layout()).unwrap(),
    );
    // Content that cannot be packed, in all pages but the last.
    let mut random = vec![0; PAGE_SIZE as usize];
    let mut x = 1_u32;
    for byte in &mut random {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (x >> 24) as u8;
    }
    for page in 0..PAGES - 1 {
        let address = GuestAddress(page * PAGE_SIZE);
        here.ram().write_slice(&random, address).unwrap();
    }
    let (ours, theirs) = links(Duration::from_secs(20));
    let destination = destination(theirs, there);
    let mut outgoing = outgoing(ours, None);
    outgoing.send_pages(&here, 0..PAGES).unwrap();
    outgoing.finish(b"").unwrap();
    let Sent {
        bytes,
        data_pages,
        zero_pages,
        equal_pages,
        ..
    } = outgoing.sent();
    assert_eq!((data_pages, zero_pages, equal_pages), (1, 1, PAGES - 2));
    assert!(bytes < 2 * PAGE_SIZE, "{bytes}");
    let (received, there, _) = destination.join().unwrap();
    assert_eq!(received.unwrap().data_pages, 1);
    assert!(content(&there) == content(&here));
    let pagemap = Pagemap::open().unwrap();
    let private = there.private_pages(&pagemap).unwrap();
    assert!(!private.contains(PAGES - 1));
}

#[test]
fn a_source_that_keeps_the_vm_says_so_in_the_middle_of_a_round() {
    let (ours, theirs) = links(Duration::from_secs(20));
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    fill(&memory, 3, 3);
    let destination = destination(theirs, GuestMemory::anonymous(&layout()).unwrap());
    let mut outgoing = outgoing(ours, None);
    outgoing.send_pages(&memory, 0..PAGES).unwrap();
    outgoing.abort("the disk is full");
    let (received, ..) = destination.join().unwrap();
    let reason = received.unwrap_err();
    assert!(matches!(&reason, MigrationError::Refused(why) if why == "the disk is full"));
}

#[test]
fn a_destination_that_gives_up_is_heard_with_its_reason() {
    let (ours, mut theirs) = links(Duration::from_secs(20));
    let reason = "no room\x1b[2J";
    theirs
        .write_all(&Reply::Failed(reason.into()).encode())
        .unwrap();
    let mut outgoing = outgoing(ours, None);
    match outgoing.settle().unwrap_err() {
        MigrationError::Refused(reason) => assert_eq!(reason, "no room [2J"),
        other => panic!("{other}"),
    }
}

#[test]
fn the_word_to_run_is_known_not_to_have_gone_where_nobody_listens() {
    let (ours, theirs) = links(Duration::from_secs(20));
    drop(theirs);
    let (may_have_gone, _) = outgoing(ours, None).go().unwrap_err();
    assert!(!may_have_gone);
    let (ours, mut theirs) = links(Duration::from_secs(20));
    let mut outgoing = outgoing(ours, None);
    outgoing.go().unwrap();
    theirs.write_all(&Reply::Running.encode()).unwrap();
    assert_eq!(outgoing.outcome().unwrap(), None);
    drop(theirs);
    outgoing.outcome().unwrap_err();
}

#[test]
fn a_limit_to_the_bandwidth_is_kept() {
    let (ours, theirs) = links(Duration::from_secs(20));
    let destination = destination(theirs, GuestMemory::anonymous(&layout()).unwrap());
    let mut outgoing = outgoing(ours, Some(2 << 20));
    let begun = std::time::Instant::now();
    for _ in 0..3 {
        outgoing.send_blocks(1, 0, &vec![1; 512 << 10]).unwrap();
    }
    outgoing.finish(b"").unwrap();
    // 1.5 MiB at 2 MiB in a second, the last part of which need not be waited for.
    assert!(begun.elapsed() > Duration::from_millis(400));
    destination.join().unwrap().0.unwrap();
}

/// A stream of these bytes, which then ends.
fn refused(bytes: &[u8]) -> MigrationError {
    let (mut ours, mut theirs) = links(Duration::from_secs(20));
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    ours.write_all(bytes).unwrap();
    drop(ours);
    let mut disks = Disks(vec![0; DISK]);
    receive(&mut theirs, &memory, &mut disks, 1000).unwrap_err()
}

#[test]
fn hostile_streams_are_refused() {
    let stream = |records: &[(Record, &[u8])]| {
        let mut bytes = wire::encode_preamble(PAGES * PAGE_SIZE).to_vec();
        for (record, body) in records {
            bytes.extend(record.encode());
            bytes.extend(*body);
        }
        bytes
    };
    let part = |at| (Record::State { at, len: 600 }, &[0_u8; 600][..]);
    let packed = |body: &'static [u8]| {
        let len = body.len();
        (
            Record::PackedPages {
                first: 0,
                count: 1,
                len,
            },
            body,
        )
    };
    // One byte of data, and a copy of it that is far too long for a page.
    let bomb = packed(&[
        0x1f, 7, 1, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
        255, 9,
    ]);
    for bytes in [
        Vec::new(),
        b"GET / HTTP/1.1\r\n\r\n and more".to_vec(),
        stream(&[(Record::Go, &[])]),
        stream(&[(Record::Done { records: 1 }, &[])]),
        stream(&[part(0), part(600)]),
        stream(&[part(1)]),
        stream(&[packed(&[255; 9])]),
        stream(&[packed(&[0x10, 7])]),
        stream(&[bomb]),
        stream(&[(
            Record::Pages {
                first: PAGES,
                count: 1,
            },
            &[0; 4096],
        )]),
        stream(&[(Record::Pages { first: 0, count: 1 }, &[0; 4000])]),
    ] {
        refused(&bytes);
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), headed: bool) {
        let mut stream = match headed {
            true => wire::encode_preamble(PAGES * PAGE_SIZE).to_vec(),
            false => Vec::new(),
        };
        stream.extend(bytes);
        refused(&stream);
    }
}
