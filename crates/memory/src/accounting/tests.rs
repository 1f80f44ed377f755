use super::*;
use crate::layer_writer::{Checksums, LayerWriter};
use crate::layers::LayerStack;
use crate::layout::RamLayout;
use std::iter;
use tempfile::tempfile;
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 4096;

fn write(memory: &GuestMemory, pages: std::ops::Range<u64>) {
    for page in pages {
        let address = GuestAddress(page * PAGE_SIZE);
        memory.ram().write_obj(1_u64, address).unwrap();
    }
}

fn read(memory: &GuestMemory, pages: std::ops::Range<u64>) {
    for page in pages {
        let address = GuestAddress(page * PAGE_SIZE);
        memory.ram().read_obj::<u64>(address).unwrap();
    }
}

/// Pages 0 to 1,000 of a base, 500 to 600 of a second layer.
fn clone() -> GuestMemory {
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    let parent = GuestMemory::anonymous(&layout).unwrap();
    write(&parent, 0..1000);
    let layer = |parent_id, pages: std::ops::Range<u64>| {
        let file = tempfile().unwrap();
        let mut writer = LayerWriter::new(file, "layer", layout, parent_id).unwrap();
        writer.copy(&parent, &iter::once(pages).collect()).unwrap();
        writer.finish(Checksums::Yes).unwrap()
    };
    let base = layer(None, 0..1000);
    let diff = layer(Some(base.id()), 500..600);
    let stack = LayerStack::new(vec![base, diff]).unwrap();
    GuestMemory::from_layers(&layout, &stack).unwrap()
}

#[test]
fn pages_are_counted_by_kind_and_by_layer() {
    let (memory, pagemap) = (clone(), Pagemap::open().unwrap());
    assert_eq!(memory.usage(&pagemap).unwrap().private, 0);
    memory.prefetch(&iter::once(0..1000).collect()).unwrap();
    read(&memory, 2000..2100);
    write(&memory, 490..510);
    write(&memory, 990..1005);
    let usage = memory.usage(&pagemap).unwrap();
    let pages = |private: u64, shared: u64| LayerUsage {
        private: private * PAGE_SIZE,
        shared: shared * PAGE_SIZE,
    };
    let base = pages(20, 900 - 20);
    assert_eq!(usage.layers, [base, pages(10, 90)]);
    assert_eq!(usage.private, 35 * PAGE_SIZE);
    assert_eq!(usage.shared, 970 * PAGE_SIZE);
    assert_eq!(usage.swapped, 0);
}

#[test]
fn memory_that_is_shared_with_a_device_process_is_the_guest_s_own() {
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    let memory = GuestMemory::shared(&layout).unwrap();
    write(&memory, 5..15);
    let usage = memory.usage(&Pagemap::open().unwrap()).unwrap();
    assert_eq!((usage.private, usage.shared), (10 * PAGE_SIZE, 0));
}

#[test]
fn the_kernel_s_counters_see_a_clone_s_pages_as_shared_until_written() {
    let memory = clone();
    memory.prefetch(&iter::once(0..1000).collect()).unwrap();
    let before = ProcessUsage::of(std::process::id()).unwrap();
    // Other tests of this process take memory meanwhile: so only the least is claimed.
    assert!(before.shared >= 1000 * PAGE_SIZE, "{before:?}");
    write(&memory, 0..1000);
    let after = ProcessUsage::of(std::process::id()).unwrap();
    assert!(after.private >= 1000 * PAGE_SIZE, "{after:?}");
}

#[test]
fn the_kernel_s_answer_is_read_as_it_is_written() {
    let status = "Name:\tclone\nVmSwap:\t      12 kB\nRssAnon:\t     340 kB\n\
                  RssFile:\t    5000 kB\nRssShmem:\t      8 kB\n";
    let usage = ProcessUsage::from_status(status).unwrap();
    assert_eq!(usage.private, 340 << 10);
    assert_eq!(usage.shared, 5008 << 10);
    assert_eq!(usage.swapped, 12 << 10);
    assert_eq!(ProcessUsage::from_status("Name:\tkthreadd\n"), None);
}

#[test]
fn a_process_that_is_gone_is_not_found() {
    let error = ProcessUsage::of(u32::MAX).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}
