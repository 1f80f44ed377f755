//! Keys, tenants and what they may.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a key allows.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// To look.
    Viewer,
    /// To make VMs and use them.
    User,
    /// All of all tenants: keys, hosts, templates.
    Admin,
}

/// A request for a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKey {
    /// Whose it is. A tenant exists by its keys.
    pub tenant: String,
    /// What it allows.
    pub role: Role,
    /// The most VMs that the tenant may have at a time; the tenant's last word counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vms: Option<u32>,
}

/// A key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Key {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// What it allows.
    pub role: Role,
    /// When it was made.
    pub created_ms: u64,
}

/// A new key, with its secret, which is not told again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewKey {
    /// The key.
    #[serde(flatten)]
    pub key: Key,
    /// What goes into `Authorization: Bearer`.
    pub secret: String,
}
