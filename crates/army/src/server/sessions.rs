//! Sessions: connections to guests, of commands, terminals, ports and files.
//!
//! A handler reaches a guest only by [`App::guest`], which takes a permit first. The permit is kept
//! by the connection, and so by whatever becomes of it. What goes on for some time must end when
//! [`Ending`] says so.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_client::{ClientError, Connection, Event, Running};
use army_api::vms::Vm;
use army_api::{Problem, ProblemKind};
use army_node_api::serve::Stopping;
use axum::extract::ws::{CloseFrame, close_code};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::auth::Caller;
use super::{AGENT_LIMIT, Answer, App, Failure};
use army_controller::Error;

/// When a request that a limit refused is worth repeating, in seconds.
const RETRY_S: u32 = 5;

/// How long after a move a lost connection is taken for one that the move has ended.
const SETTLED: Duration = Duration::from_secs(10);
/// The time until such a connection is made again.
const RECONNECT_WAIT: Duration = Duration::from_millis(200);

/// How many sessions there may be at a time. People who use VMs do not meet these limits.
#[derive(Debug, Clone, Copy)]
pub struct SessionLimits {
    /// The most sessions with one VM.
    pub per_vm: usize,
    /// The most sessions of one key.
    pub per_key: usize,
    /// The most sessions of all keys of one tenant.
    pub per_tenant: usize,
    /// The most sessions of the server.
    pub total: usize,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            per_vm: 256,
            per_key: 1000,
            per_tenant: 4000,
            total: 16_000,
        }
    }
}

/// The sessions of a server.
#[derive(Clone)]
pub(super) struct Sessions(Arc<Shared>);

struct Shared {
    limits: SessionLimits,
    stopping: Stopping,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    total: usize,
    vms: HashMap<String, usize>,
    tenants: HashMap<String, usize>,
    keys: HashMap<String, OfKey>,
}

/// The sessions of one key.
struct OfKey {
    sessions: usize,
    removed: watch::Receiver<bool>,
    /// Waits for the removal of the key.
    watcher: AbortHandle,
}

/// The permit for one session, until it is dropped.
struct Permit {
    sessions: Sessions,
    vm: String,
    tenant: String,
    key: String,
}

/// A connection to a guest, before its one request.
pub(super) struct Guest {
    /// The connection, which keeps the session's permit.
    pub(super) connection: Connection,
    /// When the session has to end.
    pub(super) ending: Ending,
}

/// Tells when something that goes on for some time has to end.
#[derive(Clone)]
pub(super) struct Ending {
    removed: watch::Receiver<bool>,
    stopping: Stopping,
}

/// Why something has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// The caller's key was removed.
    KeyRemoved,
    /// The server stops.
    Stopping,
}

impl App {
    /// Connects to the agent in a VM, whose one request may take `limit`.
    pub(super) async fn guest(&self, caller: &Caller, vm: &Vm, limit: Duration) -> Answer<Guest> {
        let (permit, ending) = self.sessions.begin(caller, &vm.id)?;
        let connection = self.controller.agent(vm, limit).await?;
        Ok(Guest {
            connection: connection.keeping(permit),
            ending,
        })
    }
}

/// A command in a guest, which is followed to the host that its VM moves to.
pub(super) struct Followed {
    app: App,
    caller: Caller,
    vm: Vm,
    /// How long the command may take; `None` where it may run and be silent as long as it likes.
    limit: Option<Duration>,
    /// Whether output is read beside the client that is attached to the command.
    observes: bool,
    /// When the VM was last seen to have moved, or to be about to.
    moved: Option<Instant>,
    running: Running,
}

impl Followed {
    /// Follows a command of `vm`, which may take `limit`, or as long as it likes.
    pub(super) fn new(
        app: &App,
        caller: &Caller,
        vm: &Vm,
        limit: Option<Duration>,
        running: Running,
    ) -> Self {
        Self {
            app: app.clone(),
            caller: caller.clone(),
            vm: vm.clone(),
            limit,
            observes: false,
            moved: None,
            running,
        }
    }

