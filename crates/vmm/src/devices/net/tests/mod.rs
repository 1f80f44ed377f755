//! The device through the door that its transport uses, with plain memory and sockets for taps.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use linux_raw_sys::if_tun::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_USO4};
use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::queue::MAX_FRAME;
use super::testing::{DriverQueue, INDIRECT, NEXT, PortSettings, SocketPort, WRITE};
use super::*;
use crate::event_loop::{EventHandler, EventLoop, Registrar};
use crate::rate_limit::{Rate, RateLimits};
use crate::virtio::testing::{CountingInterrupt, ram};
use crate::virtio::{Activation, ActiveQueue, GuestRam, Lifecycle, RunState, VirtioDevice};

mod control;
mod hostile;
mod lifecycle;
mod limits;

const RAM: usize = 4 << 20;
const RINGS: u64 = 0x10_0000;
const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const MERGE: u64 = VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;

fn config(queue_pairs: u16) -> NetConfig {
    NetConfig {
        mac: MAC,
        mtu: Some(1400),
        queue_pairs,
        limits: RateLimits::default(),
    }
}

/// The device as the event loop's handler, in the transport's place.
struct Handler {
    device: Net,
    failure: Option<DeviceError>,
    life: Lifecycle,
}

impl EventHandler for Handler {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        let result = self.life.handle_event(&mut self.device, token, ready);
        if let Err(error) = result {
            self.failure = Some(error);
        }
    }
}

/// A device with its driver, its far ends, and an event loop.
struct Rig {
    ram: GuestRam,
    handler: Arc<Mutex<Handler>>,
    events: EventLoop,
    registrar: Registrar,
    queues: Vec<DriverQueue>,
    kicks: Vec<EventFd>,
    wires: Vec<File>,
    settings: Vec<Arc<PortSettings>>,
    interrupt: Arc<CountingInterrupt>,
    features: u64,
}

impl Rig {
    fn new(features: u64, pairs: u16) -> Self {
        Self::with_config(features, pairs, config(pairs))
    }

    fn with_config(features: u64, pairs: u16, config: NetConfig) -> Self {
        let mut ports: Vec<Box<dyn Port>> = Vec::new();
        let (mut wires, mut settings) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let (port, wire, questions) = SocketPort::pair().unwrap();
            ports.push(Box::new(port));
            wires.push(wire);
            settings.push(questions);
        }
        let vhost = Vec::new();
        let device = Net::new(NetResources { ports, vhost }, config).unwrap();
        let ram = ram(RAM);
        let event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let queues = (0..u64::from(pairs) * 2 + 1)
            .map(|n| DriverQueue::new(&ram, RINGS + n * 0x8000, 256, event_idx))
            .collect();
        let mut events = EventLoop::new().unwrap();
        let registrar = events.reserve();
        let handler = Arc::new(Mutex::new(Handler {
            device,
            failure: None,
            life: Lifecycle::new(),
        }));
        events.attach(&registrar, handler.clone());
        Self {
            ram,
            handler,
            events,
            registrar,
            queues,
            kicks: Vec::new(),
            wires,
            settings,
            interrupt: CountingInterrupt::shared(),
            features,
        }
    }

    fn active(features: u64, pairs: u16) -> Self {
        let mut rig = Self::new(features, pairs);
        rig.activate().unwrap();
        rig
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let (queues, kicks) = (0..)
            .zip(&self.queues)
            .map(|(index, queue)| queue.activate(index))
            .unzip();
        self.kicks = kicks;
        self.activate_with(queues)
    }

    fn activate_with(&mut self, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        let activation = Activation {
            ram: self.ram.clone(),
            queues,
            features: self.features,
            interrupt: self.interrupt.clone(),
            run_state: RunState::default(),
            events: self.registrar.clone(),
        };
        let mut handler = self.handler.lock().unwrap();
        let Handler { device, life, .. } = &mut *handler;
        life.activate(device, activation)
    }

    fn device<R>(&self, act: impl FnOnce(&mut Net) -> R) -> R {
        act(&mut self.handler.lock().unwrap().device)
    }

    fn kick(&self, queue: usize) -> Result<(), DeviceError> {
        let mut handler = self.handler.lock().unwrap();
        let Handler { device, life, .. } = &mut *handler;
        life.notify_queue(device, queue as u16)
    }

    fn pause(&self) {
        let mut handler = self.handler.lock().unwrap();
        let Handler { device, life, .. } = &mut *handler;
        life.pause(device).unwrap();
    }

    fn resume(&self) {
        let mut handler = self.handler.lock().unwrap();
        let Handler { device, life, .. } = &mut *handler;
        life.resume(device).unwrap();
    }

    /// Runs the loop until nothing is ready.
    fn settle(&mut self) {
        for _ in 0..100 {
            if self.events.run_once(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop spins");
    }

    /// A frame (header and body) arrives from the network.
    fn arrive(&mut self, pair: usize, body: &[u8]) {
        let mut frame = vec![0xaa; 12];
        frame.extend_from_slice(body);
        self.wires[pair].write_all(&frame).unwrap();
        self.settle();
    }

    fn counts(&self) -> NetCounts {
        self.device(|device| device.handle().counts())
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Sends a control command and returns the device's answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.write(0x8000, bytes);
        self.write(0x9000, &[0xee]);
        let control = self.queues.len() - 1;
        self.queues[control].add(&[(0x8000, bytes.len() as u32, 0), (0x9000, 1, WRITE)]);
        self.kick(control).unwrap();
        assert_eq!(self.queues[control].take_used().len(), 1);
        self.read(0x9000, 1)[0]
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 % 251) as u8).collect()
}

