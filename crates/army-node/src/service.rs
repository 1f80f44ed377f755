//! The node as the controller sees it: [`Node`] behind the contract.
//!
//! A node blocks. Each call runs on a thread of the runtime's pool for blocking work, which goes on
//! where the caller gives up: what it has done is in the journal. Streams to agents are asynchronous
//! and hold no thread.

mod moves;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_api::figures::VmFigures;
use army_api::vms::Balloon;
use army_node_api::chunks::{self, ChunkReceiver};
use army_node_api::requests::{
    AcceptVmRequest, BalloonRequest, CheckpointVmRequest, ConnectAgentRequest, ConsoleOutput,
    CreateVmsRequest, CreateVmsResponse, DecideMoveRequest, DestroyVmRequest, ExpectVmRequest,
    ExportTemplateRequest, FetchTemplateRequest, ForgetVmsRequest, ForkVmRequest, HostReport,
    ImportTemplateRequest, InspectMoveRequest, InspectTemplateRequest, InstallCertificateRequest,
    ListCheckpointsRequest, MeasureVmRequest, MoveStatus, OfferVmRequest, PauseVmRequest,
    ReadConsoleRequest, RemoveCheckpointRequest, RemoveTemplateRequest, RenewalRequest,
    RenewalResponse, ReportRequest, ResumeVmRequest, RewindVmRequest, SendVmRequest, SentVm,
    SetStandbysRequest, SnapshotVmRequest, SuspendVmRequest, TemplateFacts, UpdateVmRequest,
    VmOffer,
};
use army_node_api::{
    AgentStream, ByteStream, Call, Deadline, Error, ErrorKind, NodeApi, Remote, Reply, Result,
};
use rustls::ClientConfig;
use tokio::sync::Mutex;

use crate::membership::Membership;
use crate::{Node, templates};

/// How long after a deadline an answer of the node is still awaited: it says what was late.
const GRACE: Duration = Duration::from_secs(1);

/// A node as an implementation of the contract.
pub struct NodeService {
    node: Arc<Node>,
    /// What connects the node with others; `None` in the controller's own process.
    cluster: Option<Cluster>,
    /// Held while a template is fetched. Whoever waits for the same template then finds it here.
    fetching: Mutex<()>,
}

struct Cluster {
    membership: Arc<Membership>,
    /// How this node connects to others.
    tls: ClientConfig,
}

impl NodeService {
    /// The node of the only host, in the controller's own process.
    pub fn in_process(node: Arc<Node>) -> Self {
        Self {
            node,
            cluster: None,
            fetching: Mutex::default(),
        }
    }

    /// The node of a host that is a member of a cluster.
    ///
    /// # Errors
    /// Where the member's certificate cannot be used.
    pub fn in_cluster(node: Arc<Node>, membership: Arc<Membership>) -> Result<Self> {
        let tls = membership.identity().client()?;
        Ok(Self {
            node,
            cluster: Some(Cluster { membership, tls }),
            fetching: Mutex::default(),
        })
    }

