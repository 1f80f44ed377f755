//! A host's side: the VMs of one host, their journal, their standbys.
//!
//! Everything here blocks; callers put it on threads of their own. The node owns the truth about
//! its VMs: [`journal`] is what it remembers of them across its own death, the VMs' directories and
//! processes are what is. [`supervise`] brings the two together, again and again, and enforces
//! times to live and idle policies without asking anybody. Who may do what is not known here.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod capacity;
pub mod journal;
pub mod membership;
mod report;
mod service;
pub mod standbys;
pub mod supervise;
mod watch;

use std::collections::HashMap;
use std::io::{self, BufReader, BufWriter};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use agent_proto::client::{ClientError, Connection};
use army_api::templates::CpuFeatures;
use army_api::vms::Balloon;
use clone::launch::fork::{self, Overrides, Source};
use clone::launch::program;
use clone::runtime::{RunningVm, Runtime};
use clone::template::{Store, Template};
use clone_api::jail::JailStatus;
use clone_api::{Bytes, Client, ErrorCode};

use army_node_api::chunks::{ChunkReader, ChunkReceiver, ChunkSender, ChunkWriter};
use army_node_api::requests::{CreatedVm, TemplateFacts, VmSpec};
use army_node_api::validate::{self, check_template_name};
use army_node_api::{Deadline, Error, ErrorKind, InUse, Result};

use journal::{Entry, Journal, Stage};
use report::Seen;
pub use service::NodeService;
use standbys::Standbys;

/// What the names of Army's VMs begin with on their host.
pub const VM_PREFIX: &str = "army-";
/// How long it may take before it is looked at why.
const FIRST_LIMIT: Duration = Duration::from_secs(1);
/// The pause before it is tried again.
const AGENT_PAUSE: Duration = Duration::from_millis(5);

/// Bytes of a template that are sent in one chunk.
const CHUNK: usize = 256 << 10;

/// A host's VMs.
pub struct Node {
    name: String,
    runtime: Runtime,
    store: Store,
    journal: Journal,
    sources: Mutex<HashMap<String, Arc<Source>>>,
    standbys: Standbys,
    receiving: Mutex<()>,
    seen: Seen,
    /// The CPU features that clones can have here.
    cpu: Option<CpuFeatures>,
    /// When each VM was last used, by id.
    used: Mutex<HashMap<String, Use>>,
    /// How complete the jail of VMs is on this host, once that was found out.
    jail: OnceLock<JailStatus>,
}

/// How a VM is used.
#[derive(Clone)]
struct Use {
    /// Connections to its agent now.
    open: Arc<AtomicU64>,
    /// When there was one last.
    last: Instant,
}

impl Node {
    /// The node of this host, with its journal in `state`; what an earlier life of it left is
    /// taken up: VMs that run are its own again, and those that were on their way are ended.
    pub fn open(name: String, state: PathBuf, runtime: Runtime, store: Store) -> Result<Arc<Self>> {
        program::keep();
        let journal = Journal::open(state)?;
        let node = Arc::new(Self {
            name,
            receiving: Mutex::default(),
            standbys: Standbys::new(runtime.clone()),
            runtime,
            store,
            journal,
            sources: Mutex::default(),
            seen: Seen::default(),
            cpu: host_cpu(),
            used: Mutex::default(),
            jail: OnceLock::new(),
        });
        node.take_up();
        Ok(node)
    }

