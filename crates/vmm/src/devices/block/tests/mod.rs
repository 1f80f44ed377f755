//! The block device against a driver written by hand, on plain memory.

mod hostile;
mod life;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clone_disk::{DiskSpec, EngineKind, Format, Writes};
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::net::testing::DriverQueue;
use crate::event_loop::{EventHandler, EventLoop};
use crate::virtio::testing::{CountingInterrupt, ram};
use crate::virtio::{GuestRam, Lifecycle, RunState};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const RAM_BYTES: usize = 8 << 20;
/// Headers, data and status bytes of the driver's requests.
const HEADERS: u64 = 1 << 20;
const DATA: u64 = 2 << 20;
const STATUS: u64 = 7 << 20;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

struct Adapter(Arc<Mutex<Block>>, Arc<Mutex<Lifecycle>>);

impl EventHandler for Adapter {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        let mut device = self.0.lock().unwrap();
        let mut life = self.1.lock().unwrap();
        life.handle_event(&mut *device, token, ready).unwrap();
    }
}

/// A device with its driver.
struct Rig {
    ram: GuestRam,
    driver: DriverQueue,
    device: Arc<Mutex<Block>>,
    life: Arc<Mutex<Lifecycle>>,
    events: EventLoop,
    interrupt: Arc<CountingInterrupt>,
    _kick: EventFd,
    requests: u64,
    directory: tempfile::TempDir,
}

fn image(directory: &Path, len: usize) -> PathBuf {
    let path = directory.join("base.img");
    let bytes: Vec<u8> = (0..len).map(|at| (at / 512 + 1) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn open(spec: &DiskSpec, engine: EngineKind) -> SharedDisk {
    Arc::new(Mutex::new(
        Disk::open(spec.open().unwrap(), engine).unwrap(),
    ))
}

impl Rig {
    fn new(engine: EngineKind, writes: Writes, config: &BlockConfig, features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), 1 << 20);
        let spec = DiskSpec {
            writes,
            ..DiskSpec::image(path, Format::Raw, false)
        };
        let disk = open(&spec, engine);
        let device = Block::new(disk, config).unwrap();
        Self::over(device, features, directory)
    }

    fn plain(writes: Writes) -> Self {
        Self::new(EngineKind::Uring, writes, &BlockConfig::default(), FLUSH)
    }

    fn over(device: Block, features: u64, directory: tempfile::TempDir) -> Self {
        let ram = ram(RAM_BYTES);
        let driver = DriverQueue::new(&ram, 0x10000, QUEUE_SIZE, false);
        let (queue, kick) = driver.activate(0);
        let mut events = EventLoop::new().unwrap();
        let registrar = events.reserve();
        let interrupt = CountingInterrupt::shared();
        let device = Arc::new(Mutex::new(device));
        let life = Arc::new(Mutex::new(Lifecycle::new()));
        let adapter = Adapter(device.clone(), life.clone());
        events.attach(&registrar, Arc::new(Mutex::new(adapter)));
        let activation = Activation {
            ram: ram.clone(),
            queues: vec![queue],
            features,
            interrupt: interrupt.clone(),
            run_state: RunState::default(),
            events: registrar,
        };
        let activated = {
            let mut device = device.lock().unwrap();
            life.lock().unwrap().activate(&mut *device, activation)
        };
        activated.unwrap();
        Self {
            ram,
            driver,
            device,
            life,
            events,
            interrupt,
            _kick: kick,
            requests: 0,
            directory,
        }
    }

    fn header(&mut self, kind: u32, sector: u64) -> (u64, u64) {
        let number = self.requests % 200;
        self.requests += 1;
        let at = HEADERS + 16 * number;
        self.ram.write_obj([kind, 0], GuestAddress(at)).unwrap();
        self.ram.write_obj(sector, GuestAddress(at + 8)).unwrap();
        let status = STATUS + number;
        self.ram.write_obj(0xffu8, GuestAddress(status)).unwrap();
        (at, status)
    }

    /// Adds a request on `len` bytes at `data`; returns where its status will be.
    fn add(&mut self, kind: u32, sector: u64, data: u64, len: u32) -> u64 {
        let (header, status) = self.header(kind, sector);
        let device_writes = matches!(kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID);
        let flags = if device_writes { WRITE } else { 0 };
        if len == 0 {
            self.driver.add(&[(header, 16, 0), (status, 1, WRITE)]);
        } else {
            self.driver
                .add(&[(header, 16, 0), (data, len, flags), (status, 1, WRITE)]);
        }
        status
    }

    /// Adds a request as one descriptor that leads to a table of others.
    fn indirect(&mut self, table: &[(u64, u32, u16)]) {
        const TABLE: u64 = 0x8_0000;
        for (index, &(address, len, flags)) in table.iter().enumerate() {
            let last = index + 1 == table.len();
            let next = if last { 0 } else { NEXT };
            let at = TABLE + 16 * index as u64;
            self.ram.write_obj(address, GuestAddress(at)).unwrap();
            self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
            let flags = [flags | next, index as u16 + 1];
            self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        }
        let bytes = 16 * table.len() as u32;
        self.driver.add(&[(TABLE, bytes, INDIRECT)]);
    }

    fn kick(&self) -> Result<(), DeviceError> {
        let mut device = self.device.lock().unwrap();
        self.life.lock().unwrap().notify_queue(&mut *device, 0)
    }

    fn pause(&self) {
        let mut device = self.device.lock().unwrap();
        self.life.lock().unwrap().pause(&mut *device).unwrap();
    }

    fn resume(&self) {
        let mut device = self.device.lock().unwrap();
        self.life.lock().unwrap().resume(&mut *device).unwrap();
    }

    /// Kicks and waits for `count` used chains.
    fn finish(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.kick().unwrap();
        let mut used = self.driver.take_used();
        let deadline = Instant::now() + Duration::from_secs(10);
        while used.len() < count {
            assert!(Instant::now() < deadline, "an answer is missing");
            // May return early with nothing: the ring's completions interrupt system calls.
            self.events.run_once(1000).unwrap();
            used.extend(self.driver.take_used());
        }
        assert_eq!(used.len(), count);
        used
    }

    fn status(&self, at: u64) -> u32 {
        u32::from(self.ram.read_obj::<u8>(GuestAddress(at)).unwrap())
    }

    /// One request, to its end.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> u32 {
        let status = self.add(kind, sector, DATA, len);
        self.finish(1);
        self.status(status)
    }

    fn fill(&self, at: u64, len: usize, value: u8) {
        self.ram
            .write_slice(&vec![value; len], GuestAddress(at))
            .unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn range(&self, sector: u64, count: u32, flags: u32) {
        self.ram.write_obj(sector, GuestAddress(DATA)).unwrap();
        self.ram
            .write_obj([count, flags], GuestAddress(DATA + 8))
            .unwrap();
    }

    fn base(&self) -> File {
        File::open(self.directory.path().join("base.img")).unwrap()
    }
}