    /// Runs blocking work of the node, where its epoch is admitted.
    fn run<T: Send + 'static>(
        &self,
        call: Call,
        work: impl FnOnce(&Node) -> Result<T> + Send + 'static,
    ) -> Reply<'_, T> {
        let node = Arc::clone(&self.node);
        Box::pin(blocking(call.deadline, move || {
            node.fence.admit(call.epoch)?;
            work(&node)
        }))
    }

    /// Admits the epoch of a call.
    async fn admit(&self, call: Call) -> Result<()> {
        self.run(call, |_| Ok(())).await
    }

    /// Runs blocking work of the node's membership of a cluster.
    fn run_membership<T: Send + 'static>(
        &self,
        call: Call,
        work: impl FnOnce(&Membership) -> Result<T> + Send + 'static,
    ) -> Reply<'_, T> {
        Box::pin(async move {
            let membership = Arc::clone(&self.cluster()?.membership);
            self.run(call, move |_| work(&membership)).await
        })
    }

    fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().ok_or_else(|| {
            let message = "this node is the only host, and not a member of a cluster";
            Error::new(ErrorKind::Conflict, message)
        })
    }

    async fn fetch(&self, request: FetchTemplateRequest, call: Call) -> Result<()> {
        let cluster = self.cluster()?;
        self.admit(call).await?;
        let _turn = self.fetching.lock().await;
        let name = request.template.clone();
        match self.run(call, move |node| node.template(&name)).await {
            Ok(facts) if facts.id == request.id => return Ok(()),
            Ok(_) => {
                let message = format!(
                    "the host {} has another template that is called `{}`",
                    self.node.name(),
                    request.template
                );
                return Err(Error::new(ErrorKind::Conflict, message)
                    .advise("remove it there: clone template rm"));
            }
            Err(error) if error.kind == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let origin = Remote::new(&request.host, request.address, cluster.tls.clone())?;
        let export = ExportTemplateRequest {
            template: request.template.clone(),
        };
        let ticket = request.ticket.as_deref();
        let content = origin.content(export, ticket, call.in_epoch(0)).await;
        let content = content.map_err(|error| {
            let host = &request.host;
            let message = format!("cannot get the template from {host}: {}", error.message);
            Error::new(ErrorKind::HostUnreachable, message)
        })?;
        let received = self.run(call, move |node| {
            node.receive_template(&request.template, Some(&request.id), content)
        });
        received.await.map(drop)
    }
}

/// Runs blocking work, and gives up waiting for it soon after the deadline.
pub(crate) async fn blocking<T: Send + 'static>(
    deadline: Deadline,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let remaining = deadline.remaining().ok_or_else(Error::deadline_exceeded)?;
    let work = tokio::task::spawn_blocking(work);
    match tokio::time::timeout(remaining.saturating_add(GRACE), work).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(Error::internal("finish a task", &error)),
        Err(_) => Err(Error::deadline_exceeded()),
    }
}

impl NodeApi for NodeService {
    fn name(&self) -> &str {
        self.node.name()
    }

    fn address(&self) -> Option<SocketAddr> {
        None
    }

