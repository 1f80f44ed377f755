//! A node on another host: the client of [`router`](crate::router).

use std::net::SocketAddr;
use std::time::Duration;

use agent_client::AgentSocket;
use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_api::figures::VmFigures;
use army_api::vms::Balloon;
use reqwest::redirect::Policy;
use reqwest::{RequestBuilder, Response, StatusCode, Url, header};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;

use crate::chunks::{self, ChunkReceiver};
use crate::cluster::Member;
use crate::moves::ByteStream;
use crate::requests::{
    AdmitFetchRequest, BalloonRequest, CheckpointVmRequest, ConnectAgentRequest, ConsoleOutput,
    CreateVmsRequest, CreateVmsResponse, DecideMoveRequest, DestroyVmRequest, ExpectVmRequest,
    ExportTemplateRequest, FetchTemplateRequest, ForgetVmsRequest, ForkVmRequest, HostReport,
    ImportTemplateRequest, InspectMoveRequest, InspectTemplateRequest, InstallCertificateRequest,
    ListCheckpointsRequest, MeasureVmRequest, MoveStatus, OfferVmRequest, Operation,
    PauseVmRequest, ReadConsoleRequest, RemoveCheckpointRequest, RemoveTemplateRequest,
    RenewalRequest, RenewalResponse, ReportRequest, ResumeVmRequest, RewindVmRequest,
    SendVmRequest, SentVm, SetStandbysRequest, SnapshotVmRequest, SuspendVmRequest, TemplateFacts,
    UpdateVmRequest, VmOffer,
};
use crate::tickets::TICKET_HEADER;
use crate::{
    AGENT_PROTOCOL, AgentStream, Call, DEADLINE_HEADER, EPOCH_HEADER, Error, ErrorKind,
    MOVE_PROTOCOL, NodeApi, Reply, Result, VERSION,
};

/// The longest time that connecting with a host may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// The longest time that what was sent may go without being acknowledged.
const SILENCE: Duration = Duration::from_secs(15);
/// How long after a deadline the node's own answer is still awaited: it says what was late.
const GRACE: Duration = Duration::from_secs(2);

/// A node on another host. Its calls are asynchronous, and none of them holds a thread.
pub struct Remote {
    name: String,
    address: SocketAddr,
    url: Url,
    http: reqwest::Client,
}

impl Remote {
    /// The node of the host `name`, which listens at `address`. Names are not looked up anywhere:
    /// the node's certificate proves which host it is.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] where the TLS configuration cannot be used.
    pub fn new(name: &str, address: SocketAddr, tls: ClientConfig) -> Result<Self> {
        let dns = Member::Node(name.to_owned()).dns_name();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .resolve(&dns, address)
            .connect_timeout(CONNECT_LIMIT)
            .tcp_keepalive(SILENCE / 3)
            .tcp_user_timeout(SILENCE)
            .http1_only()
            .no_proxy()
            // A node that sends its caller elsewhere must not learn what others answer to it.
            .redirect(Policy::none())
            .build()
            .map_err(|error| Error::internal("set up a client of a node", &error))?;
        Ok(Self {
            name: name.to_owned(),
            address,
            url: format!("https://{dns}:{}/{VERSION}", address.port())
                .parse()
                .map_err(|error| Error::internal("address a node", &error))?,
            http,
        })
    }

