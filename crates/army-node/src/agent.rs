//! Connections to the agents in guests, and how VMs are used by them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use agent_proto::client::{ClientError, Connection};
use army_node_api::{Deadline, Error, ErrorKind, InUse, Result};
use clone_api::Client;
use clone_api::control::VmState;
use clone_host::runtime::RunningVm;

use crate::{Node, lock, not_running};

/// How long the first attempt to reach an agent may take, before the state of its VM is examined.
const FIRST_LIMIT: Duration = Duration::from_secs(1);
/// The pause between two attempts to reach an agent.
const AGENT_PAUSE: Duration = Duration::from_millis(5);

/// How a VM is used.
#[derive(Clone)]
pub(crate) struct Usage {
    /// The number of connections to its agent that are open.
    open: Arc<AtomicU64>,
    /// When the VM was last used.
    pub(crate) last: Instant,
}

impl Usage {
    /// The time since the VM was last used, which is now while there is a connection to its agent.
    pub(crate) fn idle_time(&mut self) -> Duration {
        if self.open.load(Ordering::Relaxed) > 0 {
            self.last = Instant::now();
        }
        self.last.elapsed()
    }
}

/// Counts one connection to a VM until it is dropped.
struct OpenConnection(Arc<AtomicU64>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Node {
    /// Connects to the agent in a VM. The VM counts as used while the second value lives, and is
    /// resumed where it was paused because it was idle. The connection has the same deadline.
    pub fn agent(&self, id: &str, deadline: Deadline) -> Result<(Connection, InUse)> {
        let in_use = self.begin_use(id)?;
        let vm = self.find(id)?;
        self.resume_idle(id, &vm)?;
        let mut first_limit = Some(Deadline::after(FIRST_LIMIT).min(deadline));
        loop {
            let limit = first_limit.take().unwrap_or(deadline);
            match Connection::open(&vm.dir.vsock_socket(), limit) {
                Ok(mut connection) => {
                    connection.set_deadline(deadline);
                    return Ok((connection, in_use));
                }
                // After a fork, the guest first has to notice that its former connections are gone.
                Err(ClientError::NoAgent | ClientError::Lost(_))
                    if deadline.remaining().is_some() =>
                {
                    if vm.process.wait(Some(AGENT_PAUSE))? {
                        return Err(not_running(id));
                    }
                    let info = Client::new(vm.dir.control_socket()).info();
                    if info.is_ok_and(|info| info.state == VmState::Paused) {
                        let message = "the VM is paused: resume it first";
                        return Err(Error::new(ErrorKind::Conflict, message));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Resumes a VM that was paused because it was idle.
    fn resume_idle(&self, id: &str, vm: &RunningVm) -> Result<()> {
        if self.journal.is_asleep(id) {
            Client::new(vm.dir.control_socket()).resume()?;
            self.reports.invalidate(id);
            self.journal.set_asleep(id, false)?;
        }
        Ok(())
    }

    /// Records that a VM is used at this moment.
    pub(crate) fn mark_used(&self, id: &str) {
        let mut usage = lock(&self.usage);
        let entry = usage.entry(id.to_owned()).or_insert_with(|| Usage {
            open: Arc::default(),
            last: Instant::now(),
        });
        entry.last = Instant::now();
    }

    fn begin_use(&self, id: &str) -> Result<InUse> {
        // The usage of a VM that is not in the journal is not recorded.
        self.journal.get(id)?;
        self.mark_used(id);
        let open = lock(&self.usage).get(id).map(|it| Arc::clone(&it.open));
        let open = open.unwrap_or_default();
        open.fetch_add(1, Ordering::Relaxed);
        Ok(InUse::until_dropped(OpenConnection(open)))
    }
}
