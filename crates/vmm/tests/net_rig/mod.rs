//! A network device on a real tap in a network namespace of the test's own, and a driver made of
//! plain memory: the host kernel answers what it sends. Needs root, `/dev/net/tun` and `ip`.

use std::fs::File;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clone_vmm::devices::net::testing::{DriverQueue, WRITE};
use clone_vmm::devices::net::{Net, NetConfig, NetResources, Port, Tap};
use clone_vmm::event_loop::{EventHandler, EventLoop, Registrar};
use clone_vmm::rate_limit::RateLimits;
use clone_vmm::virtio::testing::ram;
use clone_vmm::virtio::{
    Activation, ActiveQueue, DeviceError, GuestRam, Interrupt, RunState, SavedQueue, VirtioDevice,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MAC: [u8; 6] = [0x02, 0xc1, 0, 0, 0, 2];
const RINGS: u64 = 0x10_0000;
const RX_BUFFERS: u64 = 0x20_0000;
const TX_BUFFER: u64 = 0x8000;
pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Runs `test` on a thread that has a network of its own, with the tap `tap0` at 192.0.2.1/24.
pub(crate) fn with_tap(test: impl FnOnce() + Send + 'static) {
    let outcome = thread::spawn(|| {
        // SAFETY: unshare takes flags and touches no memory of ours.
        let returned = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        let error = std::io::Error::last_os_error();
        assert_eq!(
            returned, 0,
            "these tests make network namespaces as root: {error}"
        );
        ip("tuntap add tap0 mode tap multi_queue");
        ip("address add 192.0.2.1/24 dev tap0");
        ip("link set tap0 up");
        test();
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn ip(line: &str) {
    let status = Command::new("ip").args(line.split(' ')).status().unwrap();
    assert!(status.success(), "ip {line}");
}

/// Interrupts that are eventfds, one per queue, as vhost needs them.
struct EventfdInterrupt(Vec<EventFd>);

impl Interrupt for EventfdInterrupt {
    fn signal_queue(&self, queue: u16) {
        self.0[usize::from(queue)].write(1).unwrap();
    }

    fn signal_config(&self) {}

    fn queue_eventfd(&self, queue: u16) -> Option<EventFd> {
        Some(self.0[usize::from(queue)].try_clone().unwrap())
    }
}

pub(crate) struct Handler {
    device: Net,
    pub(crate) failure: Option<DeviceError>,
}

/// Above all tokens of the device.
const KICK: u32 = 0x1000;

impl EventHandler for Handler {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        let result = match token.checked_sub(KICK) {
            Some(queue) => self.device.notify_queue(queue as u16),
            None => self.device.handle_event(token, ready),
        };
        if let Err(error) = result {
            self.failure = Some(error);
        }
    }
}

/// A device on `tap0`, its driver, and its event loop.
pub(crate) struct Rig {
    ram: GuestRam,
    pub(crate) handler: Arc<Mutex<Handler>>,
    pub(crate) events: EventLoop,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) kicks: Vec<EventFd>,
    /// Frames that the driver gave to the device, and got back.
    sent: usize,
    done: usize,
    interrupt: Arc<EventfdInterrupt>,
    registrar: Registrar,
}

fn driver_queues(ram: &GuestRam, pairs: u16) -> Vec<DriverQueue> {
    (0..u64::from(pairs) * 2 + 1)
        .map(|n| DriverQueue::new(ram, RINGS + n * 0x8000, 256, true))
        .collect()
}

fn activated(queues: &[DriverQueue]) -> Vec<ActiveQueue> {
    (0..)
        .zip(queues)
        .map(|(n, queue)| queue.activate(n).0)
        .collect()
}

impl Rig {
    pub(crate) fn new(pairs: u16, vhost: Vec<File>) -> Self {
        let ram = ram(4 << 20);
        let queues = driver_queues(&ram, pairs);
        let active = activated(&queues);
        Self::with_state(pairs, None, vhost, ram, queues, active)
    }

    /// A rig whose device is new, or has taken over a `saved` state.
    fn with_state(
        pairs: u16,
        saved: Option<&[u8]>,
        vhost: Vec<File>,
        ram: GuestRam,
        queues: Vec<DriverQueue>,
        active: Vec<ActiveQueue>,
    ) -> Self {
        let taps = Tap::open("tap0", pairs).unwrap();
        let ports = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>);
        let resources = NetResources {
            ports: ports.collect(),
            vhost,
        };
        let config = NetConfig {
            mac: MAC,
            mtu: None,
            queue_pairs: pairs,
            limits: RateLimits::default(),
        };
        let mut device = Net::new(resources, config).unwrap();
        if let Some(saved) = saved {
            device.restore(saved).unwrap();
        }
        let eventfd = |_| EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(EventfdInterrupt(queues.iter().map(eventfd).collect()));
        let mut events = EventLoop::new().unwrap();
        let registrar = events.reserve();
        let handler = Arc::new(Mutex::new(Handler {
            device,
            failure: None,
        }));
        events.attach(&registrar, handler.clone());
        let mut rig = Self {
            ram,
            handler,
            events,
            registrar,
            queues,
            kicks: Vec::new(),
            sent: 0,
            done: 0,
            interrupt,
        };
        rig.activate(active);
        rig
    }

    fn activate(&mut self, active: Vec<ActiveQueue>) {
        let copy = |queue: &ActiveQueue| queue.kick.try_clone().unwrap();
        self.kicks = active.iter().map(copy).collect();
        let multi = if active.len() > 3 {
            1 << VIRTIO_NET_F_MQ
        } else {
            0
        };
        let activation = Activation {
            ram: self.ram.clone(),
            queues: active,
            features: FEATURES | multi,
            interrupt: self.interrupt.clone(),
            run_state: RunState::default(),
            events: self.registrar.clone(),
        };
        let device = &mut self.handler.lock().unwrap().device;
        device.activate(activation).unwrap();
        for (queue, kick) in (0_u16..).zip(&self.kicks) {
            if !device.in_kernel(queue) {
                // Edge-triggered, as nothing here reads the counter.
                let interest = EventSet::IN | EventSet::EDGE_TRIGGERED;
                let token = KICK + u32::from(queue);
                self.registrar.add(kick, token, interest).unwrap();
            }
        }
    }

    /// The driver resets the device and starts over.
    pub(crate) fn start_over(&mut self) {
        self.device(VirtioDevice::reset);
        let zeros = vec![0; 3 * 0x8000];
        self.ram.write_slice(&zeros, GuestAddress(RINGS)).unwrap();
        self.queues = driver_queues(&self.ram, 1);
        (self.sent, self.done) = (0, 0);
        self.activate(activated(&self.queues));
    }

    pub(crate) fn device<R>(&self, act: impl FnOnce(&mut Net) -> R) -> R {
        act(&mut self.handler.lock().unwrap().device)
    }

    pub(crate) fn add_receive_buffers(&mut self, count: u64) {
        for number in 0..count {
            self.queues[RX].add(&[(RX_BUFFERS + number * 0x1000, 1536, WRITE)]);
        }
        self.kicks[RX].write(1).unwrap();
    }

    fn send(&mut self, body: &[u8]) {
        let mut frame = vec![0; 12];
        frame.extend(body);
        self.ram
            .write_slice(&frame, GuestAddress(TX_BUFFER))
            .unwrap();
        self.queues[TX].add(&[(TX_BUFFER, frame.len() as u32, 0)]);
        self.sent += 1;
        self.kicks[TX].write(1).unwrap();
    }

    /// Asks the host for its hardware address.
    pub(crate) fn ask(&mut self) {
        let mut frame = vec![0xff; 6];
        frame.extend(MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(MAC);
        frame.extend([192, 0, 2, 2]);
        frame.extend([0; 6]);
        frame.extend([192, 0, 2, 1]);
        frame.resize(60, 0);
        self.send(&frame);
    }

    /// Asks the host until it answers: the first frames on a new tap may be lost, as the kernel
    /// is in no hurry to see that it is connected.
    pub(crate) fn finds_host(&mut self) -> bool {
        (0..8).any(|_| {
            self.ask();
            self.is_answered()
        })
    }

    /// Runs the loop until all frames sent came back as used.
    pub(crate) fn sends_all(&mut self) -> bool {
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && self.done < self.sent {
            self.events.run_once(20).unwrap();
            self.done += self.queues[TX].take_used().len();
        }
        self.done == self.sent
    }

    /// Runs the loop until the host's answer to [`Rig::ask`] is in a receive buffer.
    pub(crate) fn is_answered(&mut self) -> bool {
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end {
            self.events.run_once(20).unwrap();
            if self.handler.lock().unwrap().failure.is_some() {
                return false;
            }
            for (head, len) in self.queues[RX].take_used() {
                let mut frame = vec![0; len as usize];
                let at = RX_BUFFERS + u64::from(head) % 64 * 0x1000;
                self.ram.read_slice(&mut frame, GuestAddress(at)).unwrap();
                assert_eq!(frame[10..12], [1, 0], "one buffer was used");
                if frame[24..26] == [8, 6] && frame[32..34] == [0, 2] {
                    assert_eq!(frame[12..18], MAC);
                    return true;
                }
            }
        }
        false
    }

    fn positions(&self) -> Vec<(u16, SavedQueue)> {
        self.device(|device| {
            let queues = device.queues().into_iter();
            queues
                .map(|(index, queue)| (index, SavedQueue::from(queue)))
                .collect()
        })
    }
}

pub(crate) fn talks_to_the_host(rig: &mut Rig) {
    rig.add_receive_buffers(64);
    for _ in 0..3 {
        assert!(rig.finds_host());
    }
    assert!(rig.sends_all());
    let received = &rig.interrupt.0[RX];
    received.read().expect("an interrupt for what was received");
}

/// Saved in the one path and restored in the other, with a frame left in the queue.
pub(crate) fn moves_between_paths(from: Vec<File>, to: Vec<File>) {
    let mut rig = Rig::new(1, from);
    rig.add_receive_buffers(64);
    assert!(rig.finds_host());
    rig.device(VirtioDevice::pause).unwrap();
    rig.ask();
    assert!(!rig.is_answered(), "a paused device moves nothing");
    rig.device(VirtioDevice::resume).unwrap();
    assert!(rig.sends_all());
    assert!(rig.finds_host());
    assert!(rig.sends_all());
    rig.device(VirtioDevice::pause).unwrap();
    rig.ask();
    let positions = rig.positions();
    let [(0, rx), (1, tx), (2, _)] = positions[..] else {
        panic!("{positions:?}");
    };
    let done = u16::try_from(rig.done).unwrap();
    assert_eq!((tx.next_avail, tx.next_used), (done, done));
    assert_eq!(rx.next_avail, rx.next_used);
    assert!(rx.next_avail >= 2);
    let saved = rig.device(|device| device.save()).unwrap();
    let (ram, queues) = (rig.ram.clone(), std::mem::take(&mut rig.queues));
    let (sent, done) = (rig.sent, rig.done);
    drop(rig);
    let active = positions
        .into_iter()
        .map(|(index, saved)| ActiveQueue {
            index,
            queue: Queue::try_from(saved).unwrap(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        })
        .collect();
    let mut restored = Rig::with_state(1, Some(&saved), to, ram, queues, active);
    (restored.sent, restored.done) = (sent, done);
    assert!(restored.sends_all(), "what was left in the queue is sent");
    assert!(restored.finds_host());
}
