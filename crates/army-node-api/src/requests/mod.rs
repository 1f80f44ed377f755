//! The requests of the contract, each with its response and its path.
//!
//! They travel as JSON. A field that is added later has a default, so that a controller and a node
//! of different releases understand each other; what cannot be added in that way takes a new
//! [`VERSION`](crate::VERSION).

mod checkpoints;
mod figures;
mod hosts;
mod moves;
mod templates;
mod vms;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use checkpoints::{
    CheckpointVmRequest, ListCheckpointsRequest, RemoveCheckpointRequest, RewindVmRequest,
};
pub use figures::{ConsoleOutput, MeasureVmRequest, ReadConsoleRequest};
pub use hosts::{
    HostReport, InstallCertificateRequest, RenewalRequest, RenewalResponse, ReportRequest, VmReport,
};
pub use moves::{
    AcceptVmRequest, DecideMoveRequest, ExpectVmRequest, InspectMoveRequest, MoveDecision,
    MoveStatus, OfferVmRequest, Presence, SendVmRequest, SentVm, VmOffer,
};
pub use templates::{
    AdmitFetchRequest, ExportTemplateRequest, FetchTemplateRequest, ImportTemplateRequest,
    InspectTemplateRequest, RemoveTemplateRequest, SetStandbysRequest, TemplateFacts,
};
pub use vms::{
    BalloonRequest, ConnectAgentRequest, CreateVmsRequest, CreateVmsResponse, CreatedVm,
    DestroyVmRequest, ForgetVmsRequest, ForkVmRequest, IdleChange, Lifetime, PauseVmRequest,
    ResumeVmRequest, SnapshotVmRequest, SuspendVmRequest, UpdateVmRequest, VmSpec,
};

/// A request that is one JSON document and is answered by one.
pub trait Operation: Serialize + DeserializeOwned + Send + 'static {
    /// The last part of the request's path, which names the operation.
    const NAME: &'static str;
    /// What the node answers.
    type Response: Serialize + DeserializeOwned + Send + 'static;
}

/// Implements [`Operation`] for requests.
macro_rules! operations {
    ($($request:ident = $name:literal -> $response:ty;)*) => {
        $(impl $crate::requests::Operation for $request {
            const NAME: &'static str = $name;
            type Response = $response;
        })*
    };
}
use operations;
