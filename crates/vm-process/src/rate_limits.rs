//! Converts the rate limits of a device's description to the device's type.

use clone_api::config::RateLimit;
use clone_vmm::rate_limit::{Rate, RateLimits};

/// Converts a description's limits; `None` means no limits.
pub(super) fn limits(limit: Option<&RateLimit>) -> RateLimits {
    let Some(limit) = limit else {
        return RateLimits::default();
    };
    let rate = |per_second: Option<u64>, burst: Option<u64>| {
        per_second.map(|per_second| Rate {
            burst: burst.unwrap_or(Rate::per_second(per_second).burst),
            per_second,
        })
    };
    RateLimits {
        bytes: rate(
            limit.bandwidth.map(|bytes| bytes.0),
            limit.bandwidth_burst.map(|bytes| bytes.0),
        ),
        operations: rate(limit.iops, limit.iops_burst),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clone_api::Bytes;

    #[test]
    fn limits_carry_over_and_bursts_have_a_default() {
        let limit = RateLimit {
            bandwidth: Some(Bytes(1000)),
            iops: Some(50),
            iops_burst: Some(7),
            ..RateLimit::default()
        };
        let made = limits(Some(&limit));
        assert_eq!(made.bytes, Some(Rate::per_second(1000)));
        assert_eq!(made.operations.unwrap().burst, 7);
        assert_eq!(limits(None), RateLimits::default());
    }
}
