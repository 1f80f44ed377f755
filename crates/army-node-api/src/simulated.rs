//! A node without VMs, for tests and for measurements of the controller.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use agent_client::{AgentSocket, Transport};
use army_api::hosts::Capacity;
use army_api::templates::CpuFeatures;
use army_api::vms::{Balloon, VmState};
use tokio::sync::Semaphore;

use crate::chunks::{self, ChunkReceiver};
use crate::requests::{
    BalloonRequest, ConnectAgentRequest, CreateVmsRequest, CreateVmsResponse, CreatedVm,
    DestroyVmRequest, ExportTemplateRequest, FetchTemplateRequest, ForgetVmsRequest, ForkVmRequest,
    HostReport, ImportTemplateRequest, InspectTemplateRequest, InstallCertificateRequest,
    PauseVmRequest, RemoveTemplateRequest, RenewalRequest, RenewalResponse, ReportRequest,
    ResumeVmRequest, SetStandbysRequest, SnapshotVmRequest, TemplateFacts, VmReport, VmSpec,
};
use crate::{AgentStream, Deadline, Error, ErrorKind, NodeApi, Reply, Result};

/// Bytes of a template that are sent in one chunk.
const CHUNK: usize = 64 << 10;

/// A host that has capacity and VMs by its own account only. It answers every creation alike, and
/// at the time that its gates permit.
pub struct SimulatedNode {
    name: String,
    capacity: Capacity,
    cpu: Option<CpuFeatures>,
    creation: Result<CreatedVm>,
    /// Holds answers to requests for new VMs.
    pub creations: Gate,
    /// Holds reports, whose content is what it was when they were requested.
    pub reports: Gate,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    vms: BTreeMap<String, VmState>,
    templates: BTreeMap<String, SimulatedTemplate>,
    /// Streams to agents that wait to be connected.
    agents: VecDeque<AgentSocket>,
    requested: usize,
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
            }),
            creations: Gate::new(true),
            reports: Gate::new(true),
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

    /// Puts a template into the host's store.
    pub fn add_template(&self, name: &str, facts: TemplateFacts, content: &[u8]) {
        let template = SimulatedTemplate {
            facts,
            content: content.to_vec(),
        };
        self.state().templates.insert(name.to_owned(), template);
    }

    /// Lets the next connection to an agent be this stream, whose other end the test holds.
    pub fn add_agent(&self, stream: impl Transport) {
        self.state().agents.push_back(AgentSocket::new(stream));
    }

    /// The number of VMs that were requested of this host.
    pub fn requested_vms(&self) -> usize {
        self.state().requested
    }

    /// Lets the host lose all VMs and what it knows of them.
    pub fn lose_vms(&self) {
        self.state().vms.clear();
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

    async fn create(&self, vms: Vec<VmSpec>) -> CreateVmsResponse {
        self.state().requested += vms.len();
        self.creations.pass().await;
        let mut state = self.state();
        let results = vms.into_iter().map(|vm| {
            let created = self.creation.clone()?;
            state.vms.insert(vm.id, VmState::Running);
            Ok(created)
        });
        CreateVmsResponse {
            results: results.collect(),
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

/// The answer of an operation that needs no waiting.
fn ready<'a, T: Send + 'a>(result: Result<T>) -> Reply<'a, T> {
    Box::pin(std::future::ready(result))
}

fn unsupported<'a, T: Send + 'a>() -> Reply<'a, T> {
    let message = "a simulated node does not support this operation";
    ready(Err(Error::new(ErrorKind::Internal, message)))
}

impl NodeApi for SimulatedNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> Option<SocketAddr> {
        None
    }

    fn create_vms(&self, request: CreateVmsRequest, _: Deadline) -> Reply<'_, CreateVmsResponse> {
        Box::pin(async move { Ok(self.create(request.vms).await) })
    }

    fn fork_vm(&self, request: ForkVmRequest, _: Deadline) -> Reply<'_, CreateVmsResponse> {
        Box::pin(async move { Ok(self.create(request.vms).await) })
    }

    fn destroy_vm(&self, request: DestroyVmRequest, _: Deadline) -> Reply<'_, ()> {
        if let Some(state) = self.state().vms.get_mut(&request.vm) {
            *state = VmState::Ended;
        }
        ready(Ok(()))
    }

    fn pause_vm(&self, request: PauseVmRequest, _: Deadline) -> Reply<'_, ()> {
        ready(self.set_vm(&request.vm, VmState::Paused))
    }

    fn resume_vm(&self, request: ResumeVmRequest, _: Deadline) -> Reply<'_, ()> {
        ready(self.set_vm(&request.vm, VmState::Running))
    }

    fn balloon(&self, _: BalloonRequest, _: Deadline) -> Reply<'_, Balloon> {
        unsupported()
    }

    fn snapshot_vm(&self, _: SnapshotVmRequest, _: Deadline) -> Reply<'_, TemplateFacts> {
        unsupported()
    }

    fn connect_agent(&self, _: ConnectAgentRequest, _: Deadline) -> Reply<'_, AgentStream> {
        let stream = self.state().agents.pop_front();
        ready(match stream {
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
        _: Deadline,
    ) -> Reply<'_, TemplateFacts> {
        ready(self.template(&request.template, |it| it.facts.clone()))
    }

    fn set_standbys(&self, _: SetStandbysRequest, _: Deadline) -> Reply<'_, ()> {
        ready(Ok(()))
    }

    fn remove_template(&self, request: RemoveTemplateRequest, _: Deadline) -> Reply<'_, ()> {
        let known = self.template(&request.template, |_| ());
        self.state().templates.remove(&request.template);
        ready(known)
    }

    fn fetch_template(&self, _: FetchTemplateRequest, _: Deadline) -> Reply<'_, ()> {
        unsupported()
    }

    fn export_template(
        &self,
        request: ExportTemplateRequest,
        _: Deadline,
    ) -> Reply<'_, ChunkReceiver> {
        let content = self.template(&request.template, |it| it.content.clone());
        ready(content.map(|content| {
            let chunks = content
                .chunks(CHUNK)
                .map(|it| Ok::<_, String>(it.to_vec().into()));
            let chunks: Vec<_> = chunks.collect();
            chunks::receive(futures_util::stream::iter(chunks))
        }))
    }

    fn import_template(
        &self,
        request: ImportTemplateRequest,
        mut content: ChunkReceiver,
        _: Deadline,
    ) -> Reply<'_, TemplateFacts> {
        Box::pin(async move {
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
            Ok(facts)
        })
    }

    fn report(&self, _: ReportRequest, _: Deadline) -> Reply<'_, HostReport> {
        let vms = self.state().vms.clone();
        let vms = vms.into_iter().map(|(id, state)| VmReport {
            id,
            state,
            reason: None,
            memory: None,
        });
        let report = HostReport {
            capacity: self.capacity,
            missing_jail_layers: Vec::new(),
            vms: vms.collect(),
            ready: HashMap::new(),
            cpu: self.cpu.clone(),
            notices: Vec::new(),
        };
        Box::pin(async move {
            self.reports.pass().await;
            Ok(report)
        })
    }

    fn forget_vms(&self, request: ForgetVmsRequest, _: Deadline) -> Reply<'_, ()> {
        let mut state = self.state();
        for id in &request.vms {
            state.vms.remove(id);
        }
        ready(Ok(()))
    }

    fn request_renewal(&self, _: RenewalRequest, _: Deadline) -> Reply<'_, RenewalResponse> {
        ready(Ok(RenewalResponse {
            signing_request: None,
        }))
    }

    fn install_certificate(&self, _: InstallCertificateRequest, _: Deadline) -> Reply<'_, ()> {
        unsupported()
    }
}