    /// Sends an operation's request, and reads its response.
    fn call<O: Operation>(&self, request: O, call: Call) -> Reply<'_, O::Response> {
        Box::pin(async move {
            let url = self.url(&[O::NAME])?;
            let response = self.send(self.http.post(url).json(&request), call);
            self.read(response.await?).await
        })
    }

    /// The URL of a path, in which no character of a segment has a special meaning.
    fn url(&self, segments: &[&str]) -> Result<Url> {
        let mut url = self.url.clone();
        if let Some(segment) = segments.iter().find(|it| ["", ".", ".."].contains(it)) {
            let message = format!("`{segment}` is not a name");
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        if let Ok(mut path) = url.path_segments_mut() {
            path.extend(segments);
        }
        Ok(url)
    }

    /// Sends a request, whose response must be a success.
    async fn send(&self, request: RequestBuilder, call: Call) -> Result<Response> {
        let remaining = call
            .deadline
            .remaining()
            .ok_or_else(Error::deadline_exceeded)?;
        let response = request
            .header(DEADLINE_HEADER, remaining.as_millis().to_string())
            .header(EPOCH_HEADER, call.epoch.to_string())
            .timeout(remaining.saturating_add(GRACE))
            .send()
            .await
            .map_err(|error| self.lost(&error))?;
        match response.status() {
            StatusCode::SWITCHING_PROTOCOLS => Ok(response),
            status if status.is_success() => Ok(response),
            status => Err(match response.json().await {
                Ok(error) => error,
                Err(_) => self.unreachable(&format!(
                    "its response has status {status} and is not of version {VERSION}"
                )),
            }),
        }
    }

    async fn read<T: DeserializeOwned>(&self, response: Response) -> Result<T> {
        response.json().await.map_err(|error| self.lost(&error))
    }

    /// Creates VMs. The node must answer for each of them.
    fn create<O>(&self, count: usize, request: O, call: Call) -> Reply<'_, CreateVmsResponse>
    where
        O: Operation<Response = CreateVmsResponse>,
    {
        Box::pin(async move {
            let response = self.call(request, call).await?;
            match response.results.len() == count {
                true => Ok(response),
                false => Err(self.unreachable("its response is about other VMs")),
            }
        })
    }

    fn lost(&self, error: &reqwest::Error) -> Error {
        self.unreachable(&causes(error))
    }

    fn unreachable(&self, cause: &str) -> Error {
        let message = format!("the host {} does not answer: {cause}", self.name);
        Error::new(ErrorKind::HostUnreachable, message)
    }

    /// Reads a template, with a ticket where the caller is not the controller.
    ///
    /// # Errors
    /// The node's refusal, or [`ErrorKind::HostUnreachable`].
    pub async fn content(
        &self,
        request: ExportTemplateRequest,
        ticket: Option<&str>,
        call: Call,
    ) -> Result<ChunkReceiver> {
        let url = self.url(&["content", &request.template])?;
        let mut get = self.http.get(url);
        if let Some(ticket) = ticket {
            get = get.header(TICKET_HEADER, ticket);
        }
        let response = self.send(get, call).await?;
        let host = self.name.clone();
        let body = futures_util::StreamExt::map(response.bytes_stream(), move |chunk| {
            chunk.map_err(|error| format!("the host {host} was lost: {}", causes(&error)))
        });
        Ok(chunks::receive(body))
    }

    /// Opens the stream over which this node's host is sent a VM that it expects, with a ticket.
    ///
    /// # Errors
    /// The node's refusal, or [`ErrorKind::HostUnreachable`].
    pub async fn open_arrival(&self, vm: &str, ticket: &str, call: Call) -> Result<ByteStream> {
        let request = self
            .http
            .get(self.url(&["arrivals", vm])?)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, MOVE_PROTOCOL)
            .header(TICKET_HEADER, ticket);
        let response = self.send(request, call).await?;
        let upgraded = response.upgrade().await;
        Ok(Box::new(upgraded.map_err(|error| self.lost(&error))?))
    }

    async fn open_agent(&self, vm: &str, call: Call) -> Result<AgentStream> {
        let request = self
            .http
            .get(self.url(&["agent", vm])?)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, AGENT_PROTOCOL);
        let response = self.send(request, call).await?;
        let upgraded = response.upgrade().await;
        let upgraded = upgraded.map_err(|error| self.lost(&error))?;
        Ok(AgentStream::raw(AgentSocket::new(upgraded)))
    }
}

