//! The contract itself.

use std::net::SocketAddr;

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_api::figures::VmFigures;
use army_api::vms::Balloon;
use futures_util::future::BoxFuture;

use crate::chunks::ChunkReceiver;
use crate::moves::ByteStream;
use crate::requests::{
    AcceptVmRequest, AdmitFetchRequest, BalloonRequest, CheckpointVmRequest, ConnectAgentRequest,
    ConsoleOutput, CreateVmsRequest, CreateVmsResponse, DecideMoveRequest, DestroyVmRequest,
    ExpectVmRequest, ExportTemplateRequest, FetchTemplateRequest, ForgetVmsRequest, ForkVmRequest,
    HostReport, ImportTemplateRequest, InspectMoveRequest, InspectTemplateRequest,
    InstallCertificateRequest, ListCheckpointsRequest, MeasureVmRequest, MoveStatus,
    OfferVmRequest, PauseVmRequest, ReadConsoleRequest, RemoveCheckpointRequest,
    RemoveTemplateRequest, RenewalRequest, RenewalResponse, ReportRequest, ResumeVmRequest,
    RewindVmRequest, SendVmRequest, SentVm, SetStandbysRequest, SnapshotVmRequest,
    SuspendVmRequest, TemplateFacts, UpdateVmRequest, VmOffer,
};
use crate::{AgentStream, Call, Error, ErrorKind, Result};

/// What an operation returns: a future, boxed so that the controller can hold nodes of several
/// kinds.
pub type Reply<'a, T> = BoxFuture<'a, Result<T>>;

