//! The control socket's server: HTTP/1.1 and JSON from the VM's event loop.
//!
//! Nothing here blocks: each client has a bounded buffer in each direction, and a slow client
//! delays only itself. Operations on the VM go through [`VmControl`], so the server is tested
//! without a machine. Every route of `clone_api::routes` is served: [`dispatch`] matches on the
//! operations.

mod connection;
mod dispatch;
pub mod http;
mod later;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use clone_api::checkpoints::{CheckpointList, CheckpointName, NewCheckpoint};
use clone_api::control::{
    Adoption, BalloonStatus, ConsoleInfo, MigrationRequest, MigrationStatus, SnapshotRequest,
    TouchedPages, VmInfo, VmStats,
};
use clone_api::{ApiError, Bytes};
use clone_vmm::event_loop::{EventHandler, Registrar};
use vmm_sys_util::epoll::EventSet;

use connection::Connection;
use later::Later;
pub use later::Responder;

/// The most connections at once. One more closes the connection that was idle longest.
const MAX_CONNECTIONS: usize = 32;

const LISTENER: u32 = 0;
const ANSWERS: u32 = 1;
const FIRST_CONNECTION: u32 = 2;

/// The operations that a VM offers through its control socket. No call may block for long.
pub trait VmControl: Send {
    /// Returns the VM's description and state.
    fn info(&self) -> VmInfo;
    /// Returns the VM's use of resources.
    fn stats(&mut self) -> Result<VmStats, ApiError>;
    /// Stops vCPUs and devices; does nothing to a paused VM.
    fn pause(&mut self) -> Result<(), ApiError>;
    /// Resumes vCPUs and devices; does nothing to a running VM.
    fn resume(&mut self) -> Result<(), ApiError>;
    /// Asks the guest to shut down.
    fn power_button(&mut self) -> Result<(), ApiError>;
    /// Ends the VM after the answer is sent.
    fn kill(&mut self);
    /// Returns the balloon's status.
    fn balloon(&mut self) -> Result<BalloonStatus, ApiError>;
    /// Sets the balloon's target size, and returns its status.
    fn set_balloon(&mut self, size: Bytes) -> Result<BalloonStatus, ApiError>;
    /// Returns the paths of the console's socket and log.
    fn console(&self) -> ConsoleInfo;
    /// Takes a snapshot into `files` on another thread, which answers by `responder`.
    fn snapshot(&mut self, request: SnapshotRequest, files: Vec<OwnedFd>, responder: Responder);
    /// Returns the checkpoints.
    fn checkpoints(&self) -> Result<CheckpointList, ApiError>;
    /// Takes a checkpoint into `files` on another thread, which answers by `responder`.
    fn checkpoint(&mut self, new: NewCheckpoint, files: Vec<OwnedFd>, responder: Responder);
    /// Removes a checkpoint, and returns the others.
    fn remove_checkpoint(&mut self, name: &CheckpointName) -> Result<CheckpointList, ApiError>;
    /// Rewinds the VM on another thread, which answers by `responder`; `files` take the writes to
    /// the disks afterwards.
    fn rewind(&mut self, name: CheckpointName, files: Vec<OwnedFd>, responder: Responder);
    /// Gives a standby its name and lets its guest run, provided that its jail has the required
    /// layers.
    fn adopt(&mut self, adoption: &Adoption) -> Result<(), ApiError>;
    /// Moves the VM over the stream in `files` on another thread, which answers by `responder`.
    fn migrate(&mut self, request: MigrationRequest, files: Vec<OwnedFd>, responder: Responder);
    /// Takes in the VM that comes over the stream in `files` on another thread, which answers by
    /// `responder`.
    fn receive(&mut self, files: Vec<OwnedFd>, responder: Responder);
    /// Returns whether the VM is to run here, and how far its migration is.
    fn migration(&self) -> MigrationStatus;
    /// Lets the VM run where it was moved to, or ends it where it was before.
    fn confirm_migration(&mut self) -> Result<(), ApiError>;
    /// Lets the VM run where it was before its migration, or ends it where it has arrived.
    fn cancel_migration(&mut self) -> Result<(), ApiError>;
    /// Returns the pages that the guest has touched.
    fn touched_pages(&self) -> Result<TouchedPages, ApiError>;
}