#[test]
fn what_is_written_is_read_back_and_in_the_file_with_every_engine() {
    for engine in [EngineKind::Uring, EngineKind::Worker, EngineKind::Blocking] {
        let mut rig = Rig::new(engine, Writes::Base, &BlockConfig::default(), FLUSH);
        rig.fill(DATA, 8192, 0xab);
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 3, 8192), VIRTIO_BLK_S_OK);
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
        rig.fill(DATA, 8192, 0);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 2, 8192), VIRTIO_BLK_S_OK);
        let bytes = rig.bytes(DATA, 8192);
        assert_eq!((bytes[511], bytes[512], bytes[8191]), (3, 0xab, 0xab));
        let mut sector = [0; 512];
        rig.base().read_exact_at(&mut sector, 3 * 512).unwrap();
        assert_eq!(sector, [0xab; 512]);
        assert!(rig.interrupt.queue_count() > 0);
    }
}

#[test]
fn a_read_tells_how_many_bytes_were_written() {
    let mut rig = Rig::plain(Writes::Base);
    rig.add(VIRTIO_BLK_T_IN, 0, DATA, 4096);
    assert_eq!(rig.finish(1)[0].1, 4097);
    rig.add(VIRTIO_BLK_T_OUT, 0, DATA, 4096);
    assert_eq!(rig.finish(1)[0].1, 1);
}

#[test]
fn more_requests_than_the_ring_holds_are_all_answered_rightly() {
    for engine in [EngineKind::Uring, EngineKind::Worker] {
        let mut rig = Rig::new(
            engine,
            Writes::Ephemeral(None),
            &BlockConfig::default(),
            FLUSH,
        );
        let data = |n: u64| DATA + 512 * n;
        let statuses: Vec<u64> = (0..80)
            .map(|n| rig.add(VIRTIO_BLK_T_IN, n * 3, data(n), 512))
            .collect();
        rig.finish(80);
        for (n, status) in (0..80).zip(statuses) {
            assert_eq!(rig.status(status), VIRTIO_BLK_S_OK);
            assert_eq!(rig.bytes(data(n), 512), vec![(n * 3 + 1) as u8; 512]);
        }
    }
}

