use super::*;
use crate::layer_writer::{Checksums, LayerWriter};
use crate::layers::LayerStack;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use tempfile::tempfile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

const PAGES: u64 = 600;

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    pages.into_iter().map(|page| page..page + 1).collect()
}

fn write(memory: &GuestMemory, page: u64, byte: u8) {
    let address = memory.layout().address_of(page * PAGE_SIZE + 8).unwrap();
    memory.ram().write_obj(byte, address).unwrap();
}

fn read(memory: &GuestMemory, page: u64) -> u8 {
    let address = memory.layout().address_of(page * PAGE_SIZE + 8).unwrap();
    memory.ram().read_obj(address).unwrap()
}

/// Has the kernel write a page: `read(2)` of a file straight into it.
fn write_by_system_call(memory: &GuestMemory, page: u64) {
    let file = tempfile().unwrap();
    file.write_all_at(&[0x77; 64], 0).unwrap();
    let slice = memory
        .ram()
        .get_slice(GuestAddress(page * PAGE_SIZE), 64)
        .unwrap();
    (&file)
        .read_exact_volatile(&mut slice.subslice(0, 64).unwrap())
        .unwrap();
}

/// A guest over a base with data in the pages that `has_data` says, and a second layer.
fn clone_of(has_data: impl Fn(u64) -> bool) -> GuestMemory {
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    let parent = GuestMemory::anonymous(&layout).unwrap();
    let pages: Vec<u64> = (0..PAGES).filter(|page| has_data(*page)).collect();
    pages.iter().for_each(|page| write(&parent, *page, 1));
    let mut base = LayerWriter::new(tempfile().unwrap(), "base", layout, None).unwrap();
    base.copy(&parent, &set(pages)).unwrap();
    let base = base.finish(Checksums::Yes).unwrap();
    let mut diff = LayerWriter::new(tempfile().unwrap(), "diff", layout, Some(base.id())).unwrap();
    write(&parent, 10, 2);
    diff.copy(&parent, &set([10])).unwrap();
    let diff = diff.finish(Checksums::Yes).unwrap();
    let stack = LayerStack::new(vec![base, diff]).unwrap();
    GuestMemory::from_layers(&layout, &stack).unwrap()
}

fn fresh() -> GuestMemory {
    GuestMemory::anonymous(&RamLayout::new(PAGES * PAGE_SIZE).unwrap()).unwrap()
}

/// Guests of both private kinds: fresh, and over layers with holes.
fn guests() -> [GuestMemory; 2] {
    [fresh(), clone_of(|page| page % 100 < 50)]
}

#[test]
fn pages_only_read_are_not_private() {
    let pagemap = Pagemap::open().unwrap();
    for memory in guests() {
        (0..PAGES).for_each(|page| {
            read(&memory, page);
        });
        assert_eq!(memory.private_pages(&pagemap).unwrap(), PageSet::new());
    }
}

#[test]
fn pages_written_by_cpu_and_by_system_calls_are_private() {
    let pagemap = Pagemap::open().unwrap();
    for memory in guests() {
        for page in [0, 10, 49, 50, 70, PAGES - 1] {
            write(&memory, page, 9);
        }
        write_by_system_call(&memory, 20);
        write_by_system_call(&memory, 80);
        let private = memory.private_pages(&pagemap).unwrap();
        assert_eq!(private, set([0, 10, 20, 49, 50, 70, 80, PAGES - 1]));
    }
}

#[test]
fn shared_memory_tells_what_was_written_and_refuses_tracking() {
    let pagemap = Pagemap::open().unwrap();
    let memory = GuestMemory::shared(&RamLayout::new(PAGES * PAGE_SIZE).unwrap()).unwrap();
    write(&memory, 3, 1);
    write(&memory, 500, 1);
    assert_eq!(memory.private_pages(&pagemap).unwrap(), set([3, 500]));
    assert!(matches!(
        ChangeTracker::new(&memory, pagemap),
        Err(DirtyError::Shared)
    ));
}

