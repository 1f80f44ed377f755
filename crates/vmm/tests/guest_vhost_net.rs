//! The network device's path through vhost-net. Needs root, `/dev/net/tun`, `ip` and
//! `/dev/vhost-net`, so it runs in the testbed or on a host that has it.
#![allow(clippy::unwrap_used)]

mod net_rig;

use std::fs::{File, OpenOptions};

use clone_vmm::virtio::DeviceError;

use net_rig::{Rig, TX, moves_between_paths, talks_to_the_host, with_tap};

fn vhost(count: usize) -> Vec<File> {
    let open = |_| {
        let path = "/dev/vhost-net";
        let file = OpenOptions::new().read(true).write(true).open(path);
        file.unwrap_or_else(|error| panic!("this test is for hosts with {path}: {error}"))
    };
    (0..count).map(open).collect()
}

#[test]
fn vhost_lets_a_driver_talk_to_the_host() {
    with_tap(|| talks_to_the_host(&mut Rig::new(1, vhost(1))));
}

#[test]
fn vhost_goes_on_after_a_restore() {
    with_tap(|| moves_between_paths(vhost(1), vhost(1)));
}

#[test]
fn vhost_takes_over_from_the_event_loop_and_gives_back() {
    with_tap(|| moves_between_paths(Vec::new(), vhost(1)));
    with_tap(|| moves_between_paths(vhost(1), Vec::new()));
}

#[test]
fn vhost_reports_a_broken_ring_and_works_again_after_a_reset() {
    with_tap(|| {
        let mut rig = Rig::new(1, vhost(1));
        rig.queues[TX].add(&[(u64::from(u32::MAX), 100, 0)]);
        rig.kicks[TX].write(1).unwrap();
        assert!(!rig.is_answered());
        let failure = rig.handler.lock().unwrap().failure.take();
        assert!(
            matches!(failure, Some(DeviceError::Driver { .. })),
            "{failure:?}"
        );
        rig.start_over();
        talks_to_the_host(&mut rig);
    });
}
