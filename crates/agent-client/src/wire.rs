//! Messages over a stream: one that is being sent, and those that arrive.
//!
//! All state is in [`Wire`] and none in its futures, so that each of them can be dropped at any
//! point, as `select!` does it.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use agent_proto::deadline::Deadline;
use agent_proto::error::ClientError;
use agent_proto::exchange::{InputCredit, Timing, encode};
use agent_proto::incoming::Incoming;
use agent_proto::messages::{from_agent, from_host};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{AgentSocket, Result};

/// The most that one read takes (bytes).
const READ: usize = 16 << 10;

/// A connection that carries messages.
pub(crate) struct Wire {
    pub(crate) socket: AgentSocket,
    incoming: Incoming,
    /// The one message that is being sent.
    outgoing: Vec<u8>,
    /// How much of it was sent.
    sent: usize,
    /// The transport may still hold a part of what was sent.
    is_unflushed: bool,
    /// The agent takes no more messages. What it has sent before can still be received.
    is_write_lost: bool,
    timing: Timing,
    /// The deadline of the outgoing message of a stream.
    send_by: Deadline,
    /// The deadline of a stream's message of which a part has arrived.
    receive_by: Option<Deadline>,
    /// How much input the agent lets us send.
    pub(crate) credit: InputCredit,
}

impl Wire {
    pub(crate) fn new(socket: AgentSocket, received: &[u8], deadline: Deadline) -> Self {
        let mut incoming = Incoming::default();
        incoming.push(received);
        Self {
            socket,
            incoming,
            outgoing: Vec::new(),
            sent: 0,
            is_unflushed: false,
            is_write_lost: false,
            timing: Timing::Exchange(deadline),
            send_by: deadline,
            receive_by: None,
            credit: InputCredit::default(),
        }
    }

    pub(crate) fn timing(&self) -> Timing {
        self.timing
    }

    pub(crate) fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// Whether no message is being sent, so that one can be queued.
    pub(crate) fn is_idle(&self) -> bool {
        self.outgoing.is_empty() && !self.is_unflushed
    }

    /// Whether the agent takes no more messages.
    pub(crate) fn is_write_lost(&self) -> bool {
        self.is_write_lost
    }

    /// Lets a message be sent. The wire must be idle. Nothing is sent to an agent that takes no
    /// more messages; what it sends tells why.
    pub(crate) fn queue(&mut self, kind: from_host::Kind) -> Result<()> {
        debug_assert!(self.is_idle(), "a message is being sent");
        if !self.is_write_lost {
            self.outgoing = encode(kind)?;
            self.sent = 0;
            self.send_by = self.timing.of_message();
        }
        Ok(())
    }

    /// The next message that has arrived as a whole.
    pub(crate) fn next_message(&mut self) -> Result<Option<from_agent::Kind>> {
        while let Some(kind) = self.incoming.next()? {
            self.receive_by = None;
            match kind {
                from_agent::Kind::InputTaken(taken) => self.credit.taken(taken),
                kind => return Ok(Some(kind)),
            }
        }
        Ok(None)
    }

    /// Waits for the next message, and sends meanwhile.
    pub(crate) async fn receive(&mut self) -> Result<from_agent::Kind> {
        loop {
            if let Some(kind) = self.next_message()? {
                return Ok(kind);
            }
            self.progress().await?;
        }
    }

    /// Sends a message, and waits for the next one.
    pub(crate) async fn exchange(&mut self, kind: from_host::Kind) -> Result<from_agent::Kind> {
        self.queue(kind)?;
        self.receive().await
    }

    /// Waits until something was sent or received.
    pub(crate) async fn progress(&mut self) -> Result<()> {
        let deadline = self.deadline();
        within(deadline, poll_fn(|context| self.poll(context, true))).await
    }

    /// Waits until the message is sent, without receiving any.
    pub(crate) async fn flush(&mut self) -> Result<()> {
        while !self.is_idle() {
            let deadline = self.sending_deadline();
            within(deadline, poll_fn(|context| self.poll(context, false))).await?;
        }
        Ok(())
    }

    /// What has to be over first: the exchange, the message that is being sent, or the one that is
    /// being received.
    fn deadline(&mut self) -> Option<Deadline> {
        if matches!(self.timing, Timing::Stream) && self.incoming.is_partial() {
            self.receive_by
                .get_or_insert_with(|| Timing::Stream.of_message());
        }
        let sending = self.sending_deadline();
        [sending, self.receive_by].into_iter().flatten().min()
    }

    fn sending_deadline(&self) -> Option<Deadline> {
        match self.timing {
            Timing::Exchange(deadline) => Some(deadline),
            Timing::Stream => (!self.is_idle()).then_some(self.send_by),
        }
    }

    fn poll(&mut self, context: &mut Context<'_>, receive: bool) -> Poll<Result<()>> {
        let has_sent = !self.is_idle() && self.poll_send(context).is_ready();
        let has_received = match receive {
            true => self.poll_receive(context)?.is_ready(),
            false => false,
        };
        match has_sent || has_received {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut socket = Pin::new(&mut self.socket);
        let result = if self.outgoing.is_empty() {
            let flushed = std::task::ready!(socket.poll_flush(context));
            flushed.map(|()| self.is_unflushed = false)
        } else {
            let rest = &self.outgoing[self.sent..];
            let sent = std::task::ready!(socket.as_mut().poll_write(context, rest));
            sent.and_then(|sent| match sent {
                0 => Err(io::ErrorKind::WriteZero.into()),
                sent => {
                    self.sent += sent;
                    Ok(())
                }
            })
        };
        if self.sent == self.outgoing.len() && !self.outgoing.is_empty() {
            self.outgoing = Vec::new();
            self.sent = 0;
            self.is_unflushed = true;
        }
        if result.is_err() {
            self.outgoing = Vec::new();
            self.sent = 0;
            self.is_unflushed = false;
            self.is_write_lost = true;
        }
        Poll::Ready(())
    }

    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let mut space = [0; READ];
        let mut buffer = ReadBuf::new(&mut space);
        let read = Pin::new(&mut self.socket).poll_read(context, &mut buffer);
        std::task::ready!(read).map_err(ClientError::Lost)?;
        match buffer.filled() {
            [] => Poll::Ready(Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into()))),
            bytes => {
                self.incoming.push(bytes);
                Poll::Ready(Ok(()))
            }
        }
    }
}

/// Awaits `future` until the deadline, where there is one.
pub(crate) async fn within<T>(
    deadline: Option<Deadline>,
    future: impl Future<Output = Result<T>>,
) -> Result<T> {
    match deadline {
        None => future.await,
        Some(deadline) => {
            // A peer that always has something ready must not outlive the deadline either.
            let remaining = deadline.remaining().ok_or(ClientError::Late)?;
            let result = tokio::time::timeout(remaining, future).await;
            result.unwrap_or(Err(ClientError::Late))
        }
    }
}
