//! The device through the door that its transport uses, with plain memory and sockets for taps.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use linux_raw_sys::if_tun::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_USO4};
use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::queue::MAX_FRAME;
use super::testing::{Asked, DriverQueue, INDIRECT, NEXT, SocketPort, WRITE};
use super::*;
use crate::event_loop::{EventHandler, EventLoop, Registrar};
use crate::virtio::testing::{CountingInterrupt, ram};
use crate::virtio::{Activation, GuestRam, VirtioDevice};

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
    }
}

/// The device as the event loop's handler, in the transport's place.
struct Handler {
    device: Net,
    failure: Option<DeviceError>,
}

impl EventHandler for Handler {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        if let Err(error) = self.device.handle_event(token, ready) {
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
    asked: Vec<Arc<Asked>>,
    interrupt: Arc<CountingInterrupt>,
    features: u64,
}

impl Rig {
    fn new(features: u64, pairs: u16) -> Self {
        Self::with_state(features, pairs, NetState::fresh(config(pairs)))
    }

    fn with_state(features: u64, pairs: u16, state: NetState) -> Self {
        let mut ports: Vec<Box<dyn Port>> = Vec::new();
        let (mut wires, mut asked) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let (port, wire, questions) = SocketPort::pair().unwrap();
            ports.push(Box::new(port));
            wires.push(wire);
            asked.push(questions);
        }
        let vhost = Vec::new();
        let device = Net::new(NetResources { ports, vhost }, state).unwrap();
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
            asked,
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
            events: self.registrar.clone(),
        };
        self.handler.lock().unwrap().device.activate(activation)
    }

    fn device<R>(&self, act: impl FnOnce(&mut Net) -> R) -> R {
        act(&mut self.handler.lock().unwrap().device)
    }

    fn kick(&self, queue: usize) -> Result<(), DeviceError> {
        self.device(|device| device.notify_queue(queue as u16))
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

#[test]
fn a_frame_longer_than_any_link_is_dropped() {
    let mut rig = Rig::active(MERGE, 1);
    rig.queues[TX].add(&[(0, MAX_FRAME as u32 + 1, 0)]);
    rig.kick(TX).unwrap();
    assert_eq!(rig.queues[TX].take_used(), [(0, 0)]);
    assert_eq!(rig.counts().tx_dropped, 1);
}

/// Every way to break a data queue: what the driver does, and to which queue.
#[test]
fn a_hostile_driver_breaks_its_device_and_nothing_else() {
    type Attack = fn(&mut DriverQueue, u16);
    let attacks: [(&str, Attack); 7] = [
        ("a loop", |queue, flags| {
            queue.write_descriptor(0, 0x1000, 64, flags | NEXT, 1);
            queue.write_descriptor(1, 0x1000, 64, flags | NEXT, 0);
            queue.offer(0);
        }),
        ("a next outside the table", |queue, flags| {
            queue.write_descriptor(0, 0x1000, 64, flags | NEXT, 999);
            queue.offer(0);
        }),
        ("a head outside the table", |queue, _| queue.offer(256)),
        ("a buffer outside RAM", |queue, flags| {
            queue.add(&[(RAM as u64 - 10, 64, flags)]);
        }),
        ("a huge buffer", |queue, flags| {
            queue.add(&[(0x1000, u32::MAX, flags)]);
        }),
        ("the wrong direction", |queue, flags| {
            queue.add(&[(0x1000, 64, flags ^ WRITE)]);
        }),
        ("less than a header", |queue, flags| {
            queue.add(&[(0x1000, 11, flags)]);
        }),
    ];
    for (what, attack) in attacks {
        for (index, flags) in [(RX, WRITE), (TX, 0)] {
            let mut rig = Rig::active(MERGE, 1);
            attack(&mut rig.queues[index], flags);
            let error = rig.kick(index).expect_err(what);
            assert!(
                matches!(error, DeviceError::Driver { .. }),
                "{what}: {error}"
            );
            // It no longer waits for anything, and a reset brings it back.
            rig.arrive(0, &pattern(60));
            rig.device(VirtioDevice::reset);
            rig.activate().unwrap();
        }
    }
}

#[test]
fn a_jump_of_the_available_index_breaks_the_device() {
    let rig = Rig::active(MERGE, 1);
    rig.queues[TX].set_avail_index(300);
    let error = rig.kick(TX).unwrap_err();
    assert!(
        matches!(error, DeviceError::Queue { queue: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_tap_that_goes_away_breaks_the_device_without_spinning() {
    let mut rig = Rig::active(MERGE, 1);
    rig.wires.clear();
    rig.settle();
    let failure = rig.handler.lock().unwrap().failure.take();
    assert!(
        matches!(failure, Some(DeviceError::Host { .. })),
        "{failure:?}"
    );
}

#[test]
fn the_configuration_space_tells_address_link_pairs_and_mtu() {
    let rig = Rig::new(MERGE, 3);
    let mut bytes = [0xff; 16];
    rig.device(|device| device.read_config(0, &mut bytes));
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0x78, 5, 0, 0, 0, 0]);
    let mut past = [0xff; 4];
    rig.device(|device| device.read_config(u64::MAX - 1, &mut past));
    assert_eq!(past, [0; 4]);
}

#[test]
fn unplugging_stops_traffic_and_tells_the_guest() {
    let mut rig = Rig::active(MERGE, 1);
    rig.queues[RX].add(&[(0x1000, 2000, WRITE)]);
    let handle = rig.device(|device| device.handle());
    handle.set_link(false).unwrap();
    rig.settle();
    assert_eq!(rig.interrupt.config_count(), 1);
    let mut status = [0xff; 2];
    rig.device(|device| device.read_config(6, &mut status));
    assert_eq!(status, [0, 0]);
    rig.arrive(0, &pattern(60));
    rig.kick(RX).unwrap();
    assert!(rig.queues[RX].take_used().is_empty());
    handle.set_link(true).unwrap();
    rig.settle();
    assert_eq!(rig.interrupt.config_count(), 2);
    assert_eq!(rig.queues[RX].take_used().len(), 1);
}

const MULTI: u64 = MERGE | 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;

#[test]
fn queue_pairs_join_and_leave_as_the_driver_says() {
    let mut rig = Rig::active(MULTI, 3);
    let attached =
        |rig: &Rig| -> Vec<bool> { rig.asked.iter().map(|asked| asked.attached()).collect() };
    assert_eq!(attached(&rig), [true, false, false]);
    assert_eq!(rig.command(&[4, 0, 3, 0]), 0);
    assert_eq!(attached(&rig), [true, true, true]);
    let head = rig.queues[4].add(&[(0x1000, 2000, WRITE)]);
    rig.arrive(2, &pattern(60));
    rig.kick(4).unwrap();
    assert_eq!(rig.queues[4].take_used(), [(head, 72)]);
    assert_eq!(rig.command(&[4, 0, 2, 0]), 0);
    assert_eq!(attached(&rig), [true, true, false]);
    for wrong in [0, 4, 255] {
        assert_eq!(rig.command(&[4, 0, wrong, 0]), 1);
    }
    assert_eq!(attached(&rig), [true, true, false]);
}

#[test]
fn the_control_queue_follows_the_first_pair_where_multiqueue_was_not_agreed_on() {
    let mut rig = Rig::new(MERGE | 1 << VIRTIO_NET_F_CTRL_VQ, 3);
    rig.queues.truncate(3);
    rig.activate().unwrap();
    assert_eq!(rig.command(&[3, 0]), 0);
}

#[test]
fn unknown_and_short_commands_are_refused() {
    let mut rig = Rig::active(MULTI, 1);
    for command in [
        &[9, 9][..],
        &[4],
        &[4, 0, 1],
        &[5, 0, 1, 2, 3],
        &[4, 1, 1, 0],
    ] {
        assert_eq!(rig.command(command), 1, "{command:?}");
    }
}

#[test]
fn a_command_without_room_for_its_answer_breaks_the_device() {
    let mut rig = Rig::active(MULTI, 1);
    rig.queues[2].add(&[(0x8000, 4, 0)]);
    let error = rig.kick(2).unwrap_err();
    assert!(matches!(error, DeviceError::Driver { .. }), "{error}");
}

#[test]
fn the_tap_offloads_what_the_guest_takes_and_no_more() {
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let tso4 = 1 << VIRTIO_NET_F_GUEST_TSO4;
    let mut rig = Rig::active(
        MULTI | csum | tso4 | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        1,
    );
    assert_eq!(rig.asked[0].offloads(), TUN_F_CSUM | TUN_F_TSO4);
    let mut command = vec![5, 0];
    command.extend(u64::to_le_bytes(csum));
    assert_eq!(rig.command(&command), 0);
    assert_eq!(rig.asked[0].offloads(), TUN_F_CSUM);
    // Not negotiated.
    command[2..].copy_from_slice(&(1_u64 << VIRTIO_NET_F_GUEST_TSO6).to_le_bytes());
    assert_eq!(rig.command(&command), 1);
    rig.device(VirtioDevice::reset);
    rig.activate().unwrap();
    assert_eq!(rig.asked[0].offloads(), TUN_F_CSUM | TUN_F_TSO4);
}

#[test]
fn udp_segmentation_is_offered_where_the_tap_knows_it() {
    let offered = |refused: Option<u32>| {
        let (port, _wire, asked) = SocketPort::pair().unwrap();
        if let Some(flags) = refused {
            asked.refuse_offloads(flags);
        }
        let resources = NetResources {
            ports: vec![Box::new(port)],
            vhost: Vec::new(),
        };
        let device = Net::new(resources, NetState::fresh(config(1))).unwrap();
        device.features() >> VIRTIO_NET_F_HOST_USO & 1
    };
    assert_eq!(offered(None), 1);
    assert_eq!(offered(Some(TUN_F_USO4)), 0);
}

#[test]
fn a_paused_device_touches_nothing_and_a_resumed_one_catches_up() {
    let mut rig = Rig::active(MERGE, 1);
    rig.device(|device| device.pause()).unwrap();
    let head = rig.queues[RX].add(&[(0x1000, 2000, WRITE)]);
    rig.arrive(0, &pattern(60));
    rig.kick(RX).unwrap();
    assert!(rig.queues[RX].take_used().is_empty());
    rig.device(|device| device.resume()).unwrap();
    rig.settle();
    assert_eq!(rig.queues[RX].take_used(), [(head, 72)]);
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stopped() {
    let features = MULTI | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let mut rig = Rig::active(features, 2);
    assert_eq!(rig.command(&[4, 0, 2, 0]), 0);
    for number in 0..3 {
        rig.queues[RX].add(&[(0x1000 + number * 0x1000, 1000, WRITE)]);
    }
    rig.arrive(0, &pattern(60));
    rig.device(|device| device.pause()).unwrap();
    // Sent by the guest just before the pause, and not seen by the device.
    rig.queues[TX].add(&[(0x1000, 100, 0)]);
    let (saved, positions) = rig.device(|device| {
        let positions: Vec<_> = device
            .queues()
            .into_iter()
            .map(|(index, queue)| (index, crate::virtio::SavedQueue::from(queue)))
            .collect();
        (device.save().unwrap(), positions)
    });
    assert_eq!(positions.len(), 5);

    let new_mac = [2, 0, 0, 0, 0, 9];
    let state = NetState::decode(&saved).unwrap().with_mac(new_mac);
    let mut restored = Rig::with_state(features, 2, state);
    restored.ram = rig.ram.clone();
    restored.queues = std::mem::take(&mut rig.queues);
    assert_eq!(
        restored.device(|device| device.features()),
        rig.device(|device| device.features())
    );
    let queues = positions
        .into_iter()
        .map(|(index, position)| ActiveQueue {
            index,
            queue: Queue::try_from(position).unwrap(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        })
        .collect();
    restored.activate_with(queues).unwrap();
    assert!(restored.asked[1].attached());
    assert_eq!(restored.interrupt.config_count(), 1);
    let mut config = [0; 8];
    restored.device(|device| device.read_config(0, &mut config));
    assert_eq!(config[..6], new_mac);
    assert_eq!(
        config[6], 3,
        "the link is up and the guest is to announce itself"
    );
    // The kicks that activation made.
    restored.kick(TX).unwrap();
    restored.arrive(0, &pattern(60));
    assert_eq!(restored.queues[TX].take_used(), [(0, 0)]);
    assert_eq!(restored.queues[RX].take_used(), [(0, 72), (1, 72)]);
    assert_eq!(restored.command(&[3, 0]), 0);
    restored.device(|device| device.read_config(0, &mut config));
    assert_eq!(config[6], 1);
}

#[test]
fn resources_that_do_not_fit_the_state_are_refused() {
    let (port, _wire, _asked) = SocketPort::pair().unwrap();
    let resources = NetResources {
        ports: vec![Box::new(port)],
        vhost: Vec::new(),
    };
    let refusal = Net::new(resources, NetState::fresh(config(2))).err();
    assert!(
        matches!(refusal, Some(DeviceError::State { .. })),
        "{refusal:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the rings hold, the device answers or breaks: it does not panic, hang or spin.
    #[test]
    fn random_rings_never_harm_the_device(
        rings in proptest::collection::vec(any::<u8>(), 0x6000),
        avail_index in 0_u16..300,
        buffers in 1_u64..64,
    ) {
        let mut rig = Rig::active(MULTI, 1);
        for index in 0..3 {
            rig.write(RINGS + index * 0x8000, &rings);
            // Some descriptors that make sense, so that more than the first check is reached.
            for number in 0..buffers as u16 {
                let flags = u16::from(rings[usize::from(number)]) & (WRITE | NEXT);
                let len = u32::from(rings[usize::from(number) + 100]) * 8;
                rig.queues[index as usize].write_descriptor(
                    number, u64::from(len) * 512, len, flags, number + 1,
                );
            }
            rig.queues[index as usize].set_avail_index(avail_index);
            let _ = rig.kick(index as usize);
            rig.device(VirtioDevice::reset);
            rig.activate().unwrap();
            rig.queues[index as usize].set_avail_index(avail_index);
            let _ = rig.wires[0].write(&[0; 100]);
            rig.settle();
        }
    }
}
