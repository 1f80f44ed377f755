//! The device under a driver made of plain memory, and a host that writes down what is released.

use std::io;

use super::queue::MAX_PAGES;
use super::*;
use crate::virtio::driver::Rig;
use crate::virtio::testing::ram;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINT: usize = 3;
const REPORT: usize = 4;

const RAM: usize = 16 << 20;
const AT: u64 = 0x10_0000;

#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<(u64, u64)>>>);

impl Notes {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl ReleaseRanges for Notes {
    fn release(&mut self, ranges: &[GuestRange]) -> io::Result<()> {
        let mut notes = self.0.lock().unwrap();
        notes.extend(ranges.iter().map(|range| (range.start.0, range.len)));
        Ok(())
    }
}

/// A host that cannot release anything.
struct Refuses;

impl ReleaseRanges for Refuses {
    fn release(&mut self, _ranges: &[GuestRange]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

fn rig() -> (Rig<Balloon>, Notes) {
    let notes = Notes::default();
    let device = Balloon::new(Box::new(notes.clone()), BalloonOffer::default()).unwrap();
    let without = 1 << VIRTIO_RING_F_EVENT_IDX;
    (Rig::new(device, ram(RAM), 64, without), notes)
}

fn offer_pages(rig: &mut Rig<Balloon>, queue: usize, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    rig.ram.write_slice(&bytes, GuestAddress(AT)).unwrap();
    rig.queues[queue].offer(&[(AT, bytes.len() as u32, false)]);
    rig.kick(queue as u16);
}

fn config(rig: &Rig<Balloon>) -> [u32; 4] {
    let mut bytes = [0; 16];
    rig.device(|shell| shell.device.read_config(0, &mut bytes));
    std::array::from_fn(|at| u32::from_le_bytes(bytes[4 * at..][..4].try_into().unwrap()))
}

#[test]
fn pages_in_the_balloon_are_released_in_runs() {
    let (mut rig, notes) = rig();
    offer_pages(&mut rig, INFLATE, &[0x203, 0x201, 0x202, 0x300, 0x202]);
    assert_eq!(rig.error(), None);
    assert_eq!(notes.take(), [(0x20_1000, 0x3000), (0x30_0000, 0x1000)]);
    assert_eq!(rig.queues[INFLATE].take_used(), Some((0, 0)));
    offer_pages(&mut rig, DEFLATE, &[0x203]);
    assert!(rig.queues[DEFLATE].take_used().is_some());
    assert_eq!(notes.take(), []);
}

#[test]
fn a_target_reaches_the_driver_and_its_answer_comes_back() {
    let (rig, _) = rig();
    let set = |bytes| rig.device(|shell| shell.device.set_target_bytes(bytes));
    assert_eq!(set(8 << 20), 8 << 20);
    assert_eq!(rig.interrupt.config_count(), 1);
    assert_eq!(config(&rig)[0], 2048);
    // The same again is no news.
    set((8 << 20) + 100);
    assert_eq!(rig.interrupt.config_count(), 1);
    // No guest can give more than it has.
    assert_eq!(set(u64::MAX), RAM as u64);
    rig.device(|shell| {
        shell.device.write_config(4, &[0, 1]);
        shell.device.write_config(6, &[0, 0]);
        // The target is not the driver's to change, nor is there anything far out.
        shell.device.write_config(0, &[9; 4]);
        shell.device.write_config(u64::MAX, &[9; 4]);
        assert_eq!(shell.device.actual_bytes(), 256 * 4096);
        assert_eq!(shell.device.target_bytes(), RAM as u64);
    });
}

#[test]
fn a_target_set_during_a_pause_is_told_afterwards() {
    let (rig, _) = rig();
    rig.pause();
    rig.device(|shell| shell.device.set_target_bytes(1 << 20));
    assert_eq!(rig.interrupt.config_count(), 0);
    rig.resume();
    assert_eq!(rig.interrupt.config_count(), 1);
}

fn offer_stats(rig: &mut Rig<Balloon>, free: u64) {
    let mut bytes = vec![4, 0];
    bytes.extend(free.to_le_bytes());
    rig.ram.write_slice(&bytes, GuestAddress(AT)).unwrap();
    rig.queues[STATS].offer(&[(AT, bytes.len() as u32, false)]);
    rig.kick(STATS as u16);
}

fn free_memory(rig: &Rig<Balloon>) -> Option<u64> {
    rig.device(|shell| shell.device.stats()?.0.free_memory)
}

#[test]
fn statistics_come_when_asked_for_and_only_then() {
    let (mut rig, _) = rig();
    assert_eq!(free_memory(&rig), None);
    offer_stats(&mut rig, 1000);
    assert_eq!(free_memory(&rig), Some(1000));
    // The buffer stays with the device until it wants more.
    assert_eq!(rig.queues[STATS].take_used(), None);
    rig.device(|shell| shell.device.refresh_stats()).unwrap();
    assert!(rig.queues[STATS].take_used().is_some());
    rig.device(|shell| shell.device.refresh_stats()).unwrap();
    assert_eq!(rig.queues[STATS].take_used(), None);
    offer_stats(&mut rig, 900);
    assert_eq!(free_memory(&rig), Some(900));
}

#[test]
fn an_interval_asks_for_statistics_again_and_again_until_it_is_zero() {
    let (mut rig, _) = rig();
    let every = |rig: &Rig<Balloon>, ms| {
        let interval = Duration::from_millis(ms);
        rig.device(|shell| shell.device.set_stats_interval(interval))
            .unwrap();
    };
    every(&rig, 5);
    for round in 0..3 {
        offer_stats(&mut rig, round);
        while rig.queues[STATS].take_used().is_none() {
            rig.wait();
        }
    }
    every(&rig, 0);
    offer_stats(&mut rig, 7);
    std::thread::sleep(Duration::from_millis(20));
    rig.run();
    assert_eq!(rig.queues[STATS].take_used(), None);
}

#[test]
fn reported_pages_are_released_whole_pages_only() {
    let (mut rig, notes) = rig();
    let report = &mut rig.queues[REPORT];
    report.offer(&[
        (0x40_0000, 0x20_0000, true),
        (0x20_0800, 0x1800, true),
        (0x20_2000, 0x10, true),
        (0x30_0001, 0xffe, true),
    ]);
    rig.kick(REPORT as u16);
    assert_eq!(rig.error(), None);
    assert_eq!(notes.take(), [(0x20_1000, 0x1000), (0x40_0000, 0x20_0000)]);
    assert_eq!(rig.queues[REPORT].take_used(), Some((0, 0)));
}

fn hint_command(rig: &mut Rig<Balloon>, command: u32) {
    rig.ram
        .write_slice(&command.to_le_bytes(), GuestAddress(AT))
        .unwrap();
    rig.queues[HINT].offer(&[(AT, 4, false)]);
    rig.kick(HINT as u16);
}

fn hint(rig: &mut Rig<Balloon>, start: u64) {
    rig.queues[HINT].offer(&[(start, 0x2000, true)]);
    rig.kick(HINT as u16);
}

#[test]
fn a_round_of_hinting_collects_what_belongs_to_it() {
    let (mut rig, _) = rig();
    let sink = Notes::default();
    hint(&mut rig, 0x20_0000);
    let start = |shell: &mut crate::virtio::driver::Shell<Balloon>| {
        shell.device.start_hinting(Box::new(sink.clone()))
    };
    assert!(rig.device(start));
    let round = config(&rig)[2];
    assert!(round >= FIRST_HINT_ROUND);
    // Late words of another round, and pages before the right one, are not taken.
    hint(&mut rig, 0x21_0000);
    hint_command(&mut rig, round + 1);
    hint(&mut rig, 0x22_0000);
    hint_command(&mut rig, round);
    hint(&mut rig, 0x23_0000);
    hint(&mut rig, 0x24_0000);
    let complete = |rig: &Rig<Balloon>| rig.device(|shell| shell.device.hinting_is_complete());
    assert!(!complete(&rig));
    hint_command(&mut rig, 0);
    assert!(complete(&rig));
    hint(&mut rig, 0x25_0000);
    assert_eq!(sink.take(), [(0x23_0000, 0x2000), (0x24_0000, 0x2000)]);
    rig.device(|shell| shell.device.stop_hinting());
    assert_eq!(config(&rig)[2], HINT_DONE);
    assert_eq!(rig.interrupt.config_count(), 2);
    assert!(rig.device(start));
    assert_eq!(config(&rig)[2], round + 1);
}

#[test]
fn a_restored_driver_gets_back_the_pages_it_held_for_a_snapshot() {
    let (mut old, _) = rig();
    assert!(old.device(|shell| shell.device.start_hinting(Box::new(Notes::default()))));
    let round = config(&old)[2];
    hint_command(&mut old, round);
    let (bytes, queues) = old.save();
    let mut device = Balloon::new(Box::new(Notes::default()), BalloonOffer::default()).unwrap();
    device.restore(&bytes).unwrap();
    let new = Rig::restored(device, &old, &queues);
    assert_eq!(config(&new)[2], HINT_DONE);
    assert_eq!(new.interrupt.config_count(), 1);
    assert!(new.device(|shell| shell.device.start_hinting(Box::new(Notes::default()))));
    assert_eq!(config(&new)[2], round + 1);
}

#[test]
fn a_restored_balloon_goes_on_where_it_stopped() {
    let (mut old, _) = rig();
    offer_stats(&mut old, 1);
    old.device(|shell| {
        shell.device.set_target_bytes(4 << 20);
        shell.device.write_config(4, &7_u32.to_le_bytes());
    });
    let (bytes, queues) = {
        // A request is queued, but its kick is lost in the save.
        old.ram
            .write_slice(&0x200_u32.to_le_bytes(), GuestAddress(AT))
            .unwrap();
        old.queues[INFLATE].offer(&[(AT, 4, false)]);
        old.save()
    };
    old.kick(INFLATE as u16);
    assert_eq!(old.queues[INFLATE].take_used(), None, "served while paused");
    let notes = Notes::default();
    let mut device = Balloon::new(Box::new(notes.clone()), BalloonOffer::default()).unwrap();
    device.restore(&bytes).unwrap();
    let mut new = Rig::restored(device, &old, &queues);
    assert_eq!(notes.take(), [(0x20_0000, 0x1000)]);
    assert_eq!(config(&new)[..2], [1024, 7]);
    // The statistics buffer that the parent held can still be given back.
    new.device(|shell| shell.device.refresh_stats()).unwrap();
    assert!(new.queues[STATS].take_used().is_some());
}

#[test]
fn a_reset_forgets_the_driver_but_not_the_target() {
    let (mut rig, _) = rig();
    offer_stats(&mut rig, 1);
    rig.device(|shell| {
        shell.device.set_target_bytes(1 << 20);
        shell.device.write_config(4, &[1, 0, 0, 0]);
        shell.device.reset();
    });
    rig.activate_again();
    assert_eq!(config(&rig), [256, 0, 0, 0]);
    rig.device(|shell| shell.device.refresh_stats()).unwrap();
    assert_eq!(rig.queues[STATS].take_used(), None);
}

#[test]
fn a_driver_without_hinting_numbers_its_queues_without_a_gap() {
    let notes = Notes::default();
    let device = Balloon::new(Box::new(notes.clone()), BalloonOffer::default()).unwrap();
    let mut rig = Rig::with_driver_queues(device, ram(RAM), 64, F_HINT, 4);
    assert_eq!(rig.error(), None);
    rig.queues[HINT].offer(&[(0x20_0000, 0x1000, true)]);
    rig.kick(HINT as u16);
    assert_eq!(notes.take(), [(0x20_0000, 0x1000)]);
    assert!(!rig.device(|shell| shell.device.start_hinting(Box::new(Notes::default()))));
}

#[test]
fn a_host_that_cannot_release_breaks_the_device_loudly() {
    let device = Balloon::new(Box::new(Refuses), BalloonOffer::default()).unwrap();
    let mut rig = Rig::new(device, ram(RAM), 64, 0);
    offer_pages(&mut rig, INFLATE, &[0x200]);
    assert!(rig.error().unwrap().contains("release"));
}

#[test]
fn pages_outside_ram_break_the_device_and_release_nothing() {
    let last = (RAM / 4096) as u32;
    for bad in [&[last][..], &[0x200, u32::MAX], &[last - 1, last], &[]] {
        for queue in [INFLATE, DEFLATE] {
            let (mut rig, notes) = rig();
            offer_pages(&mut rig, queue, bad);
            assert!(rig.error().is_some(), "{bad:?}");
            assert_eq!(notes.take(), []);
        }
    }
    let (mut rig, _) = rig();
    offer_pages(&mut rig, INFLATE, &[last - 1]);
    assert_eq!(rig.error(), None);
}

#[test]
fn buffers_that_are_no_request_break_the_device() {
    for (queue, bad) in [
        (INFLATE, &[(AT, 6, false)][..]),
        (INFLATE, &[(AT, 4, true)]),
        (INFLATE, &[(AT, (MAX_LIST + 4) as u32, false)]),
        (REPORT, &[(RAM as u64 - 0x1000, 0x2000, true)]),
        (REPORT, &[(u64::MAX - 0xfff, 0x1000, true)]),
        (HINT, &[(RAM as u64, 0x1000, true)]),
    ] {
        let (mut rig, notes) = rig();
        rig.queues[queue].offer(bad);
        rig.kick(queue as u16);
        assert!(rig.error().is_some(), "{queue} {bad:?}");
        assert_eq!(notes.take(), []);
    }
}

/// Bytes of the longest list of pages.
const MAX_LIST: usize = 1 << 20;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_descriptor_chain_panics_the_device_or_releases_what_is_not_ram(
        descriptors in prop::collection::vec((0_u64..(RAM as u64 + 0x1000), prop_oneof![0_u32..5000, any::<u32>()], 0_u16..8, 0_u16..70), 1..64),
        heads in prop::collection::vec(0_u16..70, 1..64),
        queue in 0_usize..5,
    ) {
        let (mut rig, notes) = rig();
        rig.device(|shell| shell.device.start_hinting(Box::new(notes.clone())));
        let round = config(&rig)[2];
        hint_command(&mut rig, round);
        for (&(address, len, flags, next), index) in descriptors.iter().zip(0..) {
            rig.queues[queue].descriptor(index, address, len, flags, next);
        }
        for head in heads {
            rig.queues[queue].make_available(head);
        }
        rig.kick(queue as u16);
        for (start, len) in notes.take() {
            prop_assert!(len > 0 && start % PAGE == 0 && len % PAGE == 0);
            prop_assert!(start + len <= RAM as u64);
        }
    }

    #[test]
    fn any_list_of_pages_is_released_exactly(pages in prop::collection::vec(0_u32..4096, 1..300)) {
        let (mut rig, notes) = rig();
        offer_pages(&mut rig, INFLATE, &pages);
        let mut expected = pages.clone();
        expected.sort_unstable();
        expected.dedup();
        let runs = notes.take();
        let released: Vec<u32> = runs
            .iter()
            .flat_map(|&(start, len)| (start / PAGE) as u32..((start + len) / PAGE) as u32)
            .collect();
        prop_assert_eq!(released, expected);
        for pair in runs.windows(2) {
            prop_assert!(pair[0].0 + pair[0].1 < pair[1].0, "runs touch");
        }
    }
}

/// The requests of `queue` that one call gives back.
fn given_back_in_one_call(rig: &mut Rig<Balloon>, queue: usize) -> usize {
    rig.device(|shell| shell.device.notify_queue(queue as u16))
        .unwrap();
    let used = &mut rig.queues[queue];
    std::iter::from_fn(|| used.take_used()).count()
}

#[test]
fn long_lists_of_pages_give_others_their_turn() {
    let (mut rig, notes) = rig();
    // All the same page, which the guest may name as often as it likes.
    let bytes = vec![0; MAX_PAGES * 4];
    rig.ram.write_slice(&bytes, GuestAddress(AT)).unwrap();
    for queue in [INFLATE, DEFLATE] {
        for _ in 0..10 {
            rig.queues[queue].offer(&[(AT, bytes.len() as u32, false)]);
        }
        assert_eq!(given_back_in_one_call(&mut rig, queue), 4);
        rig.run();
        let used = &mut rig.queues[queue];
        assert_eq!(std::iter::from_fn(|| used.take_used()).count(), 6);
    }
    assert_eq!(notes.take().len(), 10);
}

#[test]
fn a_list_longer_than_any_driver_makes_breaks_the_device() {
    let (mut rig, _) = rig();
    let bytes = (MAX_PAGES + 1) * 4;
    rig.queues[INFLATE].offer(&[(AT, bytes as u32, false)]);
    rig.kick(INFLATE as u16);
    assert!(rig.error().is_some());
}

#[test]
fn large_reports_give_others_their_turn() {
    let (mut rig, notes) = rig();
    for _ in 0..40 {
        rig.queues[REPORT].offer(&[(0, RAM as u32, true)]);
    }
    assert_eq!(given_back_in_one_call(&mut rig, REPORT), 16);
    rig.run();
    assert_eq!(notes.take().len(), 40);
}

#[test]
fn a_report_of_more_memory_than_any_driver_reports_breaks_the_device() {
    let (mut rig, _) = rig();
    let all = vec![(0, RAM as u32, true); 63];
    rig.queues[REPORT].offer(&all);
    rig.kick(REPORT as u16);
    assert_eq!(rig.error(), None);
    // 1,008 MiB are less than the limit; a second list in one chain is more.
    let table: Vec<u8> = (0..80_u16)
        .flat_map(|index| {
            let flags: u16 = if index == 79 { 2 } else { 3 };
            let mut entry = 0_u64.to_le_bytes().to_vec();
            entry.extend((RAM as u32).to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry.extend((index + 1).to_le_bytes());
            entry
        })
        .collect();
    rig.ram.write_slice(&table, GuestAddress(AT)).unwrap();
    rig.queues[REPORT].descriptor(0, AT, table.len() as u32, 4, 0);
    rig.queues[REPORT].make_available(0);
    rig.kick(REPORT as u16);
    assert!(rig.error().is_some());
}
