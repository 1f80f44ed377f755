//! Limits on bytes and operations per second, for devices.
//!
//! A token bucket may be overdrawn by one request of any size; the next request then waits until
//! the debt is paid. So no request is too large for its limit, and the rate holds on average.
//! Callers pass the time, which makes the buckets testable; the timer only notifies the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

/// The shortest wait. Requests are let through in steps of it, not with a timer for each request.
const STEP: Duration = Duration::from_millis(1);

/// A limit on one quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// The units (bytes or operations) per second. 0 means no limit.
    pub per_second: u64,
    /// The units that may be used at once after a time of rest.
    pub burst: u64,
}

impl Rate {
    /// A rate with a burst of a tenth of a second's units.
    pub fn per_second(per_second: u64) -> Self {
        Self {
            per_second,
            burst: (per_second / 10).max(1),
        }
    }
}

/// The limits of a device, or of one direction of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    /// Bytes; `None` means no limit.
    pub bytes: Option<Rate>,
    /// Operations (requests, frames); `None` means no limit.
    pub operations: Option<Rate>,
}

/// A bucket of tokens that fills with time.
#[derive(Debug)]
struct TokenBucket {
    rate: Rate,
    /// The tokens in billionths of a unit. A negative number is a debt.
    tokens: i128,
    filled_at: Instant,
}

const NANOS: i128 = 1_000_000_000;

impl TokenBucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            tokens: i128::from(rate.burst) * NANOS,
            filled_at: now,
        }
    }

    /// Fills the bucket up to `now`. Returns the time until a request may pass, which is zero where
    /// it may pass at once.
    fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled_at);
        self.filled_at = now;
        let rate = i128::from(self.rate.per_second);
        // Nanoseconds since the start of the process times a 64-bit rate fit into 128 bits.
        let gained = passed.as_nanos() as i128 * rate;
        self.tokens = (self.tokens + gained).min(i128::from(self.rate.burst) * NANOS);
        if self.tokens > 0 || rate == 0 {
            return Duration::ZERO;
        }
        let nanos = (1 - self.tokens + rate - 1) / rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).max(STEP)
    }

    fn take(&mut self, units: u64) {
        if self.rate.per_second != 0 {
            self.tokens -= i128::from(units) * NANOS;
        }
    }
}

/// Limits, with a timer that is due when the next request may pass.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    timer: TimerFd,
    armed: bool,
}

impl RateLimiter {
    /// A limiter with full buckets, or `None` where there is nothing to limit.
    ///
    /// # Errors
    /// The host has no timer left.
    pub fn new(limits: RateLimits, now: Instant) -> io::Result<Option<Self>> {
        if limits == RateLimits::default() {
            return Ok(None);
        }
        Ok(Some(Self {
            bytes: limits.bytes.map(|rate| TokenBucket::new(rate, now)),
            operations: limits.operations.map(|rate| TokenBucket::new(rate, now)),
            timer: TimerFd::new()?,
            armed: false,
        }))
    }

    /// Whether a request of `bytes` may pass. If not, nothing is taken, and the timer's descriptor
    /// becomes readable when it is worth asking again.
    ///
    /// # Errors
    /// The host refuses to set the timer.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> io::Result<bool> {
        let ready = self.is_ready(now)?;
        if ready {
            self.charge(bytes);
        }
        Ok(ready)
    }

    /// Whether a request may pass whose size is not known yet: [`RateLimiter::charge`] follows
    /// when it is. If not, the timer is set as by [`RateLimiter::admit`].
    ///
    /// # Errors
    /// The host refuses to set the timer.
    pub fn is_ready(&mut self, now: Instant) -> io::Result<bool> {
        let wait = [&mut self.bytes, &mut self.operations]
            .into_iter()
            .flatten()
            .map(|bucket| bucket.wait(now))
            .max()
            .unwrap_or_default();
        if !wait.is_zero() && !self.armed {
            self.timer.reset(wait, None)?;
            self.armed = true;
        }
        Ok(wait.is_zero())
    }

    /// Takes one operation of `bytes` out of the buckets.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }

    /// Acknowledges that the timer was due.
    ///
    /// # Errors
    /// Where the timer cannot be read.
    pub fn acknowledge(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.armed) {
            self.timer.wait()?;
        }
        Ok(())
    }
}

impl AsRawFd for RateLimiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of requests of `bytes` that pass in `seconds`, tried every millisecond.
    fn passed(limits: RateLimits, bytes: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(limits, start).unwrap().unwrap();
        let mut count = 0;
        for step in 0..seconds * 1000 {
            let now = start + Duration::from_millis(step);
            while limiter.admit(bytes, now).unwrap() {
                count += 1;
            }
        }
        count
    }

    #[test]
    fn operations_pass_at_their_rate_after_the_burst() {
        let limits = RateLimits {
            operations: Some(Rate {
                per_second: 200,
                burst: 50,
            }),
            ..RateLimits::default()
        };
        let count = passed(limits, 4096, 10);
        assert!((2040..=2060).contains(&count), "{count}");
    }

    #[test]
    fn bytes_pass_at_their_rate_even_in_requests_larger_than_the_burst() {
        let limits = RateLimits {
            bytes: Some(Rate {
                per_second: 1_000_000,
                burst: 1000,
            }),
            ..RateLimits::default()
        };
        let count = passed(limits, 500_000, 10);
        assert!((20..=22).contains(&count), "{count}");
    }

    #[test]
    fn the_stricter_of_two_limits_rules_and_a_refusal_takes_nothing() {
        let limits = RateLimits {
            bytes: Some(Rate::per_second(1 << 40)),
            operations: Some(Rate {
                per_second: 10,
                burst: 1,
            }),
        };
        let count = passed(limits, 4096, 5);
        assert!((49..=52).contains(&count), "{count}");
    }

    #[test]
    fn the_timer_fires_when_a_refused_request_may_pass() {
        let limits = RateLimits {
            operations: Some(Rate {
                per_second: 1000,
                burst: 1,
            }),
            ..RateLimits::default()
        };
        let start = Instant::now();
        let mut limiter = RateLimiter::new(limits, start).unwrap().unwrap();
        assert!(limiter.admit(0, start).unwrap());
        assert!(!limiter.admit(0, start).unwrap());
        // Blocks until the timer fired.
        limiter.acknowledge().unwrap();
        assert!(limiter.admit(0, Instant::now()).unwrap());
    }

    #[test]
    fn no_limits_need_no_limiter() {
        assert!(
            RateLimiter::new(RateLimits::default(), Instant::now())
                .unwrap()
                .is_none()
        );
    }
}
