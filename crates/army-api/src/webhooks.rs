//! Webhooks: events that the server sends to a URL.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The header with the signature of a delivery: `t=SECONDS,v1=HEX`. The hexadecimal number is the
/// HMAC-SHA256, by the webhook's secret, of the seconds since 1970, a `.` and the body.
pub const SIGNATURE_HEADER: &str = "army-signature";

/// The header with the id of a delivery, which is the same whenever an event is sent to a webhook
/// again, by whichever controller, and which no other delivery has.
pub const DELIVERY_HEADER: &str = "army-delivery";

/// A request to create a webhook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"url": "https://ci.example.org/army", "events": ["vm.running", "vm.failed"]}))]
pub struct CreateWebhook {
    /// The URL that events are sent to with `POST`, of `https` or `http`. Redirects are not
    /// followed. The webhooks of users may only lead to public addresses.
    #[schema(min_length = 1, max_length = 2000)]
    pub url: String,
    /// The kinds of events to send, such as `vm.running`, or `vm.*` for all of VMs. An empty list is
    /// all events that the key may see.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 50)]
    pub events: Vec<String>,
    /// The secret that deliveries are signed with, 16 to 200 characters. By default the server makes
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 16, max_length = 200)]
    pub secret: Option<String>,
}

/// A webhook, without its secret.
///
/// Events are sent in their order, at least once each: one may come again although it was accepted,
/// where the server ends or another controller takes over at that moment. A delivery that is not
/// answered with a status of 200 to 299 is repeated, with growing pauses of up to an hour. After 3 days
/// without a success, the webhook is disabled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Webhook {
    /// The unique id of the webhook.
    pub id: String,
    /// The tenant that owns the webhook. It is empty for webhooks of administrators, which get the
    /// events of all tenants.
    pub tenant: String,
    /// The URL that events are sent to.
    pub url: String,
    /// The kinds of events that are sent; an empty list is all.
    pub events: Vec<String>,
    /// The time at which the webhook was created, in milliseconds since 1970.
    pub created_ms: u64,
    /// The id of the last event that was delivered or is of no interest. Events with higher ids
    /// follow.
    pub delivered: i64,
    /// The number of failures since the last success.
    pub failures: u32,
    /// Why the last delivery failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the webhook was disabled, because nothing was delivered for 3 days.
    pub disabled: bool,
}

/// A new webhook with its secret, which cannot be retrieved later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewWebhook {
    /// The webhook, without its secret.
    #[serde(flatten)]
    pub webhook: Webhook,
    /// The secret that deliveries are signed with.
    pub secret: String,
}
