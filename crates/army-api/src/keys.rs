//! Keys, tenants and roles.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The role of a key, which determines what the key permits.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The key permits reading.
    Viewer,
    /// The key permits reading, and creating and using VMs.
    User,
    /// The key permits everything for all tenants, including the management of keys, hosts and
    /// templates.
    Admin,
}

/// A request to create a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKey {
    /// The tenant that owns the key. A tenant exists as soon as a key names it.
    #[schema(max_length = 48)]
    pub tenant: String,
    /// The role of the key.
    pub role: Role,
    /// The quota of the tenant: the number of VMs that it may have at a time, at most 1,000,000. It
    /// replaces any earlier quota of the tenant. If it is absent, an earlier quota is kept; without
    /// one, the number is unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1000000)]
    pub max_vms: Option<u32>,
}

/// A key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Key {
    /// The unique id of the key.
    pub id: String,
    /// The tenant that owns the key.
    pub tenant: String,
    /// The role of the key.
    pub role: Role,
    /// The time at which the key was created, in milliseconds since 1970.
    pub created_ms: u64,
}

/// A new key with its secret, which cannot be retrieved later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewKey {
    /// The key, without its secret.
    #[serde(flatten)]
    pub key: Key,
    /// The secret of the key, which clients send in the header `Authorization: Bearer SECRET`.
    pub secret: String,
}
