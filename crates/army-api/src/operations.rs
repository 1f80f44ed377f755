//! Operations: work that goes on whatever becomes of the client that requested it.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Problem;
use crate::hosts::Host;
use crate::moves::MovedVm;
use crate::templates::Template;
use crate::vms::CreatedVms;

/// The longest time that a request waits for an operation, in seconds.
pub const MAX_WAIT_S: u64 = 3600;

/// The kind of an operation. New kinds may be added; existing ones are never renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// VMs are created from a template.
    CreateVms,
    /// VMs are created as live forks of a running VM.
    ForkVm,
    /// A template is created from a running VM.
    SnapshotVm,
    /// A template that is in a host's store is registered.
    RegisterTemplate,
    /// A template is copied to another host.
    CopyTemplate,
    /// A template is received from a client.
    ImportTemplate,
    /// A template is removed from all hosts.
    RemoveTemplate,
    /// A template is built from another one.
    BuildTemplate,
    /// A host is excluded from placement.
    DrainHost,
    /// A host is included in placement again.
    UndrainHost,
    /// A key is created.
    CreateKey,
    /// A token with which a host can join is created.
    CreateJoinToken,
    /// A command is started in a guest.
    StartCommand,
    /// A VM is moved to another host.
    MigrateVm,
    /// All VMs of a host are moved to others.
    EvacuateHost,
}

/// The state of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// The operation is in progress.
    Running,
    /// The operation has ended, and has made what was requested. Of several VMs, some may have
    /// failed.
    Succeeded,
    /// The operation has ended without making anything.
    Failed,
}

/// An operation: work that was requested, and what has become of it. An operation that has ended is
/// kept for a day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// The unique id of the operation.
    pub id: String,
    /// The tenant of the key that requested the operation.
    pub tenant: String,
    /// The kind of the operation.
    pub kind: OperationKind,
    /// The state of the operation.
    pub state: OperationState,
    /// The object that the operation is about: the name of a template or a host, or the id of a VM.
    pub subject: String,
    /// The id of the key that requested the operation.
    pub actor: String,
    /// The time at which the operation was requested, in milliseconds since 1970.
    pub created_ms: u64,
    /// The time at which the operation last changed, in milliseconds since 1970.
    pub updated_ms: u64,
    /// The time at which the operation ended, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    /// What the operation is doing or waiting for, as a sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// The VMs that the operation has created, as they are now. It is absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<CreatedVms>,
    /// The template that the operation has made, as it is now. It is absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// The host that the operation has changed, as it is now. It is absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// The VM that the operation has moved, as it is now. It is absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<MovedVm>,
    /// The reason that the operation failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

/// A filter that chooses which operations are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct OperationFilter {
    /// Only operations in this state are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<OperationState>,
    /// Only operations of this kind are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<OperationKind>,
    /// The maximum number of operations in the response, 1 to 1,000. The default is 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
    /// The position at which the page begins: the value of `next` in the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 60)]
    pub after: Option<String>,
}

/// A page of a list of operations, the newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationPage {
    /// The operations of this page.
    pub operations: Vec<Operation>,
    /// The value of `after` that requests the next page. It is absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// How long a request waits for its operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Wait {
    /// The time after which the response is sent even if the operation has not ended, in seconds, 0
    /// to 3,600. It is then `202 Accepted` with the operation, whose path is in the `Location` header.
    /// By default, the response to a request for an operation is sent when the operation has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 0, maximum = 3600)]
    pub wait: Option<u64>,
}