    /// Lets the command be read beside the client that is attached to it.
    pub(super) fn observing(mut self, observes: bool) -> Self {
        self.observes = observes;
        self
    }

    /// What happens next. Where the connection was lost because the VM has moved, the command goes on at
    /// the VM's new host, from where its output and its input were.
    ///
    /// # Errors
    /// Where the connection is lost for another reason, or cannot be made again.
    pub(super) async fn next_event(&mut self) -> Answer<Event> {
        loop {
            match self.running.next_event().await {
                Ok(event) => return Ok(event),
                Err(lost) => self.go_on(lost).await?,
            }
        }
    }

    /// Connects to the command again after a connection was lost by a move of the VM. A guest that has
    /// just arrived, or is about to leave, may end the new one, too.
    async fn go_on(&mut self, mut lost: ClientError) -> Answer<()> {
        loop {
            let mut moves = self.follow().await;
            match moves || self.has_just_moved() {
                true => tokio::time::sleep(RECONNECT_WAIT).await,
                false => return Err(Error::from(lost).into()),
            }
            let limit = self.limit.unwrap_or(AGENT_LIMIT);
            let guest = self.app.guest(&self.caller, &self.vm, limit).await?;
            // It is where the connection was made to, or will be.
            moves |= self.follow().await;
            if moves {
                self.moved = Some(Instant::now());
            }
            let id = self.running.started().id;
            let arrived = self.running.arrived();
            let again = match self.observes {
                true => guest.connection.observe(id, arrived).await,
                false => guest.connection.attach(id, arrived).await,
            };
            let again = match again {
                Ok(again) => again.in_place_of(&mut self.running),
                Err(error @ ClientError::Lost(_)) => {
                    lost = error;
                    continue;
                }
                Err(error) => return Err(Error::from(error).into()),
            };
            self.running = match self.limit {
                // It has as much time from now on.
                Some(_) => again,
                None => again.streaming(),
            };
            return Ok(());
        }
    }

    /// Looks where the VM is. Returns whether it has moved since the last look, or is about to.
    async fn follow(&mut self) -> bool {
        match self.app.controller.moved_since(&self.vm).await {
            Ok(Some(now)) => {
                self.vm = now;
                true
            }
            Ok(None) | Err(_) => false,
        }
    }

    fn has_just_moved(&self) -> bool {
        self.moved.is_some_and(|at| at.elapsed() < SETTLED)
    }

    /// The command.
    pub(super) fn get(&self) -> &Running {
        &self.running
    }

    /// The command, for its input.
    pub(super) fn get_mut(&mut self) -> &mut Running {
        &mut self.running
    }
}

impl Sessions {
    pub(super) fn new(limits: SessionLimits, stopping: Stopping) -> Self {
        Self(Arc::new(Shared {
            limits,
            stopping,
            counts: Mutex::default(),
        }))
    }

