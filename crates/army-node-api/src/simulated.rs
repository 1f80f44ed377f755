//! A node without VMs, for tests and for measurements of the controller.

mod moves;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use agent_client::{AgentSocket, Transport};
use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_api::figures::VmFigures;
use army_api::hosts::Capacity;
use army_api::templates::CpuFeatures;
use army_api::vms::{Balloon, VmMemory, VmState};
use tokio::sync::Semaphore;

use crate::chunks::{self, ChunkReceiver};
use crate::requests::{
    BalloonRequest, CheckpointVmRequest, ConnectAgentRequest, ConsoleOutput, CreateVmsRequest,
    CreateVmsResponse, CreatedVm, DecideMoveRequest, DestroyVmRequest, ExpectVmRequest,
    ExportTemplateRequest, FetchTemplateRequest, ForgetVmsRequest, ForkVmRequest, HostReport,
    ImportTemplateRequest, InspectMoveRequest, InspectTemplateRequest, InstallCertificateRequest,
    ListCheckpointsRequest, MeasureVmRequest, MoveStatus, OfferVmRequest, PauseVmRequest,
    ReadConsoleRequest, RemoveCheckpointRequest, RemoveTemplateRequest, RenewalRequest,
    RenewalResponse, ReportRequest, ResumeVmRequest, RewindVmRequest, SendVmRequest, SentVm,
    SetStandbysRequest, SnapshotVmRequest, SuspendVmRequest, TemplateFacts, UpdateVmRequest,
    VmOffer, VmReport, VmSpec,
};
use crate::{AgentStream, Call, Error, ErrorKind, Fence, NodeApi, Reply, Result};

pub use moves::LostWord;
use moves::SimulatedMoves;

/// The address of every VM.
const ADDRESS: &str = "192.0.2.1";
/// The number of requested VMs that are remembered.
pub const SPECS: usize = 100;

/// What each checkpoint holds, in bytes.
const CHECKPOINT_BYTES: u64 = 1 << 20;
/// Bytes of a template that are sent in one chunk.
const CHUNK: usize = 64 << 10;

/// A host that has capacity and VMs by its own account only. It answers every creation alike, and
/// at the time that its gates permit.
pub struct SimulatedNode {
    name: String,
    capacity: Capacity,
    cpu: Option<CpuFeatures>,
    creation: Result<CreatedVm>,
    vm_cost: u64,
    vm_size: u64,
    /// Holds answers to requests for new VMs.
    pub creations: Gate,
    /// Holds reports, whose content is what it was when they were requested.
    pub reports: Gate,
    fence: Fence,
    /// Holds answers to requests that make templates, copy them or remove them. What they are for has
    /// been done by then.
    pub transfers: Gate,
    /// Holds VMs that are being sent, before the other host runs them.
    pub departures: Gate,
    address: Option<SocketAddr>,
    unreachable: AtomicBool,
    /// The nodes that VMs are sent to, by name.
    peers: Mutex<HashMap<String, Weak<SimulatedNode>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    vms: BTreeMap<String, VmState>,
    templates: BTreeMap<String, SimulatedTemplate>,
    /// The changes of VMs that were requested, in their order.
    updates: Vec<UpdateVmRequest>,
    /// The VMs that were requested last, in their order.
    specs: Vec<VmSpec>,
    /// How changes of VMs are refused.
    refusal: Option<Error>,
    /// Streams to agents that wait to be connected.
    agents: VecDeque<AgentSocket>,
    requested: usize,
    /// The ids of all VMs that were ever created.
    created: HashSet<String>,
    /// The ids of VMs that were created although they had been created before.
    created_twice: Vec<String>,
    /// Why VMs were destroyed, by their ids.
    reasons: HashMap<String, String>,
    /// How destroying a VM ends, where it does not succeed; `None` where it never does.
    stubborn: HashMap<String, Option<Error>>,
    /// Whether no call is answered.
    frozen: bool,
    /// The standbys to keep of templates, all of which are ready.
    standbys: HashMap<String, u32>,
    /// The memory of each VM that runs.
    memory: Option<VmMemory>,
    reports: usize,
    /// The checkpoints of VMs, by their ids.
    checkpoints: HashMap<String, Checkpoints>,
    /// The templates that VMs were forked from, by their ids.
    origins: HashMap<String, String>,
    moves: SimulatedMoves,
}

struct SimulatedTemplate {
    facts: TemplateFacts,
    content: Vec<u8>,
}

