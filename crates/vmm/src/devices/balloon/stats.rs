//! The guest's memory statistics (VIRTIO 1.3, 5.5.6.3): pairs of a 16-bit tag and a 64-bit value.

use serde::Serialize;

/// Bytes of one pair.
pub(super) const PAIR: usize = 10;
/// The most pairs that are read of one buffer.
pub(super) const MAX_PAIRS: usize = 64;

/// The counters of the guest's kernel. Memory is in bytes, and the others count since the guest's
/// boot. A value is `None` where the driver does not send it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory not used at all.
    pub free_memory: Option<u64>,
    /// Memory that the guest has, the balloon not counted.
    pub total_memory: Option<u64>,
    /// Memory that programs could still get without swapping.
    pub available_memory: Option<u64>,
    /// Memory that caches of files use.
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed because memory ran out.
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for reclaim.
    pub allocation_stalls: Option<u64>,
    /// Pages scanned in the background.
    pub async_scans: Option<u64>,
    /// Pages scanned while an allocation waited.
    pub direct_scans: Option<u64>,
    /// Pages reclaimed in the background.
    pub async_reclaims: Option<u64>,
    /// Pages reclaimed while an allocation waited.
    pub direct_reclaims: Option<u64>,
}

impl BalloonStats {
    /// Reads pairs. Unknown tags and an incomplete last pair are ignored.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for pair in bytes.chunks_exact(PAIR).take(MAX_PAIRS) {
            let (tag, value) = pair.split_at(2);
            let tag = u16::from_le_bytes([tag[0], tag[1]]);
            let mut raw = [0; 8];
            raw.copy_from_slice(value);
            if let Some(field) = stats.field(tag) {
                *field = Some(u64::from_le_bytes(raw));
            }
        }
        stats
    }

    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kills,
            11 => &mut self.allocation_stalls,
            12 => &mut self.async_scans,
            13 => &mut self.direct_scans,
            14 => &mut self.async_reclaims,
            15 => &mut self.direct_reclaims,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_tags_are_read_and_others_left_out() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4_u16, 100_u64), (99, 1), (5, 200)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([6, 0, 1]);
        let expected = BalloonStats {
            free_memory: Some(100),
            total_memory: Some(200),
            ..BalloonStats::default()
        };
        assert_eq!(BalloonStats::parse(&bytes), expected);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..1000)) {
            BalloonStats::parse(&bytes);
        }
    }
}
