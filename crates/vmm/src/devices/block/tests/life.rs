//! What happens around requests: pauses, freezes, limits, saved states.

use super::*;
use crate::rate_limit::{Rate, RateLimits};
use crate::virtio::SavedQueue;

#[test]
fn without_flushes_agreed_on_every_write_is_kept_before_it_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), 1 << 20);
    let top = directory.path().join("top.layer");
    let spec = DiskSpec {
        writes: Writes::Layer(top.clone()),
        ..DiskSpec::image(base, Format::Raw, false)
    };
    let disk = open(&spec, EngineKind::Uring);
    let device = Block::new(disk, &BlockConfig::default()).unwrap();
    let mut rig = Rig::over(device, 0, directory);
    rig.fill(DATA, 512, 0x55);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 1, 512), VIRTIO_BLK_S_OK);
    // The file alone, as after a crash of this process.
    let copy = rig.directory.path().join("copy.layer");
    std::fs::copy(&top, &copy).unwrap();
    let spec = DiskSpec {
        layers: vec![copy],
        writes: Writes::Refused,
        ..spec
    };
    let mut disk = Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap();
    let mut sectors = [0; 1536];
    disk.read_at(&mut sectors, 0).unwrap();
    assert_eq!((sectors[0], sectors[512], sectors[1024]), (1, 0x55, 3));
}

#[test]
fn a_pause_finishes_what_was_begun_and_a_resume_finds_what_came_since() {
    for engine in [EngineKind::Uring, EngineKind::Worker] {
        let mut rig = Rig::new(
            engine,
            Writes::Ephemeral(None),
            &BlockConfig::default(),
            FLUSH,
        );
        for n in 0..60 {
            rig.add(VIRTIO_BLK_T_OUT, n * 8, DATA, 4096);
        }
        rig.kick().unwrap();
        rig.pause();
        assert_eq!(rig.driver.take_used().len(), 60);
        let queue = SavedQueue::from(rig.device.lock().unwrap().queues()[0].1);
        assert_eq!((queue.next_avail, queue.next_used), (60, 60));
        rig.add(VIRTIO_BLK_T_IN, 0, DATA, 512);
        rig.kick().unwrap();
        assert!(rig.driver.take_used().is_empty(), "a paused device works");
        rig.resume();
        rig.finish(1);
    }
}

#[test]
fn a_frozen_disk_keeps_its_content_while_the_guest_goes_on() {
    let mut rig = Rig::plain(Writes::Ephemeral(None));
    rig.fill(DATA, 4096, 0x11);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_OK);
    let disk = {
        rig.pause();
        let disk = rig.device.lock().unwrap().disk().clone();
        let top = clone_disk::ephemeral(None).unwrap();
        disk.lock().unwrap().freeze(top, false).unwrap();
        rig.resume();
        disk
    };
    rig.fill(DATA, 512, 0x22);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 1, 512), VIRTIO_BLK_S_OK);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    let bytes = rig.bytes(DATA, 4096);
    assert_eq!((bytes[0], bytes[512], bytes[1024]), (0x11, 0x22, 0x11));
    let frozen = disk.lock().unwrap().layer_file(0).unwrap();
    let mut block = [0; 4096];
    frozen.read_exact_at(&mut block, 1 << 20).unwrap();
    assert_eq!(block, [0x11; 4096]);
}

#[test]
fn a_rate_limit_holds_requests_back_and_lets_them_go_in_order() {
    let config = BlockConfig {
        limits: RateLimits {
            operations: Some(Rate {
                per_second: 50,
                burst: 2,
            }),
            ..RateLimits::default()
        },
        ..BlockConfig::default()
    };
    let mut rig = Rig::new(EngineKind::Blocking, Writes::Base, &config, FLUSH);
    let heads: Vec<u64> = (0..5)
        .map(|n| rig.add(VIRTIO_BLK_T_IN, n, DATA, 512))
        .collect();
    rig.kick().unwrap();
    let first = rig.driver.take_used().len();
    assert!((2..5).contains(&first), "{first} passed at once");
    let mut rest = first;
    let deadline = Instant::now() + Duration::from_secs(10);
    while rest < 5 {
        assert!(Instant::now() < deadline, "the timer is missing");
        // May return early with nothing: the ring's completions interrupt system calls.
        rig.events.run_once(1000).unwrap();
        rest += rig.driver.take_used().len();
    }
    assert!(heads.iter().all(|at| rig.status(*at) == VIRTIO_BLK_S_OK));
}

