//! Connections to the agents in guests, and how VMs are used by them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use agent_client::{ClientError, Connection};
use army_node_api::{Deadline, Error, ErrorKind, Result};
use clone_api::Client;
use clone_api::control::VmState;
use clone_host::runtime::RunningVm;

use crate::service::blocking;
use crate::{Node, lock, not_running};

/// How long the first attempt to reach an agent may take, before the state of its VM is examined.
const FIRST_LIMIT: Duration = Duration::from_secs(1);
/// The pause between two attempts to reach an agent.
const AGENT_PAUSE: Duration = Duration::from_millis(5);

/// How many threads look at VMs at a time for those who connect to their agents. A VM's process that
/// hangs holds one until its control socket is given up.
pub(crate) const LOOKING: usize = 32;

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
    /// Connects to the agent in a VM. The VM counts as used while the connection lives, or what
    /// becomes of it. It is resumed where it was paused because it was idle, and woken where it
    /// is suspended. The connection has the same deadline.
    ///
    /// Waiting for the agent holds no thread. Threads are held only for looking at the VM.
    pub async fn agent(self: &Arc<Self>, id: &str, deadline: Deadline) -> Result<Connection> {
        let (node, vm_id) = (Arc::clone(self), id.to_owned());
        let begin = move || {
            let in_use = node.begin_use(&vm_id)?;
            let vm = node.find_awake(&vm_id)?;
            node.resume_idle(&vm_id, &vm)?;
            Ok((vm, in_use))
        };
        let (vm, in_use) = self.look(deadline, begin).await?;
        let mut first_limit = Some(Deadline::after(FIRST_LIMIT).min(deadline));
        loop {
            let limit = first_limit.take().unwrap_or(deadline);
            match Connection::open(&vm.dir.vsock_socket(), limit).await {
                Ok(mut connection) => {
                    connection.set_deadline(deadline);
                    return Ok(connection.keeping(in_use));
                }
                // After a fork, the guest first has to notice that its former connections are gone.
                Err(ClientError::NoAgent | ClientError::Lost(_))
                    if deadline.remaining().is_some() =>
                {
                    tokio::time::sleep(AGENT_PAUSE).await;
                    let (vm, id) = (vm.clone(), id.to_owned());
                    self.look(deadline, move || check_runs(&vm, &id)).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Looks at a VM on a thread for such work. Few such threads look for connections at a time,
    /// however many wait.
    async fn look<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let remaining = deadline.remaining().ok_or_else(Error::deadline_exceeded)?;
        let permit = tokio::time::timeout(remaining, self.looking.acquire()).await;
        let _permit = permit.map_err(|_| Error::deadline_exceeded())?;
        blocking(deadline, work).await
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

    fn begin_use(&self, id: &str) -> Result<OpenConnection> {
        // The usage of a VM that is not in the journal is not recorded.
        self.journal.get(id)?;
        self.mark_used(id);
        let open = lock(&self.usage).get(id).map(|it| Arc::clone(&it.open));
        let open = open.unwrap_or_default();
        open.fetch_add(1, Ordering::Relaxed);
        Ok(OpenConnection(open))
    }
}

/// Checks that a VM whose agent did not answer can still answer.
fn check_runs(vm: &RunningVm, id: &str) -> Result<()> {
    if vm.process.wait(Some(Duration::ZERO))? {
        return Err(not_running(id));
    }
    let info = Client::new(vm.dir.control_socket()).info();
    let message = match info.map(|info| info.state) {
        Ok(VmState::Paused) => "the VM is paused: resume it first",
        Ok(VmState::Moved | VmState::Arrived) => "the VM is being moved to another host",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Conflict, message))
}