const MULTI: u64 = MERGE | 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;

#[test]
fn a_frame_arrives_whole_with_one_buffer_counted() {
    for features in [VERSION_1, MERGE] {
        let mut rig = Rig::active(features, 1);
        let head = rig.queues[RX].add(&[(0x1000, 8, WRITE), (0x2000, 2000, WRITE)]);
        rig.kick(RX).unwrap();
        let body = pattern(60);
        rig.arrive(0, &body);
        assert_eq!(rig.queues[RX].take_used(), [(head, 72)]);
        // The header lies across two buffers.
        assert_eq!(rig.read(0x1000, 8), [0xaa; 8]);
        assert_eq!(rig.read(0x2000, 4), [0xaa, 0xaa, 1, 0]);
        assert_eq!(rig.read(0x2004, 60), body);
        assert_eq!(rig.interrupt.queue_count(), 1);
        assert_eq!(rig.counts().rx_bytes, 60);
    }
}

#[test]
fn a_long_frame_is_spread_over_merged_buffers_at_first_and_ever_after() {
    let mut rig = Rig::active(MERGE, 1);
    let body = pattern(4000);
    for _ in 0..3 {
        for number in 0..5 {
            rig.queues[RX].add(&[(0x1000 + number * 0x1000, 1500, WRITE)]);
        }
        rig.kick(RX).unwrap();
        rig.arrive(0, &body);
        let used = rig.queues[RX].take_used();
        let lengths: Vec<u32> = used.iter().map(|used| used.1).collect();
        assert_eq!(lengths, [1500, 1500, 1012]);
        // Two buffers were left over; use them up with small frames.
        rig.arrive(0, &[1; 60]);
        rig.arrive(0, &[1; 60]);
        assert_eq!(rig.queues[RX].take_used().len(), 2);
    }
    // A last one, looked at byte for byte.
    for number in 0..3 {
        rig.queues[RX].add(&[(0x1000 + number * 0x1000, 1500, WRITE)]);
    }
    rig.kick(RX).unwrap();
    rig.arrive(0, &body);
    assert_eq!(rig.read(0x100a, 2), [3, 0]);
    let mut seen = rig.read(0x100c, 1488);
    seen.extend(rig.read(0x2000, 1500));
    seen.extend(rig.read(0x3000, 1012));
    assert_eq!(seen, body);
}

#[test]
fn a_frame_without_room_is_dropped_and_its_buffers_serve_the_next() {
    let mut rig = Rig::active(VERSION_1, 1);
    let head = rig.queues[RX].add(&[(0x1000, 200, WRITE)]);
    rig.kick(RX).unwrap();
    rig.arrive(0, &pattern(1000));
    assert!(rig.queues[RX].take_used().is_empty());
    assert_eq!(rig.counts().rx_dropped, 1);
    rig.arrive(0, &pattern(100));
    assert_eq!(rig.queues[RX].take_used(), [(head, 112)]);

    let mut rig = Rig::active(MERGE, 1);
    rig.queues[RX].add(&[(0x1000, 200, WRITE)]);
    rig.queues[RX].add(&[(0x2000, 200, WRITE)]);
    rig.kick(RX).unwrap();
    rig.arrive(0, &pattern(1000));
    assert_eq!(rig.counts().rx_dropped, 1);
    rig.arrive(0, &pattern(300));
    assert_eq!(rig.queues[RX].take_used(), [(0, 200), (1, 112)]);
}