#[test]
fn changes_since_a_point_in_time_are_exactly_the_pages_written_since() {
    for memory in guests() {
        let pagemap = Pagemap::open().unwrap();
        (0..40).for_each(|page| write(&memory, page, 3));
        let tracker = ChangeTracker::new(&memory, pagemap.try_clone().unwrap()).unwrap();
        assert_eq!(tracker.arm().unwrap(), set(0..40));
        assert_eq!(tracker.take_changed().unwrap(), PageSet::new());
        // Private before, shared before, never touched before; and reads of each.
        for page in [5, 45, 95] {
            write(&memory, page, 4);
            read(&memory, page + 1);
        }
        write_by_system_call(&memory, 6);
        write_by_system_call(&memory, 60);
        assert_eq!(tracker.take_changed().unwrap(), set([5, 6, 45, 60, 95]));
        assert_eq!(tracker.take_changed().unwrap(), PageSet::new());
        write(&memory, 45, 5);
        assert_eq!(tracker.take_changed().unwrap(), set([45]));
        // Tracking does not disturb the other question.
        let private = memory.private_pages(&pagemap).unwrap();
        assert_eq!(private, set((0..40).chain([45, 60, 95])));
        // Armed again, all private pages are listed again, written lately or not.
        assert_eq!(tracker.arm().unwrap(), private);
        assert_eq!(read(&memory, 5), 4);
    }
}

#[test]
fn layer_pages_and_zero_pages_read_before_and_after_arming_are_no_changes_until_written() {
    for memory in guests() {
        let tracker = ChangeTracker::new(&memory, Pagemap::open().unwrap()).unwrap();
        let read_all = |pages: std::ops::Range<u64>| {
            pages.for_each(|page| {
                let _ = read(&memory, page);
            })
        };
        read_all(0..300);
        assert_eq!(tracker.arm().unwrap(), PageSet::new());
        read_all(0..PAGES);
        assert_eq!(tracker.take_changed().unwrap(), PageSet::new());
        for page in [20, 70, 320, 370] {
            write(&memory, page, 1);
        }
        assert_eq!(tracker.take_changed().unwrap(), set([20, 70, 320, 370]));
    }
}

#[test]
fn pages_given_back_to_the_host_are_no_changes_until_written_again() {
    use rustix::mm::{Advice, madvise};
    for memory in guests() {
        (0..40).for_each(|page| write(&memory, page, 3));
        let tracker = ChangeTracker::new(&memory, Pagemap::open().unwrap()).unwrap();
        assert_eq!(tracker.arm().unwrap(), set(0..40));
        let start = memory.regions()[0].host_address as usize;
        let pages = 20 * PAGE_SIZE as usize;
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: guest RAM, of which no reference exists.
        unsafe { madvise(start, pages, Advice::LinuxDontNeed) }.unwrap();
        assert_eq!(tracker.take_changed().unwrap(), PageSet::new());
        write(&memory, 7, 4);
        assert_eq!(tracker.take_changed().unwrap(), set([7]));
    }
}

#[test]
fn tracking_can_end_and_begin_again() {
    let memory = clone_of(|_| true);
    let pagemap = Pagemap::open().unwrap();
    for round in 0..3 {
        let tracker = ChangeTracker::new(&memory, pagemap.try_clone().unwrap()).unwrap();
        tracker.arm().unwrap();
        write(&memory, 100 + round, 1);
        assert_eq!(tracker.take_changed().unwrap(), set([100 + round]));
    }
}

#[test]
fn more_ranges_than_one_call_reports_are_all_found() {
    let pages = 10_000;
    let layout = RamLayout::new(pages * PAGE_SIZE).unwrap();
    let memory = GuestMemory::anonymous(&layout).unwrap();
    let pagemap = Pagemap::open().unwrap();
    let tracker = ChangeTracker::new(&memory, pagemap.try_clone().unwrap()).unwrap();
    assert!(tracker.arm().unwrap().is_empty());
    let every_other = || (0..pages).step_by(2);
    every_other().for_each(|page| write(&memory, page, 1));
    assert_eq!(memory.private_pages(&pagemap).unwrap(), set(every_other()));
    assert_eq!(tracker.take_changed().unwrap(), set(every_other()));
    assert!(tracker.take_changed().unwrap().is_empty());
}

#[test]
fn pages_on_both_sides_of_the_pci_hole_are_numbered_by_ram_offset() {
    let layout = RamLayout::new((3 << 30) + (1 << 20)).unwrap();
    let memory = GuestMemory::anonymous(&layout).unwrap();
    let (last_below, first_above) = ((3 << 30) / PAGE_SIZE - 1, (3 << 30) / PAGE_SIZE);
    write(&memory, last_below, 1);
    memory
        .ram()
        .write_obj(1_u8, GuestAddress((4 << 30) + 9))
        .unwrap();
    let private = memory.private_pages(&Pagemap::open().unwrap()).unwrap();
    assert_eq!(private, set([last_below, first_above]));
    let mut writer = LayerWriter::new(tempfile().unwrap(), "two", layout, None).unwrap();
    writer.copy(&memory, &private).unwrap();
    let stack = LayerStack::new(vec![writer.finish(Checksums::Yes).unwrap()]).unwrap();
    let clone = GuestMemory::from_layers(&layout, &stack).unwrap();
    assert_eq!(
        clone
            .ram()
            .read_obj::<u8>(GuestAddress((4 << 30) + 9))
            .unwrap(),
        1
    );
    assert_eq!(read(&clone, last_below), 1);
}