#[test]
fn the_id_string_is_told_and_cut() {
    let config = BlockConfig {
        id: "a-serial-longer-than-twenty-bytes".to_owned(),
        ..BlockConfig::default()
    };
    let mut rig = Rig::new(EngineKind::Uring, Writes::Base, &config, FLUSH);
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
    assert_eq!(rig.bytes(DATA, 20), b"a-serial-longer-than");
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let rig = Rig::plain(Writes::Ephemeral(None));
    let device = rig.device.lock().unwrap();
    let mut space = [0xee; 64];
    device.read_config(0, &mut space);
    assert_eq!(space[..8], 2048u64.to_le_bytes());
    assert_eq!(space[20..24], 512u32.to_le_bytes());
    assert_eq!(space[24], 3, "eight logical blocks in a physical one");
    assert_eq!(space[60..], [0; 4]);
    let mut byte = [9];
    device.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_changes() {
    let mut rig = Rig::plain(Writes::Refused);
    assert_ne!(
        rig.device.lock().unwrap().features() & 1 << VIRTIO_BLK_F_RO,
        0
    );
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_IOERR);
    rig.range(0, 8, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_IOERR);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
    let mut sector = [0; 512];
    rig.base().read_exact_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [1; 512]);
}

#[test]
fn zeros_and_discards_never_show_the_base_again() {
    let mut rig = Rig::plain(Writes::Ephemeral(None));
    rig.fill(DATA, 4096, 0x77);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 8, 4096), VIRTIO_BLK_S_OK);
    rig.range(8, 8, 0);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_OK);
    // From the middle of a block to the middle of another.
    rig.range(20, 9, 1);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16),
        VIRTIO_BLK_S_OK
    );
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 32 * 512), VIRTIO_BLK_S_OK);
    let bytes = rig.bytes(DATA, 32 * 512);
    for sector in 0..32 {
        let zero = (8..16).contains(&sector) || (20..29).contains(&sector);
        let expected = if zero { 0 } else { sector as u8 + 1 };
        assert_eq!(
            bytes[sector * 512..][..512],
            [expected; 512],
            "sector {sector}"
        );
    }
}

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let mut rig = Rig::plain(Writes::Base);
    let (header, status) = rig.header(VIRTIO_BLK_T_IN, 5);
    rig.driver.add(&[
        (header, 7, 0),
        (header + 7, 9, 0),
        (DATA, 100, WRITE),
        (DATA + 4096, 412, WRITE),
        (DATA + 8192, 511, WRITE),
        // The last byte of data together with the status.
        (status - 1, 2, WRITE),
    ]);
    rig.finish(1);
    assert_eq!(rig.status(status), VIRTIO_BLK_S_OK);
    assert_eq!(rig.bytes(DATA, 101), [vec![6; 100], vec![0]].concat());
    assert_eq!(rig.bytes(DATA + 4096, 412), vec![6; 412]);
    assert_eq!(rig.bytes(DATA + 8192, 511), vec![7; 511]);
    assert_eq!(rig.bytes(status - 1, 1), [7]);
}

#[test]
fn an_indirect_table_works_like_a_chain() {
    let mut rig = Rig::plain(Writes::Base);
    let (header, status) = rig.header(VIRTIO_BLK_T_IN, 9);
    let table = 0x8_0000u64;
    for (n, (address, len, flags)) in [
        (header, 16u32, 1u16),
        (DATA, 512, 1 | WRITE),
        (status, 1, WRITE),
    ]
    .into_iter()
    .enumerate()
    {
        let at = table + 16 * n as u64;
        rig.ram.write_obj(address, GuestAddress(at)).unwrap();
        rig.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        rig.ram
            .write_obj([flags, n as u16 + 1], GuestAddress(at + 12))
            .unwrap();
    }
    rig.driver.add(&[(table, 48, INDIRECT)]);
    rig.finish(1);
    assert_eq!(rig.status(status), VIRTIO_BLK_S_OK);
    assert_eq!(rig.bytes(DATA, 512), [10; 512]);
}