#[test]
fn every_queue_of_several_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), 1 << 20);
    let disk = open(
        &DiskSpec::image(base, Format::Raw, true),
        EngineKind::Blocking,
    );
    let config = BlockConfig {
        queues: 2,
        ..BlockConfig::default()
    };
    let mut device = Block::new(disk, &config).unwrap();
    assert_ne!(device.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    assert_eq!(device.queue_max_sizes().len(), 2);
    let ram = ram(RAM_BYTES);
    let mut drivers = [0x10000, 0x20000].map(|base| DriverQueue::new(&ram, base, 16, false));
    let (first, second) = (drivers[0].activate(0).0, drivers[1].activate(1).0);
    let interrupt = CountingInterrupt::shared();
    let activation = Activation {
        ram: ram.clone(),
        queues: vec![first, second],
        features: FLUSH,
        interrupt: interrupt.clone(),
        run_state: RunState::default(),
        events: EventLoop::new().unwrap().reserve(),
    };
    device.activate(activation).unwrap();
    for (n, driver) in drivers.iter_mut().enumerate() {
        ram.write_obj([VIRTIO_BLK_T_FLUSH, 0, 0, 0], GuestAddress(HEADERS))
            .unwrap();
        driver.add(&[(HEADERS, 16, 0), (STATUS, 1, WRITE)]);
        device.notify_queue(n as u16).unwrap();
        assert_eq!(driver.take_used().len(), 1);
    }
    assert_eq!(interrupt.queue_count(), 2);
}

#[test]
fn a_saved_state_comes_back_and_refuses_another_disk() {
    let rig = Rig::plain(Writes::Ephemeral(None));
    let saved = rig.device.lock().unwrap().save().unwrap();
    let other = tempfile::tempdir().unwrap();
    let disk = |len| {
        let path = image(other.path(), len);
        open(
            &DiskSpec::image(path, Format::Raw, false),
            EngineKind::Blocking,
        )
    };
    let device = |len, queues| {
        let config = BlockConfig {
            id: "another".to_owned(),
            queues,
            ..BlockConfig::default()
        };
        Block::new(disk(len), &config).unwrap()
    };
    let mut same = device(1 << 20, 1);
    same.restore(&saved).unwrap();
    assert_eq!(same.save().unwrap(), saved);
    let refused = device(1 << 19, 1).restore(&saved).unwrap_err();
    assert!(refused.to_string().contains("1048576"), "{refused}");
    let refused = device(1 << 20, 2).check_state(&saved).unwrap_err();
    assert!(refused.to_string().contains("2"), "{refused}");
    assert!(BlockState::decode(&[9, 9]).is_err());
}

#[test]
fn the_first_version_of_the_state_is_still_understood() {
    let golden = [
        &[0u8][..],
        b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        &[2, 0, 1, 100, 10, 1, 0x80, 0x80, 0x40, 1, 0x80, 0x20],
    ]
    .concat();
    let state = BlockState::V1(BlockStateV1 {
        id: *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        queues: 2,
        limits: RateLimits {
            bytes: None,
            operations: Some(Rate {
                per_second: 100,
                burst: 10,
            }),
        },
        disk: Some(DiskProperties {
            size: 1 << 20,
            read_only: true,
            block_size: 4096,
        }),
    });
    assert_eq!(state.encode().unwrap(), golden);
    assert_eq!(BlockState::decode(&golden).unwrap(), state);
}
