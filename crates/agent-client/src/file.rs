//! Files in a guest, in both directions. The deadline moves on with the bytes that travel, and does
//! not count the time that the caller takes between two calls.

use std::time::Instant;

use agent_proto::CHUNK;
use agent_proto::exchange::{self, IncomingFile, file_time};
use agent_proto::messages::{Empty, FileInfo, from_agent, from_host};

use crate::Result;
use crate::wire::Wire;

/// A file of the guest that is being read. Nothing more of it is read when this value is dropped.
pub struct Download {
    wire: Wire,
    file: IncomingFile,
    /// When the last call ended.
    last_call: Instant,
}

impl Download {
    pub(crate) fn new(wire: Wire, file: IncomingFile) -> Self {
        Self {
            wire,
            file,
            last_call: Instant::now(),
        }
    }

    /// What the agent said of the file.
    pub fn info(&self) -> FileInfo {
        self.file.info()
    }

    /// The next bytes; `None` at the end of the file.
    ///
    /// # Errors
    /// [`ClientError::TooMuch`](crate::ClientError::TooMuch) where the guest sends more than the
    /// limit.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        // A call that was dropped before counts as the caller's time, too.
        let by = self.last_call.elapsed();
        self.last_call = Instant::now();
        self.wire.set_timing(self.wire.timing().extended(by));
        let data = self.file.next(self.wire.receive().await?)?;
        let by = file_time(data.as_ref().map_or(0, Vec::len));
        self.wire.set_timing(self.wire.timing().extended(by));
        self.last_call = Instant::now();
        Ok(data)
    }
}

/// A file that is being written in the guest. The file does not appear when this value is dropped
/// before [`Upload::finish`] has returned.
pub struct Upload {
    wire: Wire,
    /// What the agent answered before the end.
    answer: Option<from_agent::Kind>,
    /// When the last call ended.
    last_call: Instant,
}

impl Upload {
    pub(crate) fn new(wire: Wire) -> Self {
        Self {
            wire,
            answer: None,
            last_call: Instant::now(),
        }
    }

    /// Writes bytes. Returns false where the agent takes no more of them; [`Upload::finish`] then
    /// tells why.
    ///
    /// # Errors
    /// Where the agent refused the file, or the deadline passed.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<bool> {
        self.extend_by_pause();
        for chunk in bytes.chunks(CHUNK) {
            if !self.send(from_host::Kind::Data(chunk.to_vec())).await? {
                return Ok(false);
            }
            let timing = self.wire.timing().extended(file_time(chunk.len()));
            self.wire.set_timing(timing);
        }
        self.last_call = Instant::now();
        Ok(true)
    }

    /// Ends the file, and waits until it has appeared.
    ///
    /// # Errors
    /// Where the agent refused the file, or the deadline passed.
    pub async fn finish(mut self) -> Result<()> {
        self.extend_by_pause();
        self.send(from_host::Kind::DataEnd(Empty {})).await?;
        let answer = match self.answer.take() {
            Some(answer) => answer,
            None => self.wire.receive().await?,
        };
        exchange::done(answer)
    }

    fn extend_by_pause(&mut self) {
        let timing = self.wire.timing().extended(self.last_call.elapsed());
        self.wire.set_timing(timing);
    }

    /// Sends a message, unless the agent takes no more.
    async fn send(&mut self, kind: from_host::Kind) -> Result<bool> {
        if !self.drain().await? {
            return Ok(false);
        }
        self.wire.queue(kind)?;
        self.drain().await
    }

    /// Waits until nothing is being sent. Returns false where the agent takes no more.
    async fn drain(&mut self) -> Result<bool> {
        while self.answer.is_none() && !self.wire.is_write_lost() {
            // An agent that refuses the file says so before it has read all of it.
            self.answer = self.wire.next_message()?;
            if self.wire.is_idle() {
                break;
            }
            if self.answer.is_none() {
                self.wire.progress().await?;
            }
        }
        Ok(self.answer.is_none() && !self.wire.is_write_lost())
    }
}