/// The server, a handler in the event loop.
pub struct ControlServer {
    registrar: Registrar,
    listener: UnixListener,
    control: Box<dyn VmControl>,
    connections: Vec<Option<Connection>>,
    /// The answers that other threads give.
    later: Later,
    /// Counts events, to find the connection that was idle longest.
    clock: u64,
}

impl ControlServer {
    /// Makes a server that accepts clients of `listener`, which must be non-blocking, in
    /// `registrar`'s slot.
    pub fn new(
        registrar: Registrar,
        listener: UnixListener,
        control: Box<dyn VmControl>,
    ) -> io::Result<Self> {
        registrar.add(&listener, LISTENER, EventSet::IN)?;
        let later = Later::new()?;
        registrar.add(later.fd(), ANSWERS, EventSet::IN)?;
        Ok(Self {
            registrar,
            listener,
            control,
            connections: Vec::new(),
            later,
            clock: 0,
        })
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let index = self.free_slot();
            match self.welcome(index, stream) {
                // The request has most often arrived already: serving it now saves one wait, which
                // shortens a fork.
                Ok(()) => self.serve(index, EventSet::IN),
                Err(error) => {
                    tracing::warn!(%error, "a client of the control socket could not be served");
                }
            }
        }
    }

    /// Returns a free slot, if need be by closing the connection that was idle longest.
    fn free_slot(&mut self) -> usize {
        if let Some(free) = self.connections.iter().position(Option::is_none) {
            return free;
        }
        if self.connections.len() < MAX_CONNECTIONS {
            self.connections.push(None);
            return self.connections.len() - 1;
        }
        let active = |slot: &Option<Connection>| slot.as_ref().map_or(0, |c| c.last_active);
        let oldest = (0..self.connections.len()).min_by_key(|&i| active(&self.connections[i]));
        let oldest = oldest.unwrap_or(0);
        self.close(oldest);
        oldest
    }

    fn welcome(&mut self, index: usize, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.registrar
            .add(&stream, FIRST_CONNECTION + index as u32, EventSet::IN)?;
        self.connections[index] = Some(Connection::new(stream, self.later.next_id(), self.clock));
        Ok(())
    }

    fn close(&mut self, index: usize) {
        if let Some(connection) = self.connections[index].take() {
            // The stream is closed when the connection is dropped, which removes it from the loop
            // too.
            let _ = self.registrar.remove(connection.stream());
        }
    }

    /// Passes the answers of other threads to the connections that wait for them, where those still
    /// exist.
    fn answer_later(&mut self) {
        for later::Answer { id, response, then } in self.later.take() {
            let waits = |slot: &Option<Connection>| slot.as_ref().is_some_and(|c| c.id == id);
            if let Some(index) = self.connections.iter().position(waits)
                && let Some(connection) = &mut self.connections[index]
            {
                connection.complete(&response);
                self.serve(index, EventSet::empty());
            }
            if let Some(then) = then {
                then();
            }
        }
    }

    fn serve(&mut self, index: usize, ready: EventSet) {
        let Some(Some(connection)) = self.connections.get_mut(index) else {
            return;
        };
        let connection_id = connection.id;
        connection.last_active = self.clock;
        let control = self.control.as_mut();
        let token = FIRST_CONNECTION + index as u32;
        let responder = || self.later.responder(connection_id);
        let go_on = connection
            .advance(ready, |request, files| {
                dispatch::answer(control, request, files, responder)
            })
            .and_then(|open| {
                if open {
                    connection.watch(&self.registrar, token)?;
                }
                Ok(open)
            });
        match go_on {
            Ok(true) => {}
            Ok(false) => self.close(index),
            Err(error) => {
                tracing::debug!(%error, "a client of the control socket is gone");
                self.close(index);
            }
        }
    }
}

impl EventHandler for ControlServer {
    fn handle_event(&mut self, token: u32, ready: EventSet) {
        self.clock += 1;
        match token {
            LISTENER => self.accept(),
            ANSWERS => self.answer_later(),
            client => self.serve((client - FIRST_CONNECTION) as usize, ready),
        }
    }
}
