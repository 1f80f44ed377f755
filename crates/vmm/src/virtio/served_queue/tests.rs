//! The loop over a queue's requests, with a driver of plain memory.

use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::rate_limit::{Rate, RateLimits};
use crate::virtio::driver::DriverQueue;
use crate::virtio::testing::{CountingInterrupt, ram};

const BUFFER: u64 = 0x8000;

struct Rig {
    ram: GuestRam,
    driver: DriverQueue,
    queue: ServedQueue,
    interrupt: CountingInterrupt,
    budget: Budget,
}

impl Rig {
    /// A queue with `requests` waiting, and a call that may serve `budget` of them.
    fn new(requests: usize, budget: usize) -> Self {
        let ram = ram(1 << 16);
        let mut driver = DriverQueue::new(&ram, 0, 64);
        for _ in 0..requests {
            driver.offer(&[(BUFFER, 8, true)]);
        }
        let active = ActiveQueue {
            index: 3,
            queue: driver.device_side(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        Self {
            queue: ServedQueue::new(DeviceName::new("test"), active, true),
            ram,
            driver,
            interrupt: CountingInterrupt::default(),
            budget: Budget::new(budget, u64::MAX),
        }
    }

    fn serve(&mut self, mut outcome: impl FnMut(usize) -> Served) -> Stopped {
        let mut count = 0;
        let mut handler = |_: &mut ServedQueue, _: &mut DescriptorChain<'_>| {
            count += 1;
            Ok(outcome(count))
        };
        let mut turn = Turn::new(&mut self.budget);
        self.queue
            .serve(&self.ram, &self.interrupt, &mut turn, &mut handler)
            .unwrap()
    }

    fn used(&mut self) -> usize {
        std::iter::from_fn(|| self.driver.take_used()).count()
    }

    fn is_requeued(&self) -> bool {
        self.queue.kick().read().is_ok()
    }
}

const USED: Served = Served::Used {
    written: 8,
    bytes: 8,
};

#[test]
fn an_empty_queue_asks_for_a_notification_and_interrupts_once_for_all() {
    let mut rig = Rig::new(5, 100);
    assert_eq!(rig.serve(|_| USED), Stopped::Empty);
    assert_eq!(rig.used(), 5);
    assert_eq!(rig.interrupt.queue_count(), 1);
    assert_eq!(rig.driver.avail_event(), 5);
    assert!(!rig.is_requeued());
    assert_eq!(rig.serve(|_| USED), Stopped::Empty);
    assert_eq!(rig.interrupt.queue_count(), 1, "nothing was used since");
}

#[test]
fn a_spent_budget_requeues_the_queue_and_leaves_the_rest() {
    let mut rig = Rig::new(5, 3);
    assert_eq!(rig.serve(|_| USED), Stopped::Budget);
    assert!(rig.is_requeued());
    assert_eq!(rig.used(), 3);
    rig.budget = Budget::new(100, u64::MAX);
    assert_eq!(rig.serve(|_| USED), Stopped::Empty);
    assert_eq!(rig.used(), 2);
}

#[test]
fn a_request_that_is_blocked_is_the_next_one_again() {
    let mut rig = Rig::new(3, 100);
    let outcome = |count| if count == 2 { Served::Blocked } else { USED };
    assert_eq!(rig.serve(outcome), Stopped::Blocked);
    assert_eq!(rig.used(), 1);
    assert!(!rig.is_requeued());
    assert_eq!(rig.serve(|_| USED), Stopped::Empty);
    assert_eq!(rig.used(), 2);
}

#[test]
fn a_request_that_is_returned_or_kept_is_not_given_back() {
    let mut rig = Rig::new(2, 100);
    let outcome = |count| match count {
        1 => Served::Returned,
        _ => Served::Kept { bytes: 1 },
    };
    assert_eq!(rig.serve(outcome), Stopped::Empty);
    assert_eq!(rig.used(), 0);
    assert_eq!(rig.interrupt.queue_count(), 0);
    for head in [0, 1] {
        rig.queue.push_used(&rig.ram, head, 0).unwrap();
    }
    rig.queue.signal(&rig.ram, &rig.interrupt).unwrap();
    assert_eq!(rig.used(), 2);
    assert_eq!(rig.interrupt.queue_count(), 1);
}

#[test]
fn a_handler_that_always_returns_requests_spends_its_budget() {
    let mut rig = Rig::new(1, 50);
    assert_eq!(rig.serve(|_| Served::Returned), Stopped::Budget);
}

#[test]
fn a_rate_limit_stops_the_loop_before_the_next_request() {
    let mut rig = Rig::new(5, 100);
    let limits = RateLimits {
        operations: Some(Rate {
            per_second: 1,
            burst: 2,
        }),
        ..RateLimits::default()
    };
    let mut limiter = RateLimiter::new(limits, Instant::now()).unwrap();
    let mut handler = |_: &mut ServedQueue, _: &mut DescriptorChain<'_>| Ok(USED);
    let mut turn = Turn {
        budget: &mut rig.budget,
        limit: limiter.as_mut(),
    };
    let stopped = rig
        .queue
        .serve(&rig.ram, &rig.interrupt, &mut turn, &mut handler);
    assert_eq!(stopped.unwrap(), Stopped::Limited);
    // The time that passes meanwhile may let one more pass.
    assert!((2..=3).contains(&rig.used()));
}

#[test]
fn an_error_names_the_device_and_the_queue() {
    let mut rig = Rig::new(0, 100);
    rig.driver.offer(&[(1 << 20, 8, true)]);
    let error = rig.queue.pop(&rig.ram).unwrap_err().to_string();
    assert!(error.contains("test device"), "{error}");
    assert!(error.contains("queue 3"), "{error}");
}