    /// The number of sessions, and the limits by their names.
    pub(super) fn figures(&self) -> (usize, [(&'static str, usize); 4]) {
        let limits = &self.0.limits;
        let named = [
            ("sessions_per_vm", limits.per_vm),
            ("sessions_per_key", limits.per_key),
            ("sessions_per_tenant", limits.per_tenant),
            ("sessions", limits.total),
        ];
        (self.lock().total, named)
    }

    /// The end of something of the caller that is no session with a guest.
    pub(super) fn ending(&self, caller: &Caller) -> Ending {
        let (sender, removed) = watch::channel(false);
        let revoked = caller.revoked();
        tokio::spawn(async move {
            tokio::select! {
                () = revoked => {
                    sender.send_replace(true);
                }
                () = sender.closed() => {}
            }
        });
        Ending {
            removed,
            stopping: self.0.stopping.clone(),
        }
    }

    fn begin(&self, caller: &Caller, vm: &str) -> Result<(Permit, Ending), Failure> {
        let (key, tenant) = (&caller.key.id, &caller.key.tenant);
        let mut counts = self.lock();
        let of_key = counts.keys.get(key).map_or(0, |it| it.sessions);
        let limits = &self.0.limits;
        let count = |map: &HashMap<String, usize>, key: &str| map.get(key).copied().unwrap_or(0);
        for (whose, name, taken, limit) in [
            (
                "the VM",
                "sessions_per_vm",
                count(&counts.vms, vm),
                limits.per_vm,
            ),
            ("this key", "sessions_per_key", of_key, limits.per_key),
            (
                "the tenant",
                "sessions_per_tenant",
                count(&counts.tenants, tenant),
                limits.per_tenant,
            ),
            ("the server", "sessions", counts.total, limits.total),
        ] {
            if taken >= limit {
                return Err(refused(whose, name, limit).into());
            }
        }
        counts.total += 1;
        *counts.vms.entry(vm.to_owned()).or_default() += 1;
        *counts.tenants.entry(tenant.clone()).or_default() += 1;
        let of_key = counts.keys.entry(key.clone()).or_insert_with(|| {
            let (sender, removed) = watch::channel(false);
            let revoked = caller.revoked();
            let watcher = tokio::spawn(async move {
                revoked.await;
                sender.send_replace(true);
            });
            OfKey {
                sessions: 0,
                removed,
                watcher: watcher.abort_handle(),
            }
        });
        of_key.sessions += 1;
        let ending = Ending {
            removed: of_key.removed.clone(),
            stopping: self.0.stopping.clone(),
        };
        let permit = Permit {
            sessions: self.clone(),
            vm: vm.to_owned(),
            tenant: tenant.clone(),
            key: key.clone(),
        };
        Ok((permit, ending))
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(whose: &str, name: &str, limit: usize) -> Problem {
    let detail = format!(
        "{whose} has {limit} connections to guests (commands, terminals, ports, files), which is \
         the limit `{name}`"
    );
    Problem::new(ProblemKind::Busy, detail)
        .advise("end some of them, or try again later")
        .retry_after(RETRY_S)
        .limited_by(name, limit as u64)
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.sessions.lock();
        counts.total -= 1;
        decrease(&mut counts.vms, &self.vm);
        decrease(&mut counts.tenants, &self.tenant);
        if let Some(of_key) = counts.keys.get_mut(&self.key) {
            of_key.sessions -= 1;
            if of_key.sessions == 0 {
                of_key.watcher.abort();
                counts.keys.remove(&self.key);
            }
        }
    }
}

fn decrease(counts: &mut HashMap<String, usize>, key: &str) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Ending {
    /// Completes when the caller's key is removed, or the server stops.
    pub(super) async fn reason(&mut self) -> Reason {
        tokio::select! {
            () = removed(&mut self.removed) => Reason::KeyRemoved,
            () = self.stopping.begun() => Reason::Stopping,
        }
    }

    /// Completes when the caller's key is removed. A response that ends by itself may be finished
    /// when the server stops.
    pub(super) async fn key_removed(&mut self) {
        removed(&mut self.removed).await;
    }

    /// Carries out work unless the caller's key is removed.
    pub(super) async fn unless_removed<T>(
        &mut self,
        work: impl Future<Output = Answer<T>>,
    ) -> Answer<T> {
        tokio::select! {
            done = work => done,
            () = self.key_removed() => {
                let detail = "the key was removed while the request was carried out";
                Err(Problem::new(ProblemKind::Unauthorized, detail).into())
            }
        }
    }
}

async fn removed(receiver: &mut watch::Receiver<bool>) {
    if receiver.wait_for(|removed| *removed).await.is_err() {
        // The watcher was ended, so nobody waits for this any more.
        std::future::pending::<()>().await;
    }
}

impl Reason {
    /// The last message on a WebSocket that ends for this reason.
    pub(super) fn close_frame(self) -> CloseFrame {
        let (code, reason) = match self {
            Self::KeyRemoved => (close_code::POLICY, "the key was removed"),
            Self::Stopping => (close_code::AWAY, "the server stops"),
        };
        CloseFrame {
            code,
            reason: reason.into(),
        }
    }
}