/// What the controller asks of a node.
///
/// It is implemented by the node in the controller's own process (`army_node::NodeService`), by
/// [`Remote`](crate::Remote) for a node elsewhere, and by
/// [`SimulatedNode`](crate::simulated::SimulatedNode) for tests. [`router`](crate::router::router)
/// serves any of them to [`Remote`](crate::Remote).
///
/// Every call has a deadline and the epoch of the host ([`Call`]). A call of an older epoch than the
/// node has seen is refused with [`StaleEpoch`](crate::ErrorKind::StaleEpoch); only
/// [`export_template`](NodeApi::export_template) is not, which other nodes call. A call that fails with
/// [`DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded) or
/// [`HostUnreachable`](crate::ErrorKind::HostUnreachable) may still have an effect, or have it
/// later; the next [`report`](NodeApi::report) shows it.
///
/// An operation is added by a request in [`requests`](crate::requests), a method here, and a route
/// in [`router`](crate::router).
pub trait NodeApi: Send + Sync + 'static {
    /// The name of the host.
    fn name(&self) -> &str;

    /// The address where other nodes reach this one; `None` for a node that has no network.
    fn address(&self) -> Option<SocketAddr>;

    /// Creates VMs as clones of a template, and answers when they run with their own identities.
    /// Each VM has a result of its own, in the request's order.
    ///
    /// A VM is written to the node's journal before it is created, so that neither a crash of the
    /// node nor the loss of the answer leaves an unknown VM. A VM that is known in the same epoch or
    /// in a later one is refused with [`Conflict`](crate::ErrorKind::Conflict), so that a repeated
    /// request does not create it twice. [`HostUnsupported`](crate::ErrorKind::HostUnsupported)
    /// means that another host may be able to run the VM.
    fn create_vms(&self, request: CreateVmsRequest, call: Call) -> Reply<'_, CreateVmsResponse>;

    /// Creates VMs as forks of a running VM, which continues to run. Otherwise the same as
    /// [`create_vms`](NodeApi::create_vms).
    fn fork_vm(&self, request: ForkVmRequest, call: Call) -> Reply<'_, CreateVmsResponse>;

    /// Ends a VM. It is not an error if the VM has ended, or is unknown.
    fn destroy_vm(&self, request: DestroyVmRequest, call: Call) -> Reply<'_, ()>;

    /// Stops the CPUs of a running VM.
    fn pause_vm(&self, request: PauseVmRequest, call: Call) -> Reply<'_, ()>;

    /// Suspends a running or paused VM: its state is kept on the host's disk, and it uses no memory. It
    /// is not an error if the VM is suspended.
    fn suspend_vm(&self, request: SuspendVmRequest, call: Call) -> Reply<'_, ()>;

    /// Takes a checkpoint of a running VM, which continues to run. Checkpoints exist as long as the VM's
    /// process: a VM that has some is not suspended.
    fn checkpoint_vm(&self, request: CheckpointVmRequest, call: Call) -> Reply<'_, Checkpoint>;

    /// Lists the checkpoints of a VM.
    fn list_checkpoints(
        &self,
        request: ListCheckpointsRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints>;

    /// Removes a checkpoint of a VM, and lists the others.
    fn remove_checkpoint(
        &self,
        request: RemoveCheckpointRequest,
        call: Call,
    ) -> Reply<'_, Checkpoints>;

    /// Sets a VM back to a checkpoint, in place. Connections to its agent end.
    fn rewind_vm(&self, request: RewindVmRequest, call: Call) -> Reply<'_, Rewound>;

    /// Lets the CPUs of a paused VM run again, and wakes a suspended VM.
    fn resume_vm(&self, request: ResumeVmRequest, call: Call) -> Reply<'_, ()>;

    /// Changes a VM that has not ended, once for each [`revision`](UpdateVmRequest::revision). The
    /// network policy is in force when this returns, and is narrowed to what the VM's template
    /// permits.
    ///
    /// A VM that has ended, or is about to, is refused with
    /// [`Conflict`](crate::ErrorKind::Conflict): after a success, the former time to live or idle
    /// policy does not end it any more.
    fn update_vm(&self, request: UpdateVmRequest, call: Call) -> Reply<'_, ()>;

    /// Reads the memory balloon of a VM, after requesting a new size where the request has one. The
    /// guest changes the size gradually.
    fn balloon(&self, request: BalloonRequest, call: Call) -> Reply<'_, Balloon>;

    /// Measures what a running VM uses.
    fn measure_vm(&self, request: MeasureVmRequest, call: Call) -> Reply<'_, VmFigures>;

    /// Reads the end of what a running VM's guest has written to its serial console.
    fn read_console(&self, request: ReadConsoleRequest, call: Call) -> Reply<'_, ConsoleOutput>;

    /// Creates a template from a running VM, which continues to run.
    fn snapshot_vm(&self, request: SnapshotVmRequest, call: Call) -> Reply<'_, TemplateFacts>;

    /// Describes a VM for its move to another host, where it can be moved.
    ///
    /// A VM that cannot be moved is refused with [`Conflict`](crate::ErrorKind::Conflict) and the
    /// reason.
    fn offer_vm(&self, _: OfferVmRequest, _: Call) -> Reply<'_, VmOffer> {
        cannot_move()
    }

    /// Prepares to receive a VM from another host, which shows the ticket of the request.
    ///
    /// The VM is in the node's journal from then on, in the epoch of the request. It is refused where
    /// the host knows it in that epoch or a later one, or has not got its template.
    fn expect_vm(&self, _: ExpectVmRequest, _: Call) -> Reply<'_, ()> {
        cannot_move()
    }

    /// Sends a VM to a host that expects it, and answers when it runs there. A VM that is paused or
    /// suspended runs meanwhile.
    ///
    /// The node goes on where its caller gives up. After a failure, the VM runs here, unless
    /// [`inspect_move`](NodeApi::inspect_move) says something else.
    fn send_vm(&self, _: SendVmRequest, _: Call) -> Reply<'_, SentVm> {
        cannot_move()
    }

    /// Receives a VM that the node expects, over a stream from its source, and answers when the stream
    /// is being read. Only [`router`](crate::router::router) calls it, which has checked the ticket.
    fn accept_vm(&self, _: AcceptVmRequest, _: ByteStream, _: Call) -> Reply<'_, ()> {
        cannot_move()
    }

    /// Says where a VM is that is being moved. It changes nothing.
    fn inspect_move(&self, _: InspectMoveRequest, _: Call) -> Reply<'_, MoveStatus> {
        cannot_move()
    }

    /// Decides whether a VM that was being moved is on this host. It is not an error if that is decided
    /// already.
    ///
    /// It is refused with [`Conflict`](crate::ErrorKind::Conflict) where the host knows a later epoch of
    /// the VM, where the VM is still being sent or received, or runs on the host and should not.
    fn decide_move(&self, _: DecideMoveRequest, _: Call) -> Reply<'_, ()> {
        cannot_move()
    }

    /// Connects to the agent in a VM. The VM counts as used while the stream or the connection that
    /// is made of it lives, and is resumed where it was paused because it was idle or is suspended.
    fn connect_agent(&self, request: ConnectAgentRequest, call: Call) -> Reply<'_, AgentStream>;

    /// Describes a template in the host's store. Reading a template changes nothing, so it is answered
    /// in any epoch, also to other nodes.
    fn inspect_template(
        &self,
        request: InspectTemplateRequest,
        call: Call,
    ) -> Reply<'_, TemplateFacts>;

    /// Verifies a template and keeps that many standbys of it ready from now on.
    fn set_standbys(&self, request: SetStandbysRequest, call: Call) -> Reply<'_, ()>;

    /// Removes a template that no VM uses from the host's store, and ends its standbys.
    fn remove_template(&self, request: RemoveTemplateRequest, call: Call) -> Reply<'_, ()>;

    /// Copies a template from another host, unless this host has it.
    fn fetch_template(&self, request: FetchTemplateRequest, call: Call) -> Reply<'_, ()>;

    /// Permits another host to fetch a template from this one with a ticket, for some minutes. A node
    /// that has no network needs no permission.
    fn admit_fetch(&self, _: AdmitFetchRequest, _: Call) -> Reply<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Opens a template and sends all of it as one stream. An error after the beginning is the last
    /// item of the stream.
    fn export_template(
        &self,
        request: ExportTemplateRequest,
        call: Call,
    ) -> Reply<'_, ChunkReceiver>;

    /// Receives a template as one stream, verifies it, and puts it into the host's store.
    fn import_template(
        &self,
        request: ImportTemplateRequest,
        content: ChunkReceiver,
        call: Call,
    ) -> Reply<'_, TemplateFacts>;

    /// Reports the state of the host and of all VMs in its journal.
    fn report(&self, request: ReportRequest, call: Call) -> Reply<'_, HostReport>;

    /// Removes VMs that have ended from the node's journal, once the controller has recorded it.
    fn forget_vms(&self, request: ForgetVmsRequest, call: Call) -> Reply<'_, ()>;

    /// Asks for a certificate signing request, which the node makes where its certificate is getting
    /// old.
    fn request_renewal(&self, request: RenewalRequest, call: Call) -> Reply<'_, RenewalResponse>;

    /// Installs the certificate that the node has last requested.
    fn install_certificate(&self, request: InstallCertificateRequest, call: Call) -> Reply<'_, ()>;
}

/// The answer of nodes that neither send nor receive VMs.
fn cannot_move<T: Send + 'static>() -> Reply<'static, T> {
    let message = "this host does not move VMs";
    let refused = Err(Error::new(ErrorKind::Conflict, message));
    Box::pin(std::future::ready(refused))
}