/// Lets a test decide when calls are answered.
pub struct Gate {
    /// A permit for each call that has arrived and was not awaited by the test.
    arrived: Semaphore,
    /// A permit for each call that may be answered.
    permits: Semaphore,
    is_open: bool,
}

impl Gate {
    fn new(is_open: bool) -> Self {
        Self {
            arrived: Semaphore::new(0),
            permits: Semaphore::new(0),
            is_open,
        }
    }

    /// Waits until a call has arrived, and counts it as seen.
    pub async fn arrival(&self) {
        take(&self.arrived).await;
    }

    /// Lets one call pass, which may have arrived or not.
    pub fn release(&self) {
        self.permits.add_permits(1);
    }

    async fn pass(&self) {
        if !self.is_open {
            self.arrived.add_permits(1);
            take(&self.permits).await;
        }
    }
}

async fn take(semaphore: &Semaphore) {
    if let Ok(permit) = semaphore.acquire().await {
        permit.forget();
    }
}

impl SimulatedNode {
    /// A host of this name with 2 CPUs and 16 GiB of memory, whose CPU features are not known and
    /// which creates every VM.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            capacity: Capacity {
                cpus: 2,
                memory_bytes: 16 << 30,
                available_bytes: 16 << 30,
                ..Capacity::default()
            },
            cpu: None,
            creation: Ok(CreatedVm {
                warm: false,
                running_us: 1,
                identity_us: 1,
                notices: Vec::new(),
                addresses: vec![ADDRESS.to_owned()],
            }),
            vm_cost: 0,
            vm_size: 0,
            creations: Gate::new(true),
            reports: Gate::new(true),
            fence: Fence::new(0),
            transfers: Gate::new(true),
            departures: Gate::new(true),
            address: None,
            unreachable: AtomicBool::new(false),
            peers: Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// Lets the host report these CPU features.
    #[must_use]
    pub fn with_cpu(mut self, cpu: CpuFeatures) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// Lets every creation of a VM end like this.
    #[must_use]
    pub fn with_creation(mut self, result: Result<CreatedVm>) -> Self {
        self.creation = result;
        self
    }

    /// Holds creations and reports until the gates release them.
    #[must_use]
    pub fn gated(mut self) -> Self {
        self.creations = Gate::new(false);
        self.reports = Gate::new(false);
        self
    }

    /// Holds creations until the gate releases them.
    #[must_use]
    pub fn with_gated_creations(mut self) -> Self {
        self.creations = Gate::new(false);
        self
    }

    /// Holds answers to requests about templates until the gate releases them.
    #[must_use]
    pub fn with_gated_transfers(mut self) -> Self {
        self.transfers = Gate::new(false);
        self
    }

    /// Holds VMs that are being sent until the gate releases them.
    #[must_use]
    pub fn with_gated_departures(mut self) -> Self {
        self.departures = Gate::new(false);
        self
    }

    /// Lets the host have this address, as one that is elsewhere.
    #[must_use]
    pub fn with_address(mut self, address: SocketAddr) -> Self {
        self.address = Some(address);
        self
    }

    /// Lets the host have this capacity.
    #[must_use]
    pub fn with_capacity(mut self, capacity: Capacity) -> Self {
        self.capacity = capacity;
        self
    }

    /// Lets each VM use so much memory as soon as it runs, by the host's own account.
    #[must_use]
    pub fn with_vm_cost(mut self, bytes: u64) -> Self {
        self.vm_cost = bytes;
        self
    }

    /// Lets each VM have so much memory by its description.
    #[must_use]
    pub fn with_vm_size(mut self, bytes: u64) -> Self {
        self.vm_size = bytes;
        self
    }

    /// Lets the host answer nothing, or answer again.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.unreachable.store(unreachable, Ordering::SeqCst);
    }

    /// Lets a VM run on the host, as after a request whose answer was lost.
    pub fn add_vm(&self, id: &str) {
        self.state().vms.insert(id.to_owned(), VmState::Running);
    }

    /// The names of the templates in the host's store.
    pub fn templates(&self) -> Vec<String> {
        self.state().templates.keys().cloned().collect()
    }

    fn check_reachable(&self) -> Result<()> {
        match self.unreachable.load(Ordering::SeqCst) {
            false => Ok(()),
            true => {
                let message = format!("the host {} does not answer", self.name);
                Err(Error::new(ErrorKind::HostUnreachable, message))
            }
        }
    }

    /// Puts a template into the host's store.
    pub fn add_template(&self, name: &str, facts: TemplateFacts, content: &[u8]) {
        let template = SimulatedTemplate {
            facts,
            content: content.to_vec(),
        };
        self.state().templates.insert(name.to_owned(), template);
    }

    /// Lets the host have no template of this name, as where making one was cut off.
    pub fn lose_template(&self, name: &str) {
        self.state().templates.remove(name);
    }

    /// Lets the next connection to an agent be this stream, whose other end the test holds.
    pub fn add_agent(&self, stream: impl Transport) {
        self.state().agents.push_back(AgentSocket::new(stream));
    }

    /// The changes of VMs that were requested of this host, in their order.
    pub fn updates(&self) -> Vec<UpdateVmRequest> {
        self.state().updates.clone()
    }

    /// Lets changes of VMs be refused like this from now on, or be accepted again.
    pub fn refuse_updates(&self, error: Option<Error>) {
        self.state().refusal = error;
    }

    /// The VMs that were requested of this host, in their order: the last [`SPECS`] of them.
    pub fn requested_specs(&self) -> Vec<VmSpec> {
        self.state().specs.clone()
    }

    /// The number of VMs that were requested of this host.
    pub fn requested_vms(&self) -> usize {
        self.state().requested
    }

    /// Lets the host lose all VMs and what it knows of them.
    pub fn lose_vms(&self) {
        self.state().vms.clear();
    }

    /// The number of times that the host has reported.
    pub fn reports_made(&self) -> usize {
        self.state().reports
    }

    /// The ids of the VMs that the host has, whether they run or have ended.
    pub fn vms(&self) -> Vec<String> {
        self.state().vms.keys().cloned().collect()
    }

    /// The ids of the VMs that run on the host.
    pub fn running_vms(&self) -> Vec<String> {
        let state = self.state();
        let running = state.vms.iter().filter(|(_, state)| state.is_alive());
        running.map(|(id, _)| id.clone()).collect()
    }

    /// The ids of VMs that were created although they had been created before.
    pub fn created_twice(&self) -> Vec<String> {
        self.state().created_twice.clone()
    }

    /// Lets a VM that runs end by itself.
    pub fn end_vm(&self, id: &str) {
        if let Some(state) = self.state().vms.get_mut(id) {
            *state = VmState::Ended;
        }
    }

    /// Lets every request to destroy this VM end with an error, or never end.
    pub fn refuse_to_destroy(&self, id: &str, error: Option<Error>) {
        self.state().stubborn.insert(id.to_owned(), error);
    }

    /// Lets the host answer no call, or answer again.
    pub fn freeze(&self, frozen: bool) {
        self.state().frozen = frozen;
    }

    /// Lets every VM that runs report this memory.
    pub fn set_memory(&self, memory: VmMemory) {
        self.state().memory = Some(memory);
    }

    /// The standbys that the host was told to keep of a template.
    pub fn standbys(&self, template: &str) -> Option<u32> {
        self.state().standbys.get(template).copied()
    }

    /// Lets the host forget which standbys to keep, as a restart of its node does.
    pub fn forget_standbys(&self) {
        self.state().standbys.clear();
    }

    /// What the host would report now.
    pub fn present_report(&self) -> HostReport {
        let capacity = self.measured();
        let state = self.state();
        let of_cost = (self.vm_cost > 0).then(|| VmMemory {
            private_bytes: self.vm_cost,
            ..VmMemory::default()
        });
        let memory = state.memory.or(of_cost);
        let vms = state.vms.iter().map(|(id, vm)| VmReport {
            id: id.clone(),
            state: *vm,
            reason: state.reasons.get(id).cloned(),
            memory: memory.filter(|_| vm.is_alive()),
            addresses: vec![ADDRESS.to_owned()],
            epoch: state.moves.epoch(id),
        });
        HostReport {
            capacity,
            vms: vms.collect(),
            ready: state.standbys.clone(),
            standbys: Some(state.standbys.clone()),
            cpu: self.cpu.clone(),
            ..HostReport::default()
        }
    }

    /// Admits a call, or waits for its deadline where the host answers none.
    async fn admit(&self, call: Call) -> Result<()> {
        self.answers(call).await?;
        self.fence.admit(call.epoch, |_| Ok(()))
    }

    /// Completes where the host answers.
    async fn answers(&self, call: Call) -> Result<()> {
        if self.state().frozen {
            return self.no_answer(call).await;
        }
        self.check_reachable()
    }

    /// What a caller gets of a host that does not answer.
    async fn no_answer<T>(&self, call: Call) -> Result<T> {
        let remaining = call.deadline.remaining().unwrap_or_default();
        tokio::time::sleep(remaining).await;
        let message = format!("the host {} does not answer", self.name);
        Err(Error::new(ErrorKind::HostUnreachable, message))
    }

    /// The answer of an operation that needs no waiting.
    fn answer<'a, T: Send + 'a>(
        &'a self,
        call: Call,
        work: impl FnOnce() -> Result<T> + Send + 'a,
    ) -> Reply<'a, T> {
        Box::pin(async move {
            self.admit(call).await?;
            work()
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn template<T>(&self, name: &str, read: impl Fn(&SimulatedTemplate) -> T) -> Result<T> {
        let state = self.state();
        state.templates.get(name).map(read).ok_or_else(|| {
            let message = format!("template `{}` not found", name.escape_debug());
            Error::new(ErrorKind::NotFound, message)
        })
    }

    async fn create(
        &self,
        template: &str,
        vms: Vec<VmSpec>,
        call: Call,
    ) -> Result<CreateVmsResponse> {
        self.admit(call).await?;
        {
            let mut state = self.state();
            state.requested += vms.len();
            state.specs.extend(vms.iter().cloned());
            let more = state.specs.len().saturating_sub(SPECS);
            state.specs.drain(..more);
        }
        self.creations.pass().await;
        let mut state = self.state();
        let results = vms.into_iter().map(|vm| {
            let created = self.creation.clone()?;
            if !state.created.insert(vm.id.clone()) {
                state.created_twice.push(vm.id.clone());
            }
            state.origins.insert(vm.id.clone(), template.to_owned());
            state.vms.insert(vm.id, VmState::Running);
            Ok(created)
        });
        Ok(CreateVmsResponse {
            results: results.collect(),
        })
    }

    /// The capacity less what the VMs use.
    fn measured(&self) -> Capacity {
        let alive = |state: &&VmState| state.is_alive();
        let vms = self.state().vms.values().filter(alive).count() as u64;
        let used = vms.saturating_mul(self.vm_cost);
        Capacity {
            available_bytes: self.capacity.available_bytes.saturating_sub(used),
            promised_bytes: vms.saturating_mul(self.vm_size),
            ..self.capacity
        }
    }

    fn running(&self, id: &str) -> Result<()> {
        match self.state().vms.get(id) {
            Some(VmState::Running | VmState::Paused) => Ok(()),
            _ => {
                let message = format!("the VM {id} does not run");
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    fn set_vm(&self, id: &str, vm_state: VmState) -> Result<()> {
        match self.state().vms.get_mut(id) {
            Some(known) => {
                *known = vm_state;
                Ok(())
            }
            None => {
                let message = format!("the VM {id} does not run");
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }
}

fn no_checkpoint(name: &str) -> Error {
    let message = format!("the VM has no checkpoint `{}`", name.escape_debug());
    Error::new(ErrorKind::NotFound, message)
}

fn unsupported<T>() -> Result<T> {
    let message = "a simulated node does not support this operation";
    Err(Error::new(ErrorKind::Internal, message))
}

impl NodeApi for SimulatedNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    fn create_vms(&self, request: CreateVmsRequest, call: Call) -> Reply<'_, CreateVmsResponse> {
        Box::pin(async move { self.create(&request.template, request.vms, call).await })
    }

    fn fork_vm(&self, request: ForkVmRequest, call: Call) -> Reply<'_, CreateVmsResponse> {
        Box::pin(async move {
            let origin = self.state().origins.get(&request.parent).cloned();
            let origin = origin.unwrap_or_default();
            self.create(&origin, request.vms, call).await
        })
    }

    fn destroy_vm(&self, request: DestroyVmRequest, call: Call) -> Reply<'_, ()> {
        Box::pin(async move {
            self.admit(call).await?;
            let stubborn = self.state().stubborn.get(&request.vm).cloned();
            match stubborn {
                Some(Some(error)) => return Err(error),
                Some(None) => return self.no_answer(call).await,
                None => {}
            }
            let mut state = self.state();
            let state = &mut *state;
            if let Some(vm) = state.vms.get_mut(&request.vm) {
                *vm = VmState::Ended;
                state.moves.ended(&request.vm);
                // Reports have it, as a node's have, so that it is known where the answer is lost.
                state.reasons.insert(request.vm, request.reason);
            }
            Ok(())
        })
    }

    fn pause_vm(&self, request: PauseVmRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || self.set_vm(&request.vm, VmState::Paused))
    }

    fn suspend_vm(&self, request: SuspendVmRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || self.set_vm(&request.vm, VmState::Suspended))
    }

    fn checkpoint_vm(&self, request: CheckpointVmRequest, call: Call) -> Reply<'_, Checkpoint> {
        self.answer(call, move || {
            self.running(&request.vm)?;
            let mut state = self.state();
            let known = state.checkpoints.entry(request.vm).or_default();
            if known.checkpoints.iter().any(|it| it.name == request.name) {
                let message = format!("the VM has a checkpoint `{}` already", request.name);
                return Err(Error::new(ErrorKind::Conflict, message));
            }
            let taken = Checkpoint {
                name: request.name.clone(),
                parent: known.present.replace(request.name),
                created_ms: known.checkpoints.len() as u64,
                memory_bytes: CHECKPOINT_BYTES,
                disk_bytes: 0,
            };
            known.checkpoints.push(taken.clone());
            known.used_bytes += CHECKPOINT_BYTES;
            Ok(taken)
        })
    }

    fn list_checkpoints(
        &self,
        request: ListCheckpointsRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints> {
        self.answer(call, move || {
            let known = self.state().checkpoints.get(&request.vm).cloned();
            Ok(known.unwrap_or_default())
        })
    }

    fn remove_checkpoint(
        &self,
        request: RemoveCheckpointRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints> {
        self.answer(call, move || {
            let mut state = self.state();
            let known = state.checkpoints.entry(request.vm).or_default();
            let before = known.checkpoints.len();
            known.checkpoints.retain(|it| it.name != request.name);
            match known.checkpoints.len() == before {
                true => Err(no_checkpoint(&request.name)),
                false => {
                    known.used_bytes -= CHECKPOINT_BYTES;
                    Ok(known.clone())
                }
            }
        })
    }

    fn rewind_vm(&self, request: RewindVmRequest, call: Call) -> Reply<'_, Rewound> {
        self.answer(call, move || {
            self.running(&request.vm)?;
            let mut state = self.state();
            let known = state.checkpoints.entry(request.vm).or_default();
            let name = request.checkpoint;
            if !known.checkpoints.iter().any(|it| it.name == name) {
                return Err(no_checkpoint(&name));
            }
            known.present = Some(name.clone());
            Ok(Rewound {
                checkpoint: name,
                running: true,
                pause_us: 1,
                memory_bytes: CHECKPOINT_BYTES,
                ..Rewound::default()
            })
        })
    }

    fn resume_vm(&self, request: ResumeVmRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || self.set_vm(&request.vm, VmState::Running))
    }

    fn update_vm(&self, request: UpdateVmRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || {
            let mut state = self.state();
            state.updates.push(request);
            state.refusal.clone().map_or(Ok(()), Err)
        })
    }

    fn balloon(&self, _: BalloonRequest, call: Call) -> Reply<'_, Balloon> {
        self.answer(call, unsupported)
    }

    fn measure_vm(&self, request: MeasureVmRequest, call: Call) -> Reply<'_, VmFigures> {
        self.answer(call, move || {
            self.running(&request.vm).map(|()| VmFigures {
                addresses: vec![ADDRESS.to_owned()],
                cpu_user_us: 1,
                ..VmFigures::default()
            })
        })
    }

    fn read_console(&self, request: ReadConsoleRequest, call: Call) -> Reply<'_, ConsoleOutput> {
        self.answer(call, move || {
            self.running(&request.vm).map(|()| {
                let text = "boot\n".repeat(1000);
                let from = text.len().saturating_sub(request.bytes as usize);
                let text = text[from..].to_owned();
                ConsoleOutput { text }
            })
        })
    }

    fn snapshot_vm(&self, request: SnapshotVmRequest, call: Call) -> Reply<'_, TemplateFacts> {
        Box::pin(async move {
            self.admit(call).await?;
            let facts = TemplateFacts {
                id: blake3::hash(request.vm.as_bytes()).to_hex().to_string(),
                ..TemplateFacts::default()
            };
            self.add_template(&request.template, facts.clone(), &[]);
            self.transfers.pass().await;
            Ok(facts)
        })
    }

    fn offer_vm(&self, request: OfferVmRequest, call: Call) -> Reply<'_, VmOffer> {
        self.answer(call, move || self.offer(&request.vm))
    }

    fn expect_vm(&self, request: ExpectVmRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || self.expect(request))
    }

    fn send_vm(&self, request: SendVmRequest, call: Call) -> Reply<'_, SentVm> {
        Box::pin(async move {
            self.admit(call).await?;
            self.depart(request).await
        })
    }

    fn inspect_move(&self, request: InspectMoveRequest, call: Call) -> Reply<'_, MoveStatus> {
        self.answer(call, move || Ok(self.move_status(&request.vm)))
    }

    fn decide_move(&self, request: DecideMoveRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || self.decide(&request))
    }

    fn connect_agent(&self, _: ConnectAgentRequest, call: Call) -> Reply<'_, AgentStream> {
        self.answer(call, || match self.state().agents.pop_front() {
            Some(stream) => Ok(AgentStream::raw(stream)),
            None => Err(Error::new(
                ErrorKind::GuestUnavailable,
                "no agent answers in the guest",
            )),
        })
    }

    fn inspect_template(
        &self,
        request: InspectTemplateRequest,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        Box::pin(async move {
            // Whoever only reads a template needs no epoch.
            self.answers(call).await?;
            self.template(&request.template, |it| it.facts.clone())
        })
    }

    fn set_standbys(&self, request: SetStandbysRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || {
            let mut state = self.state();
            match request.standbys {
                0 => state.standbys.remove(&request.template),
                count => state.standbys.insert(request.template, count),
            };
            Ok(())
        })
    }

    fn remove_template(&self, request: RemoveTemplateRequest, call: Call) -> Reply<'_, ()> {
        Box::pin(async move {
            self.admit(call).await?;
            let known = self.template(&request.template, |_| ());
            {
                let mut state = self.state();
                state.templates.remove(&request.template);
                state.standbys.remove(&request.template);
            }
            self.transfers.pass().await;
            known
        })
    }

    fn fetch_template(&self, request: FetchTemplateRequest, call: Call) -> Reply<'_, ()> {
        Box::pin(async move {
            self.admit(call).await?;
            let facts = TemplateFacts {
                id: request.id,
                ..TemplateFacts::default()
            };
            self.add_template(&request.template, facts, &[]);
            self.transfers.pass().await;
            Ok(())
        })
    }

    fn export_template(&self, request: ExportTemplateRequest, _: Call) -> Reply<'_, ChunkReceiver> {
        let content = self.template(&request.template, |it| it.content.clone());
        let content = content.map(|content| {
            let chunks = content
                .chunks(CHUNK)
                .map(|it| Ok::<_, String>(it.to_vec().into()));
            let chunks: Vec<_> = chunks.collect();
            chunks::receive(futures_util::stream::iter(chunks))
        });
        Box::pin(std::future::ready(content))
    }

    fn import_template(
        &self,
        request: ImportTemplateRequest,
        mut content: ChunkReceiver,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        Box::pin(async move {
            self.admit(call).await?;
            let mut bytes = Vec::new();
            while let Some(chunk) = content.recv().await {
                let chunk = chunk.map_err(|error| Error::internal("receive a template", &error))?;
                bytes.extend_from_slice(&chunk);
            }
            let facts = TemplateFacts {
                id: blake3::hash(&bytes).to_hex().to_string(),
                data_bytes: bytes.len() as u64,
                ..TemplateFacts::default()
            };
            self.add_template(&request.template, facts.clone(), &bytes);
            self.transfers.pass().await;
            Ok(facts)
        })
    }

    fn report(&self, _: ReportRequest, call: Call) -> Reply<'_, HostReport> {
        Box::pin(async move {
            self.admit(call).await?;
            let report = self.present_report();
            self.state().reports += 1;
            self.reports.pass().await;
            Ok(report)
        })
    }

    fn forget_vms(&self, request: ForgetVmsRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, move || {
            let mut state = self.state();
            for id in &request.vms {
                state.vms.remove(id);
                state.reasons.remove(id);
                state.moves.forget(id);
            }
            Ok(())
        })
    }

    fn request_renewal(&self, _: RenewalRequest, call: Call) -> Reply<'_, RenewalResponse> {
        self.answer(call, || {
            Ok(RenewalResponse {
                signing_request: None,
            })
        })
    }

    fn install_certificate(&self, _: InstallCertificateRequest, call: Call) -> Reply<'_, ()> {
        self.answer(call, unsupported)
    }
}
