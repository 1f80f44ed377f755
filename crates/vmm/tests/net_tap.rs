//! The network device's userspace path on a real tap. Needs root, `/dev/net/tun` and `ip`.
#![allow(clippy::unwrap_used)]

mod net_rig;

use std::fs::File;

use clone_vmm::devices::net::{Port, Tap, TapError};
use clone_vmm::virtio::DeviceError;

use net_rig::{Rig, ip, moves_between_paths, talks_to_the_host, with_tap};

#[test]
fn a_driver_talks_to_the_host() {
    with_tap(|| talks_to_the_host(&mut Rig::new(1, Vec::new())));
}

#[test]
fn a_device_that_was_reset_starts_over() {
    with_tap(|| {
        let mut rig = Rig::new(1, Vec::new());
        for _ in 0..2 {
            talks_to_the_host(&mut rig);
            rig.start_over();
        }
    });
}

#[test]
fn a_saved_device_goes_on_after_its_restore() {
    with_tap(|| moves_between_paths(Vec::new(), Vec::new()));
}

#[test]
fn queues_of_a_tap_leave_and_join_it() {
    with_tap(|| {
        let taps = Tap::open("tap0", 3).unwrap();
        for attached in [false, true, false] {
            taps[2].set_attached(attached).unwrap();
        }
        drop(taps);
        let mut rig = Rig::new(3, Vec::new());
        rig.add_receive_buffers(64);
        assert!(
            rig.finds_host(),
            "frames go to the one queue that is in use"
        );
    });
}

#[test]
fn a_tap_that_was_opened_elsewhere_is_taken_and_nothing_else_is() {
    with_tap(|| {
        let [tap] = Tap::open("tap0", 1).unwrap().try_into().unwrap();
        let tap = Tap::from_fd(tap.into_fd()).unwrap();
        tap.set_offloads(0).unwrap();
        let other = File::open("/dev/null").unwrap();
        let refusal = Tap::from_fd(other.into()).unwrap_err();
        assert!(matches!(refusal, TapError::NotATap), "{refusal}");
        for name in ["", "a-name-that-is-too-long"] {
            let refusal = Tap::open(name, 1).unwrap_err();
            assert!(matches!(refusal, TapError::Name(_)), "{refusal}");
        }
    });
}

#[test]
fn a_tap_that_is_deleted_breaks_the_device_and_the_loop_rests() {
    with_tap(|| {
        let mut rig = Rig::new(1, Vec::new());
        rig.add_receive_buffers(4);
        ip("link delete tap0");
        assert!(!rig.is_answered());
        let failure = rig.handler.lock().unwrap().failure.take();
        assert!(
            matches!(failure, Some(DeviceError::Host { .. })),
            "{failure:?}"
        );
        assert_eq!(rig.events.run_once(0).unwrap(), 0);
    });
}