#[test]
fn frames_wait_in_the_tap_until_the_guest_adds_buffers() {
    let mut rig = Rig::active(MERGE, 1);
    // `settle` would panic if the loop spun on the readable tap.
    rig.arrive(0, &pattern(100));
    assert!(rig.queues[RX].take_used().is_empty());
    let head = rig.queues[RX].add(&[(0x1000, 2000, WRITE)]);
    rig.kick(RX).unwrap();
    assert_eq!(rig.queues[RX].take_used(), [(head, 112)]);
    assert_eq!(rig.counts().rx_dropped, 0);
}

#[test]
fn sent_frames_leave_whole_also_from_indirect_tables() {
    let mut rig = Rig::active(MERGE, 1);
    let frame = pattern(1200);
    rig.write(0x1000, &frame[..700]);
    rig.write(0x3000, &frame[700..]);
    rig.queues[TX].add(&[(0x1000, 700, 0), (0x3000, 500, 0)]);
    for (slot, (address, len, flags)) in [(0x1000, 700, NEXT), (0x3000, 500, 0)]
        .into_iter()
        .enumerate()
    {
        let descriptor = virtio_queue::desc::split::Descriptor::new(address, len, flags, 1);
        let at = GuestAddress(0x4000 + 16 * slot as u64);
        rig.ram.write_obj(descriptor, at).unwrap();
    }
    rig.queues[TX].add(&[(0x4000, 32, INDIRECT)]);
    rig.kick(TX).unwrap();
    for _ in 0..2 {
        let mut seen = vec![0; 4000];
        let len = rig.wires[0].read(&mut seen).unwrap();
        assert_eq!(&seen[..len], frame);
    }
    assert_eq!(rig.queues[TX].take_used(), [(0, 0), (2, 0)]);
    assert_eq!(rig.counts().tx_frames, 2);
    assert_eq!(rig.counts().tx_bytes, 2 * 1188);
}

#[test]
fn a_full_tap_is_waited_for_and_loses_nothing() {
    let mut rig = Rig::active(MERGE, 1);
    rig.write(0x1000, &pattern(60_000));
    let sent = 60;
    for _ in 0..sent {
        rig.queues[TX].add(&[(0x1000, 60_000, 0)]);
    }
    rig.kick(TX).unwrap();
    assert!(rig.queues[TX].take_used().len() < sent);
    let mut buffer = vec![0; 65_536];
    let mut seen = 0;
    while seen < sent {
        assert_eq!(rig.wires[0].read(&mut buffer).unwrap(), 60_000);
        seen += 1;
        rig.settle();
    }
    assert_eq!(rig.counts().tx_frames, sent as u64);
    assert_eq!(rig.counts().tx_dropped, 0);
}

#[test]
fn work_over_the_budget_is_taken_up_again_by_a_kick() {
    let mut rig = Rig::active(MERGE, 1);
    let _ = rig.kicks[TX].read();
    rig.write(0x1000, &pattern(100));
    for _ in 0..200 {
        rig.queues[TX].add(&[(0x1000, 100, 0)]);
    }
    rig.kick(TX).unwrap();
    assert_eq!(rig.queues[TX].take_used().len(), 128);
    rig.kicks[TX].read().expect("the device kicked itself");
    rig.kick(TX).unwrap();
    assert_eq!(rig.queues[TX].take_used().len(), 72);
    rig.kicks[TX].read().expect_err("there was no more to do");
}

#[test]
fn the_guest_is_interrupted_only_where_it_asked() {
    let mut rig = Rig::active(MERGE | 1 << VIRTIO_RING_F_EVENT_IDX, 1);
    rig.queues[TX].set_used_event(2);
    for (sent, interrupts) in [(2, 0), (1, 1), (1, 1)] {
        for _ in 0..sent {
            rig.queues[TX].add(&[(0x1000, 100, 0)]);
        }
        rig.kick(TX).unwrap();
        assert_eq!(rig.interrupt.queue_count(), interrupts);
    }
}
