//! What happened, to what, and why.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Grows with each event.
    pub id: i64,
    /// When it happened.
    pub time_ms: u64,
    /// What happened, as in `vm.running` or `host.unreachable`.
    pub kind: String,
    /// To what: the id of a VM, or the name of a host or a template.
    pub subject: String,
    /// Whose it is; empty for what belongs to all.
    pub tenant: String,
    /// In words.
    pub detail: String,
}

/// Which events are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventFilter {
    /// Those after this one; only new ones where nothing is given. `Last-Event-ID` does the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<i64>,
}
