//! The features that the device offers, and the offloads of the tap that agreed features need.
//!
//! Source: VIRTIO 1.3, 5.1.3 (features), `linux/if_tun.h` (`TUNSETOFFLOAD`).

use linux_raw_sys::if_tun::{
    TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Segmentation of UDP, which taps have since Linux 6.2. The older UFO is not offered.
const UDP_SEGMENTATION: &[u32] = &[
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];

/// The features that are always offered.
const BASE: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
];

/// The features that vhost must agree to, because it reads the rings and the headers.
pub(super) const VHOST: u64 = bits(&[
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
]);

/// The features that `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET` may switch.
pub(super) const GUEST_OFFLOADS: u64 = bits(&[
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
]);

const fn bits(features: &[u32]) -> u64 {
    let mut mask = 0;
    let mut index = 0;
    while index < features.len() {
        mask |= 1 << features[index];
        index += 1;
    }
    mask
}

/// Whether `features` holds the feature of number `bit`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features >> bit & 1 == 1
}

/// The features that a device with these properties offers.
pub(super) fn offered(queue_pairs: u16, mtu: bool, udp_segmentation: bool) -> u64 {
    let mut features = bits(BASE);
    if queue_pairs > 1 {
        features |= 1 << VIRTIO_NET_F_MQ;
    }
    if mtu {
        features |= 1 << VIRTIO_NET_F_MTU;
    }
    if udp_segmentation {
        features |= bits(UDP_SEGMENTATION);
    }
    features
}

/// The argument of `TUNSETOFFLOAD` under which the tap hands out only what `features` lets the
/// guest receive.
pub(super) fn tap_offloads(features: u64) -> u32 {
    // Every other offload leaves checksums to be completed, so none is possible without this one.
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = TUN_F_CSUM;
    for (feature, flag) in [
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    ] {
        if has(features, feature) {
            flags |= flag;
        }
    }
    if flags != TUN_F_CSUM && has(features, VIRTIO_NET_F_GUEST_ECN) {
        flags |= TUN_F_TSO_ECN;
    }
    // The kernel takes these two only together.
    if has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6) {
        flags |= TUN_F_USO4 | TUN_F_USO6;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_offload_is_asked_for_without_checksums() {
        assert_eq!(tap_offloads(1 << VIRTIO_NET_F_GUEST_TSO4), 0);
    }

    #[test]
    fn udp_segmentation_is_asked_for_both_families_or_none() {
        let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(
            tap_offloads(csum | 1 << VIRTIO_NET_F_GUEST_USO4),
            TUN_F_CSUM
        );
        let both = csum | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        assert_eq!(tap_offloads(both), TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6);
    }

    #[test]
    fn multiqueue_is_offered_only_with_several_pairs() {
        assert!(!has(offered(1, false, true), VIRTIO_NET_F_MQ));
        assert!(has(offered(2, false, true), VIRTIO_NET_F_MQ));
    }
}
