//! The sending side of a connection to an agent. All sending threads share it, so that messages are
//! not mixed.

use std::io;
use std::net::Shutdown as SocketEnd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

use super::socket::{write_by, write_now};
use crate::deadline::Deadline;
use crate::error::ClientError;
use crate::exchange::{InputCredit, Timing, encode};
use crate::messages::from_host;

/// The sending side.
pub(super) struct Outgoing {
    /// The stream, locked by a sender for one message.
    stream: Mutex<UnixStream>,
    /// The same stream, for a thread that closes it while another is blocked in sending.
    end: UnixStream,
    /// The time limits, read before every message and changed only by the connection's owner.
    timing: Mutex<Timing>,
    credit: Mutex<Credit>,
    /// Notified when `credit` changed.
    credit_changed: Condvar,
}

/// The number of bytes of input that may be sent.
#[derive(Default)]
struct Credit {
    input: InputCredit,
    lost: bool,
}

impl Outgoing {
    pub(super) fn new(stream: &UnixStream, timing: Timing) -> io::Result<Self> {
        Ok(Self {
            stream: Mutex::new(stream.try_clone()?),
            end: stream.try_clone()?,
            timing: Mutex::new(timing),
            credit: Mutex::default(),
            credit_changed: Condvar::new(),
        })
    }

    pub(super) fn timing(&self) -> Timing {
        *lock(&self.timing)
    }

    pub(super) fn set_timing(&self, timing: Timing) {
        *lock(&self.timing) = timing;
    }

    pub(super) fn disconnect(&self) {
        // A stream that is already disconnected is in the wanted state.
        let _ = self.end.shutdown(SocketEnd::Both);
    }

    pub(super) fn send(&self, kind: from_host::Kind) -> Result<(), ClientError> {
        self.send_by(kind, self.timing().of_message())
    }

    pub(super) fn send_by(
        &self,
        kind: from_host::Kind,
        deadline: Deadline,
    ) -> Result<(), ClientError> {
        let bytes = encode(kind)?;
        self.write(&lock(&self.stream), &bytes, deadline)
    }

    /// Sends a message if it can be sent without blocking; returns whether it was sent.
    pub(super) fn try_send(&self, kind: from_host::Kind) -> Result<bool, ClientError> {
        let bytes = encode(kind)?;
        let stream = match self.stream.try_lock() {
            Ok(stream) => stream,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(false),
        };
        match write_now(&stream, &bytes)? {
            0 => Ok(false),
            sent => {
                let deadline = self.timing().of_message();
                self.write(&stream, &bytes[sent..], deadline).map(|()| true)
            }
        }
    }

    fn write(
        &self,
        stream: &UnixStream,
        bytes: &[u8],
        deadline: Deadline,
    ) -> Result<(), ClientError> {
        let sent = write_by(stream, bytes, deadline);
        if matches!(sent, Err(ClientError::Late)) {
            // A part of the message may have been sent, so no other message can follow.
            self.disconnect();
        }
        sent
    }

    /// Records how much input the command has read.
    pub(super) fn input_taken(&self, taken: u64) {
        self.change_credit(|credit| credit.input.taken(taken));
    }

    /// Ends all waiting for credit, since no thread reads the agent's messages any more.
    pub(super) fn lose_credit(&self) {
        self.change_credit(|credit| credit.lost = true);
    }

    fn change_credit(&self, change: impl FnOnce(&mut Credit)) {
        change(&mut lock(&self.credit));
        self.credit_changed.notify_all();
    }

    /// Waits until `len` more bytes of input may be sent, and counts them as sent.
    pub(super) fn take_credit(&self, len: u64) -> Result<(), ClientError> {
        let mut credit = lock(&self.credit);
        while !credit.lost && len > credit.input.available() {
            credit = self
                .credit_changed
                .wait(credit)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if credit.lost {
            return Err(ClientError::Lost(io::ErrorKind::NotConnected.into()));
        }
        credit.input.spend(len);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
