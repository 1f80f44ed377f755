//! Events: the recorded changes of state of VMs, hosts, templates and keys.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// A change of state that Army has recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// The id of the event. A later event has a higher id.
    pub id: i64,
    /// The time of the event, in milliseconds since 1970.
    pub time_ms: u64,
    /// The kind of the event, such as `vm.running` or `host.unreachable`.
    pub kind: String,
    /// The object that the event is about: the id of a VM or a key, or the name of a host or a
    /// template.
    pub subject: String,
    /// The tenant that owns the object. It is empty for objects that all tenants share, and `-` for
    /// templates that only administrators can use.
    pub tenant: String,
    /// A description of the event for people.
    pub detail: String,
    /// The id of the key with whose request the change was made. It is `system` where Army has
    /// recorded it by itself.
    #[serde(default)]
    pub actor: String,
}

/// A filter that chooses which events are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventFilter {
    /// Only events with a higher id are sent. The default is the id in the `Last-Event-ID` header;
    /// without that header, only new events are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 0)]
    pub after: Option<i64>,
}
