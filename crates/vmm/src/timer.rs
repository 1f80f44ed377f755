//! A timer that the event loop can wait on, over timerfd.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A monotonic timer, which is off until it is armed. It is readable (`EPOLLIN`) from the time when
/// it is due until [`Timer::take`].
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
}

impl Timer {
    /// A timer that is off. It has a file descriptor, so it is made before the process is jailed.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        })
    }

    /// Makes the timer due once, after `delay` (at least a nanosecond).
    pub fn arm_once(&self, delay: Duration) -> io::Result<()> {
        self.set(delay.max(Duration::from_nanos(1)), Duration::ZERO)
    }

    /// Makes the timer due every `interval`, first after one interval. Zero switches the timer off.
    pub fn arm_every(&self, interval: Duration) -> io::Result<()> {
        self.set(interval, interval)
    }

    /// Switches the timer off.
    pub fn disarm(&self) -> io::Result<()> {
        self.set(Duration::ZERO, Duration::ZERO)
    }

    /// Acknowledges that the timer was due. Returns `false` if it was not.
    pub fn take(&self) -> io::Result<bool> {
        let mut expirations = [0; 8];
        match rustix::io::read(&self.fd, &mut expirations) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn set(&self, first: Duration, interval: Duration) -> io::Result<()> {
        let value = Itimerspec {
            it_interval: timespec(interval),
            it_value: timespec(first),
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &value)?;
        Ok(())
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_due_only_when_armed_and_only_until_taken() {
        let timer = Timer::new().unwrap();
        assert!(!timer.take().unwrap());
        timer.arm_once(Duration::ZERO).unwrap();
        while !timer.take().unwrap() {
            std::thread::yield_now();
        }
        assert!(!timer.take().unwrap());
        timer.arm_every(Duration::from_secs(3600)).unwrap();
        assert!(!timer.take().unwrap());
        timer.disarm().unwrap();
    }
}