    fn create_vms(&self, request: CreateVmsRequest, call: Call) -> Reply<'_, CreateVmsResponse> {
        self.run(call, move |node| {
            let results = node.create(&request.template, &request.vms);
            Ok(CreateVmsResponse { results })
        })
    }

    fn fork_vm(&self, request: ForkVmRequest, call: Call) -> Reply<'_, CreateVmsResponse> {
        self.run(call, move |node| {
            let results = node.fork_vm(&request.parent, &request.vms);
            Ok(CreateVmsResponse { results })
        })
    }

    fn destroy_vm(&self, request: DestroyVmRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.destroy(&request.vm, &request.reason))
    }

    fn pause_vm(&self, request: PauseVmRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.pause(&request.vm))
    }

    fn suspend_vm(&self, request: SuspendVmRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.suspend(&request.vm))
    }

    fn checkpoint_vm(&self, request: CheckpointVmRequest, call: Call) -> Reply<'_, Checkpoint> {
        self.run(call, move |node| {
            node.checkpoint(&request.vm, &request.name)
        })
    }

    fn list_checkpoints(
        &self,
        request: ListCheckpointsRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints> {
        self.run(call, move |node| node.checkpoints(&request.vm))
    }

    fn remove_checkpoint(
        &self,
        request: RemoveCheckpointRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints> {
        self.run(call, move |node| {
            node.remove_checkpoint(&request.vm, &request.name)
        })
    }

    fn rewind_vm(&self, request: RewindVmRequest, call: Call) -> Reply<'_, Rewound> {
        self.run(call, move |node| {
            node.rewind(&request.vm, &request.checkpoint)
        })
    }

    fn resume_vm(&self, request: ResumeVmRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.resume(&request.vm))
    }

    fn update_vm(&self, request: UpdateVmRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.update(&request))
    }

    fn balloon(&self, request: BalloonRequest, call: Call) -> Reply<'_, Balloon> {
        self.run(call, move |node| {
            node.balloon(&request.vm, request.target_bytes)
        })
    }

    fn measure_vm(&self, request: MeasureVmRequest, call: Call) -> Reply<'_, VmFigures> {
        self.run(call, move |node| node.measure(&request.vm))
    }

    fn read_console(&self, request: ReadConsoleRequest, call: Call) -> Reply<'_, ConsoleOutput> {
        self.run(call, move |node| node.console(&request.vm, request.bytes))
    }

    fn snapshot_vm(&self, request: SnapshotVmRequest, call: Call) -> Reply<'_, TemplateFacts> {
        self.run(call, move |node| {
            node.snapshot(&request.vm, &request.template, request.diff)
        })
    }

    fn offer_vm(&self, request: OfferVmRequest, call: Call) -> Reply<'_, VmOffer> {
        self.run(call, move |node| node.offer(&request.vm))
    }

    fn expect_vm(&self, request: ExpectVmRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.expect(&request))
    }

    fn send_vm(&self, request: SendVmRequest, call: Call) -> Reply<'_, SentVm> {
        Box::pin(self.send(request, call))
    }

    fn accept_vm(&self, request: AcceptVmRequest, stream: ByteStream, call: Call) -> Reply<'_, ()> {
        Box::pin(self.accept(request, stream, call))
    }

    fn inspect_move(&self, request: InspectMoveRequest, call: Call) -> Reply<'_, MoveStatus> {
        self.run(call, move |node| node.inspect_move(&request.vm))
    }

    fn decide_move(&self, request: DecideMoveRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.decide_move(&request))
    }

    fn connect_agent(&self, request: ConnectAgentRequest, call: Call) -> Reply<'_, AgentStream> {
        Box::pin(async move {
            self.admit(call).await?;
            let connection = self.node.agent(&request.vm, call.deadline).await?;
            Ok(AgentStream::greeted(connection))
        })
    }

    fn inspect_template(
        &self,
        request: InspectTemplateRequest,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        let node = Arc::clone(&self.node);
        // The router asks for other nodes, too, and they know no epoch.
        Box::pin(blocking(call.deadline, move || {
            node.template(&request.template)
        }))
    }

    fn set_standbys(&self, request: SetStandbysRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| {
            node.set_standbys(&request.template, request.standbys)
        })
    }

    fn remove_template(&self, request: RemoveTemplateRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| node.remove_template(&request.template))
    }

    fn fetch_template(&self, request: FetchTemplateRequest, call: Call) -> Reply<'_, ()> {
        Box::pin(self.fetch(request, call))
    }

    fn export_template(
        &self,
        request: ExportTemplateRequest,
        call: Call,
    ) -> Reply<'_, ChunkReceiver> {
        let node = Arc::clone(&self.node);
        // Other nodes ask for it, too, and they know no epoch.
        Box::pin(blocking(call.deadline, move || {
            let template = node.open_template(&request.template)?;
            let (sender, content) = chunks::channel();
            tokio::task::spawn_blocking(move || templates::send(&template, sender));
            Ok(content)
        }))
    }

    fn import_template(
        &self,
        request: ImportTemplateRequest,
        content: ChunkReceiver,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        self.run(call, move |node| {
            node.receive_template(&request.template, None, content)
        })
    }

    fn report(&self, _: ReportRequest, call: Call) -> Reply<'_, HostReport> {
        self.run(call, |node| Ok(node.report()))
    }

    fn forget_vms(&self, request: ForgetVmsRequest, call: Call) -> Reply<'_, ()> {
        self.run(call, move |node| {
            node.forget(&request.vms);
            Ok(())
        })
    }

    fn request_renewal(&self, _: RenewalRequest, call: Call) -> Reply<'_, RenewalResponse> {
        if self.cluster.is_none() {
            // A node in the controller's own process has no certificate.
            let response = RenewalResponse {
                signing_request: None,
            };
            return Box::pin(std::future::ready(Ok(response)));
        }
        self.run_membership(call, |membership| {
            let signing_request = membership.request_renewal()?;
            Ok(RenewalResponse { signing_request })
        })
    }

    fn install_certificate(&self, request: InstallCertificateRequest, call: Call) -> Reply<'_, ()> {
        self.run_membership(call, move |membership| {
            membership.install_certificate(&request.certificate)
        })
    }
}