    /// Finds out how complete the jail of VMs is on this host, for reports.
    ///
    /// # Errors
    /// Where it lacks a layer that this node requires of its VMs: none could be made.
    pub fn check_jail(&self) -> clone::Result<()> {
        let jail = clone::launch::check_jail(&self.runtime)?;
        for warning in jail.warnings() {
            tracing::warn!("{warning}");
        }
        let checked = self.runtime.required_jail().check(&jail);
        let _ = self.jail.set(jail);
        checked
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes clones of a template, one for each entry; results in the same order. An entry that is
    /// known already is answered with what became of it, and not made twice.
    pub fn create(&self, template: &str, vms: &[VmSpec]) -> Vec<Result<CreatedVm>> {
        match self.source(template) {
            Ok(source) => {
                let made = self.fork(&source, vms);
                if made.iter().any(Result::is_err) {
                    // Its files may have been replaced: the next request looks at them again.
                    lock(&self.sources).remove(template);
                }
                made
            }
            Err(error) => vms.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    /// Makes forks of a running VM, which goes on.
    pub fn fork_live(&self, id: &str, vms: &[VmSpec]) -> Vec<Result<CreatedVm>> {
        let source = self
            .find(id)
            .and_then(|vm| Source::live(&self.runtime, &vm).map_err(Error::from));
        match source {
            Ok((source, _)) => self.fork(&source, vms),
            Err(error) => vms.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    fn fork(&self, source: &Source, vms: &[VmSpec]) -> Vec<Result<CreatedVm>> {
        let entries: Vec<Entry> = vms.iter().map(Entry::from).collect();
        // The VMs of a request are alike.
        let network = entries.first().and_then(|entry| entry.network.as_ref());
        let egress = match network.map(validate::egress).transpose() {
            Ok(egress) => egress,
            Err(error) => return vms.iter().map(|_| Err(error.clone())).collect(),
        };
        // Written before anything is made: whatever dies in between, somebody knows of the VM.
        let begin = |entry: &Entry| self.journal.begin(&entry.beginning(supervise::boot_ms()));
        let written: Vec<Result<()>> = entries.iter().map(begin).collect();
        let chosen: Vec<&Entry> = entries
            .iter()
            .zip(&written)
            .filter_map(|(entry, written)| written.is_ok().then_some(entry))
            .collect();
        let names: Vec<String> = chosen.iter().map(|entry| vm_name(&entry.id)).collect();
        let overrides = Overrides {
            egress,
            host_names: chosen.iter().map(|entry| entry.name.clone()).collect(),
            ..Overrides::default()
        };
        let mut made = fork::fork(&self.runtime, source, &names, &overrides, true)
            .into_iter()
            .zip(&chosen)
            .map(|(result, entry)| {
                let result = result.map_err(Error::from);
                let stage = match &result {
                    Ok(_) => Stage::Running,
                    Err(error) => Stage::Failed(error.message.clone()),
                };
                self.journal.advance(&entry.id, stage)?;
                self.touch(&entry.id);
                result.map(|forked| CreatedVm {
                    warm: forked.warm,
                    running_us: forked.running_us,
                    identity_us: forked.identity_us.unwrap_or(0),
                    notices: forked.notices,
                })
            })
            .collect::<Vec<_>>()
            .into_iter();
        let lost = || Err(Error::new(ErrorKind::Internal, "the fork has no result"));
        written
            .into_iter()
            .map(|written| written.and_then(|()| made.next().unwrap_or_else(lost)))
            .collect()
    }

    /// Ends a VM. One that is over already is no error.
    pub fn destroy(&self, id: &str, reason: &str) -> Result<()> {
        self.journal
            .advance(id, Stage::Ended(reason.to_owned()))
            .or_else(|error| match error.kind {
                ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })?;
        match self.runtime.find(&vm_name(id)) {
            Ok(vm) => fork::end(&self.runtime, &vm),
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        lock(&self.used).remove(id);
        Ok(())
    }

    /// Stops a VM's CPUs.
    pub fn pause(&self, id: &str) -> Result<()> {
        let paused = self.client(id)?.pause();
        self.seen.forget(id);
        paused.map_err(Error::from)
    }

    /// Sets them going again.
    pub fn resume(&self, id: &str) -> Result<()> {
        self.touch(id);
        let resumed = self.client(id)?.resume();
        self.seen.forget(id);
        resumed.map_err(Error::from)
    }

    /// A VM's balloon; with `bytes` after asking for that size.
    pub fn balloon(&self, id: &str, bytes: Option<u64>) -> Result<Balloon> {
        let client = self.client(id)?;
        let status = match bytes {
            Some(bytes) => client.set_balloon(Bytes(bytes)),
            None => client.balloon(),
        };
        if bytes.is_some() {
            self.seen.forget(id);
        }
        let status = status.map_err(Error::from)?;
        Ok(Balloon {
            target_bytes: status.target_bytes,
            actual_bytes: status.actual_bytes,
            available_bytes: status.guest.and_then(|guest| guest.available_bytes),
        })
    }

    /// Makes a template of a running VM, which goes on.
    pub fn snapshot(&self, id: &str, template: &str, diff: bool) -> Result<TemplateFacts> {
        let vm = self.find(id)?;
        let target = self.template_path(template)?;
        let (template, _) =
            clone::snapshot::take(&self.runtime, &vm, &target, diff).map_err(Error::from)?;
        Ok(facts(&template))
    }

    /// A connection to a VM's agent. While it lives, the VM counts as used; one that was paused
    /// for idleness goes on. The connection's deadline is the one of this call.
    pub fn agent(&self, id: &str, deadline: Deadline) -> Result<(Connection, InUse)> {
        let in_use = self.use_vm(id)?;
        let vm = self.find(id)?;
        self.wake(id, &vm)?;
        let mut first = Some(Deadline::after(FIRST_LIMIT).min(deadline));
        loop {
            let limit = first.take().unwrap_or(deadline);
            match Connection::open(&vm.dir.vsock_socket(), limit) {
                Ok(mut connection) => {
                    connection.set_deadline(deadline);
                    return Ok((connection, in_use));
                }
                // After a fork the guest first hears that its former connections are gone.
                Err(ClientError::NoAgent | ClientError::Lost(_))
                    if deadline.remaining().is_some() =>
                {
                    if vm.process.wait(Some(AGENT_PAUSE))? {
                        return Err(gone(id));
                    }
                    let info = Client::new(vm.dir.control_socket()).info();
                    if info.is_ok_and(|info| info.state == clone_api::control::VmState::Paused) {
                        let message = "the VM is paused: resume it first";
                        return Err(Error::new(ErrorKind::Conflict, message));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What is known of a template in this host's store.
    pub fn template(&self, name: &str) -> Result<TemplateFacts> {
        Ok(facts(&self.open_template(name)?))
    }

    /// Receives a template from a stream; with `id` only if it is that one.
    pub fn receive_template(
        &self,
        name: &str,
        id: Option<&str>,
        content: ChunkReceiver,
    ) -> Result<TemplateFacts> {
        let target = self.template_path(name)?;
        // One travels at a time: two of a name would be in each other's way.
        let _turn = lock(&self.receiving);
        let mut source = BufReader::with_capacity(CHUNK, ChunkReader::new(content));
        let template = clone::template::receive(&target, id, &mut source, &self.runtime)?;
        Ok(facts(&template))
    }

    /// Opens a template, to be sent or forked.
    fn open_template(&self, name: &str) -> Result<Template> {
        Ok(Template::open(&self.template_path(name)?)?)
    }

    /// Verifies a template and keeps `standbys` clones of it ready from now on.
    pub fn keep(&self, name: &str, standbys: u32) -> Result<()> {
        let template = self.open_template(name)?;
        self.standbys.keep(name, template, standbys);
        Ok(())
    }

    /// Removes a template that nobody uses.
    pub fn remove_template(&self, name: &str) -> Result<()> {
        check_template_name(name)?;
        self.standbys.stop(name);
        lock(&self.sources).remove(name);
        let id = self
            .open_template(name)
            .ok()
            .map(|it| it.manifest().id.clone());
        self.store.remove(name).map_err(Error::from)?;
        match id {
            Some(id) => clone::template::forget_verified(&self.runtime, &id).map_err(Error::from),
            None => Ok(()),
        }
    }

    fn source(&self, name: &str) -> Result<Arc<Source>> {
        if let Some(source) = lock(&self.sources).get(name) {
            return Ok(Arc::clone(source));
        }
        let source =
            Source::template(&self.open_template(name)?, &self.runtime).map_err(Error::from)?;
        let source = Arc::new(source);
        lock(&self.sources).insert(name.to_owned(), Arc::clone(&source));
        Ok(source)
    }

    fn template_path(&self, name: &str) -> Result<PathBuf> {
        check_template_name(name)?;
        self.store.path(name).map_err(Error::from)
    }

    fn find(&self, id: &str) -> Result<RunningVm> {
        self.runtime
            .find(&vm_name(id))
            .map_err(|error| match error.code {
                ErrorCode::NotFound => gone(id),
                _ => Error::from(error),
            })
    }

    fn client(&self, id: &str) -> Result<Client> {
        Ok(Client::new(self.find(id)?.dir.control_socket()))
    }

    fn wake(&self, id: &str, vm: &RunningVm) -> Result<()> {
        if self.journal.is_asleep(id) {
            Client::new(vm.dir.control_socket())
                .resume()
                .map_err(Error::from)?;
            self.seen.forget(id);
            self.journal.set_asleep(id, false)?;
        }
        Ok(())
    }

    fn touch(&self, id: &str) {
        let mut used = lock(&self.used);
        let entry = used.entry(id.to_owned()).or_insert_with(|| Use {
            open: Arc::default(),
            last: Instant::now(),
        });
        entry.last = Instant::now();
    }

    fn use_vm(&self, id: &str) -> Result<InUse> {
        // What is over is not remembered as used.
        self.journal.get(id)?;
        self.touch(id);
        let open = lock(&self.used).get(id).map(|it| Arc::clone(&it.open));
        let open = open.unwrap_or_default();
        open.fetch_add(1, Ordering::Relaxed);
        Ok(InUse::until_dropped(Connected(open)))
    }
}

/// Counts one connection to a VM until it is dropped.
struct Connected(Arc<AtomicU64>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A VM's name on its host.
fn vm_name(id: &str) -> String {
    format!("{VM_PREFIX}{id}")
}

fn facts(template: &Template) -> TemplateFacts {
    let content = template.content();
    TemplateFacts {
        id: template.manifest().id.clone(),
        parent: content.parent.clone(),
        memory_bytes: content.memory.bytes,
        data_bytes: content.memory.layers.iter().map(|it| it.data_bytes).sum(),
        vcpus: content.shape.vcpus,
        taken_ms: content.created_unix_ms,
        cpu: Some(cpu_features(content.cpu.clone())),
    }
}

/// Clone's account of CPU features, as Army's API gives it.
fn cpu_features(cpu: clone_api::control::CpuFeatures) -> CpuFeatures {
    CpuFeatures {
        vendor: cpu.vendor,
        features: cpu.features,
    }
}

/// The CPU features of this host; none where they cannot be found out.
fn host_cpu() -> Option<CpuFeatures> {
    match clone::cpu::of_host() {
        Ok(cpu) => Some(cpu_features(cpu)),
        Err(error) => {
            // The first fork fails by it, and tells the client.
            tracing::warn!(
                message = error.message,
                "this host's CPU features are unknown"
            );
            None
        }
    }
}

/// Sends all of a template. An error is the last item of the stream.
fn send_template(template: &Template, sender: ChunkSender) {
    let mut sink = BufWriter::with_capacity(CHUNK, ChunkWriter(sender.clone()));
    if let Err(error) = clone::template::send(template, &mut sink) {
        let _ = sender.blocking_send(Err(io::Error::other(error.message)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone(id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the VM {id} does not run"))
}
