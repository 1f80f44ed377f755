//! Chains as a driver of plain memory writes them.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::driver::{DriverQueue, INDIRECT, NEXT, WRITE};
use crate::virtio::testing;
use crate::virtio::{ActiveQueue, DeviceError, DeviceName, ServedQueue};

const SIZE: u16 = 64;
const RAM_BYTES: u64 = 1 << 20;
const BUFFERS: u64 = 0x4_0000;

/// A driver's queue and the device's side of it.
fn queue(ram: &GuestRam) -> (DriverQueue, ServedQueue) {
    let driver = DriverQueue::new(ram, 0, SIZE);
    let active = ActiveQueue {
        index: 0,
        queue: driver.device_side(),
        kick: vmm_sys_util::eventfd::EventFd::new(0).unwrap(),
    };
    let served = ServedQueue::new(DeviceName::new("test"), active, false);
    (driver, served)
}

/// RAM in two regions that touch, so that a buffer may cross from one into the other.
fn ram() -> GuestRam {
    let half = RAM_BYTES as usize / 2;
    let ranges = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
    GuestRam::from_ranges(&ranges).unwrap()
}

fn reason(result: Result<Option<DescriptorChain<'_>>, DeviceError>) -> String {
    result.expect_err("a broken chain").to_string()
}

#[test]
fn bytes_are_read_and_written_in_order_across_buffers_and_regions() {
    let ram = ram();
    let (mut driver, mut served) = queue(&ram);
    let border = RAM_BYTES / 2;
    ram.write_slice(b"abcdef", GuestAddress(BUFFERS)).unwrap();
    driver.offer(&[
        (BUFFERS, 4, false),
        (BUFFERS + 4, 2, false),
        (border - 2, 4, true),
        (BUFFERS + 100, 3, true),
    ]);
    let chain = served.pop(&ram).unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (6, 7));
    let mut reader = chain.reader();
    assert_eq!(&reader.read_array::<3>().unwrap(), b"abc");
    let mut first_of_rest = reader.take(1).unwrap();
    assert_eq!(&first_of_rest.read_array::<1>().unwrap(), b"d");
    assert_eq!(first_of_rest.remaining(), 0);
    assert_eq!(&reader.read_array::<3>().unwrap(), b"def");
    assert_eq!(reader.read_array::<1>(), Err(ShortBuffer));

    let (mut front, mut back) = chain.writer().split_at(5).unwrap();
    assert_eq!(back.address(), Some(GuestAddress(BUFFERS + 101)));
    front.write_all(b"12345").unwrap();
    assert_eq!(front.write_all(b"6"), Err(ShortBuffer));
    assert_eq!(back.write_all(b"678"), Err(ShortBuffer));
    back.write_all(b"67").unwrap();
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    assert_eq!(read(border - 2, 4), b"1234");
    assert_eq!(read(BUFFERS + 100, 3), b"567");
}

#[test]
fn empty_buffers_hold_nothing_but_keep_their_place_in_the_order() {
    let ram = ram();
    let (mut driver, mut served) = queue(&ram);
    driver.offer(&[(BUFFERS, 0, false), (BUFFERS, 8, true), (BUFFERS, 0, true)]);
    let chain = served.pop(&ram).unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (0, 8));
    assert_eq!(chain.reader().segments().count(), 0);
    assert_eq!(chain.writer().segments().count(), 1);
}

#[test]
fn a_readable_buffer_after_a_writable_one_breaks_the_rules() {
    for writable_len in [0, 8] {
        let ram = ram();
        let (mut driver, mut served) = queue(&ram);
        driver.offer(&[(BUFFERS, writable_len, true), (BUFFERS, 8, false)]);
        assert!(reason(served.pop(&ram)).contains("readable buffer follows"));
    }
}

#[test]
fn buffers_outside_ram_are_named() {
    for (address, len) in [(RAM_BYTES - 8, 16), (u64::MAX, 2), (RAM_BYTES, 1)] {
        let ram = ram();
        let (mut driver, mut served) = queue(&ram);
        driver.offer(&[(address, len, false)]);
        let reason = reason(served.pop(&ram));
        assert!(reason.contains(&format!("{address:#x}")), "{reason}");
    }
}

#[test]
fn a_chain_that_loops_or_leads_out_of_its_table_has_no_end() {
    for next in [0, SIZE, u16::MAX] {
        let ram = ram();
        let (mut driver, mut served) = queue(&ram);
        driver.descriptor(0, BUFFERS, 8, NEXT, 1);
        driver.descriptor(1, BUFFERS, 8, NEXT, next);
        driver.make_available(0);
        assert!(reason(served.pop(&ram)).contains("no end"), "{next}");
    }
}