#[test]
fn copying_while_another_thread_writes_and_once_more_at_rest_loses_no_write() {
    let memory = clone_of(|page| page % 3 == 0);
    let tracker = ChangeTracker::new(&memory, Pagemap::open().unwrap()).unwrap();
    let parent = memory.layers().unwrap().top().id();
    let layout = *memory.layout();
    let mut writer = LayerWriter::new(tempfile().unwrap(), "live", layout, Some(parent)).unwrap();
    (0..200).for_each(|page| write(&memory, page, 1));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut page = 1_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                write(&memory, page, page as u8 ^ 0x5a);
                page = (page * 75 + 74) % PAGES;
            }
        });
        writer.copy(&memory, &tracker.arm().unwrap()).unwrap();
        for _ in 0..20 {
            writer
                .copy(&memory, &tracker.take_changed().unwrap())
                .unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        guest.join().unwrap();
    });
    writer
        .copy(&memory, &tracker.take_changed().unwrap())
        .unwrap();
    let mut layers = memory.layers().unwrap().layers().to_vec();
    layers.push(writer.finish(Checksums::Transient).unwrap());
    let fork = GuestMemory::from_layers(&layout, &LayerStack::new(layers).unwrap()).unwrap();
    for page in 0..PAGES {
        assert_eq!(read(&fork, page), read(&memory, page), "page {page}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64),
    Call(u64),
    Read(u64),
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..PAGES).prop_map(Step::Write),
        2 => (0..PAGES).prop_map(Step::Call),
        4 => (0..PAGES).prop_map(Step::Read),
        1 => Just(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_mix_of_reads_and_writes_gives_exactly_the_written_pages(
        steps in proptest::collection::vec(step(), 1..120),
        layered in any::<bool>(),
    ) {
        let memory = if layered { clone_of(|page| page % 7 < 4) } else { fresh() };
        let pagemap = Pagemap::open().unwrap();
        let tracker = ChangeTracker::new(&memory, pagemap.try_clone().unwrap()).unwrap();
        prop_assert!(tracker.arm().unwrap().is_empty());
        let (mut ever, mut since) = (BTreeSet::new(), BTreeSet::new());
        for step in steps {
            match step {
                Step::Write(page) => {
                    write(&memory, page, 1);
                    since.insert(page);
                }
                Step::Call(page) => {
                    write_by_system_call(&memory, page);
                    since.insert(page);
                }
                Step::Read(page) => {
                    read(&memory, page);
                }
                Step::Take => {
                    prop_assert_eq!(tracker.take_changed().unwrap(), set(since.iter().copied()));
                    ever.append(&mut since);
                }
            }
        }
        prop_assert_eq!(tracker.take_changed().unwrap(), set(since.iter().copied()));
        ever.append(&mut since);
        prop_assert_eq!(memory.private_pages(&pagemap).unwrap(), set(ever));
    }
}

/// A page's entry in a pagemap. Source: the Linux kernel's `pagemap.rst`.
fn entry(pagemap: &std::fs::File, address: usize) -> u64 {
    let mut entry = [0; 8];
    let at = address as u64 / PAGE_SIZE * 8;
    pagemap.read_exact_at(&mut entry, at).unwrap();
    u64::from_ne_bytes(entry)
}

#[test]
fn page_tables_opened_by_root_show_no_physical_frames() {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let page = vec![1_u8; 2 * PAGE_SIZE as usize];
    let address = page.as_ptr() as usize;
    let before = capabilities(None).unwrap();
    let ours = entry(&Pagemap::open().unwrap().0, address);
    assert_eq!((ours & PRESENT, ours & FRAME), (PRESENT, 0));
    assert_eq!(capabilities(None).unwrap(), before);
    // The test means something where the plain way does show them.
    if before.effective.contains(CapabilitySet::SYS_ADMIN) {
        let plain = std::fs::File::open("/proc/self/pagemap").unwrap();
        assert_ne!(entry(&plain, address) & FRAME, 0);
    }
}