/// The causes of an error, without its URL, which says nothing to people.
pub fn causes(error: &reqwest::Error) -> String {
    let mut source = std::error::Error::source(error);
    let mut text = match source {
        Some(_) => String::new(),
        None => error.to_string(),
    };
    while let Some(cause) = source {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl NodeApi for Remote {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> Option<SocketAddr> {
        Some(self.address)
    }

    fn create_vms(&self, request: CreateVmsRequest, call: Call) -> Reply<'_, CreateVmsResponse> {
        self.create(request.vms.len(), request, call)
    }

    fn fork_vm(&self, request: ForkVmRequest, call: Call) -> Reply<'_, CreateVmsResponse> {
        self.create(request.vms.len(), request, call)
    }

    fn destroy_vm(&self, request: DestroyVmRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn pause_vm(&self, request: PauseVmRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn suspend_vm(&self, request: SuspendVmRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn checkpoint_vm(&self, request: CheckpointVmRequest, call: Call) -> Reply<'_, Checkpoint> {
        self.call(request, call)
    }

    fn list_checkpoints(
        &self,
        request: ListCheckpointsRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints> {
        self.call(request, call)
    }

    fn remove_checkpoint(
        &self,
        request: RemoveCheckpointRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints> {
        self.call(request, call)
    }

    fn rewind_vm(&self, request: RewindVmRequest, call: Call) -> Reply<'_, Rewound> {
        self.call(request, call)
    }

    fn resume_vm(&self, request: ResumeVmRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn update_vm(&self, request: UpdateVmRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn balloon(&self, request: BalloonRequest, call: Call) -> Reply<'_, Balloon> {
        self.call(request, call)
    }

    fn measure_vm(&self, request: MeasureVmRequest, call: Call) -> Reply<'_, VmFigures> {
        self.call(request, call)
    }

    fn read_console(&self, request: ReadConsoleRequest, call: Call) -> Reply<'_, ConsoleOutput> {
        self.call(request, call)
    }

    fn snapshot_vm(&self, request: SnapshotVmRequest, call: Call) -> Reply<'_, TemplateFacts> {
        self.call(request, call)
    }

    fn connect_agent(&self, request: ConnectAgentRequest, call: Call) -> Reply<'_, AgentStream> {
        Box::pin(async move { self.open_agent(&request.vm, call).await })
    }

    fn offer_vm(&self, request: OfferVmRequest, call: Call) -> Reply<'_, VmOffer> {
        self.call(request, call)
    }

    fn expect_vm(&self, request: ExpectVmRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn send_vm(&self, request: SendVmRequest, call: Call) -> Reply<'_, SentVm> {
        self.call(request, call)
    }

    fn inspect_move(&self, request: InspectMoveRequest, call: Call) -> Reply<'_, MoveStatus> {
        self.call(request, call)
    }

    fn decide_move(&self, request: DecideMoveRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn inspect_template(
        &self,
        request: InspectTemplateRequest,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        self.call(request, call)
    }

    fn set_standbys(&self, request: SetStandbysRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn remove_template(&self, request: RemoveTemplateRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn fetch_template(&self, request: FetchTemplateRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn admit_fetch(&self, request: AdmitFetchRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn export_template(
        &self,
        request: ExportTemplateRequest,
        call: Call,
    ) -> Reply<'_, ChunkReceiver> {
        Box::pin(self.content(request, None, call))
    }

    fn import_template(
        &self,
        request: ImportTemplateRequest,
        content: ChunkReceiver,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        Box::pin(async move {
            let url = self.url(&["content", &request.template])?;
            let body = reqwest::Body::wrap_stream(chunks::into_stream(content));
            let response = self.send(self.http.put(url).body(body), call).await?;
            self.read(response).await
        })
    }

    fn report(&self, request: ReportRequest, call: Call) -> Reply<'_, HostReport> {
        self.call(request, call)
    }

    fn forget_vms(&self, request: ForgetVmsRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }

    fn request_renewal(&self, request: RenewalRequest, call: Call) -> Reply<'_, RenewalResponse> {
        self.call(request, call)
    }

    fn install_certificate(&self, request: InstallCertificateRequest, call: Call) -> Reply<'_, ()> {
        self.call(request, call)
    }
}