#[test]
fn an_indirect_table_may_not_hold_more_descriptors_than_the_limit() {
    for (count, is_taken) in [(MAX_DESCRIPTORS, true), (MAX_DESCRIPTORS + 1, false)] {
        let ram = testing::ram(RAM_BYTES as usize);
        let (mut driver, mut served) = queue(&ram);
        let table = 0x8_0000;
        for index in 0..count as u64 {
            let next = if index + 1 < count as u64 { NEXT } else { 0 };
            let at = table + 16 * index;
            ram.write_obj(BUFFERS, GuestAddress(at)).unwrap();
            ram.write_obj(1_u32, GuestAddress(at + 8)).unwrap();
            let flags = [WRITE | next, index as u16 + 1];
            ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        }
        driver.descriptor(0, table, 16 * count as u32, INDIRECT, 0);
        driver.make_available(0);
        match is_taken {
            true => {
                let chain = served.pop(&ram).unwrap().unwrap();
                assert_eq!(chain.writable_len(), count);
            }
            false => assert!(reason(served.pop(&ram)).contains("more than")),
        }
    }
}

#[test]
fn one_chain_serves_many_requests() {
    let ram = ram();
    let (mut driver, mut served) = queue(&ram);
    let mut chain = DescriptorChain::new();
    for len in [8, 3] {
        let head = driver.offer(&[(BUFFERS, len, false), (BUFFERS, 2 * len, true)]);
        assert!(served.pop_into(&ram, &mut chain).unwrap());
        assert_eq!(chain.head(), head);
        assert_eq!(chain.readable_len(), len as usize);
        assert_eq!(chain.writable_len(), 2 * len as usize);
    }
    assert!(!served.pop_into(&ram, &mut chain).unwrap());
}

proptest! {
    #[test]
    fn a_sound_chain_holds_exactly_its_buffers(
        readable in prop::collection::vec(1_u32..300, 0..20),
        writable in prop::collection::vec(1_u32..300, 0..20),
        steps in prop::collection::vec(1_usize..200, 1..40),
    ) {
        prop_assume!(!readable.is_empty() || !writable.is_empty());
        let ram = ram();
        let (mut driver, mut served) = queue(&ram);
        let (mut buffers, mut content) = (Vec::new(), Vec::new());
        // Around the border of the two regions.
        let mut at = RAM_BYTES / 2 - 3000;
        for (lengths, is_writable) in [(&readable, false), (&writable, true)] {
            for &len in lengths {
                buffers.push((at, len, is_writable));
                // Never 0xEE, which is what is written below.
                let bytes: Vec<u8> = (0..len)
                    .map(|n| ((at + u64::from(n)) % 0xEE) as u8)
                    .collect();
                ram.write_slice(&bytes, GuestAddress(at)).unwrap();
                if !is_writable {
                    content.extend(bytes);
                }
                at += u64::from(len) + 7;
            }
        }
        driver.offer(&buffers);
        let chain = served.pop(&ram).unwrap().unwrap();
        // Reading in any steps gives the content, and no byte more.
        let mut reader = chain.reader();
        let mut read = Vec::new();
        for step in steps.iter().cycle() {
            let mut part = vec![0; (*step).min(reader.remaining())];
            reader.read_exact(&mut part).unwrap();
            read.extend(part);
            if reader.remaining() == 0 {
                break;
            }
        }
        prop_assert_eq!(read, content);
        // Writing fills the room, and no byte beside it.
        let mut writer = chain.writer();
        let room = writer.remaining();
        writer.write_all(&vec![0xEE; room]).unwrap();
        prop_assert_eq!(writer.write_all(&[0]), Err(ShortBuffer));
        for (address, len, is_writable) in buffers {
            let mut bytes = vec![0; len as usize + 7];
            ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            prop_assert_eq!(bytes[..len as usize].iter().all(|&b| b == 0xEE), is_writable);
            prop_assert!(bytes[len as usize..].iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn whatever_the_descriptors_are_a_chain_stays_in_ram(
        descriptors in prop::collection::vec(
            (
                prop_oneof![0_u64..RAM_BYTES + 64, any::<u64>()],
                prop_oneof![0_u32..5000, any::<u32>()],
                0_u16..8,
                0_u16..70,
            ),
            1..64,
        ),
        heads in prop::collection::vec(0_u16..70, 1..8),
    ) {
        let ram = ram();
        let (mut driver, mut served) = queue(&ram);
        for (&(address, len, flags, next), index) in descriptors.iter().zip(0..) {
            driver.descriptor(index, address, len, flags, next);
        }
        for head in heads {
            driver.make_available(head);
        }
        while let Ok(Some(chain)) = served.pop(&ram) {
            testing::check_chain(&ram, &chain);
        }
    }
}
