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

/// What a key is restricted to, beside its role.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyScope {
    /// The key is for one VM, by its id: its state, commands, files, ports and changes. It cannot
    /// fork it or make a template of it.
    Vm(String),
    /// The key is for `/metrics` alone, which it may read whatever its role is.
    Metrics,
    /// The key is for templates, tags and builds.
    Templates,
}

/// A request to create a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "tenant": "red", "role": "user", "name": "laptop of anna", "ttl_s": 2592000
}))]
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
    /// What the key is for, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 100)]
    pub name: Option<String>,
    /// The lifetime of the key, in seconds, 1 to 315,360,000 (10 years). By default, there is no
    /// limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 315360000)]
    pub ttl_s: Option<u64>,
    /// What the key is restricted to. By default, only its role restricts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<KeyScope>,
}

impl CreateKey {
    /// A key of this role without limits.
    pub fn new(tenant: impl Into<String>, role: Role) -> Self {
        Self {
            tenant: tenant.into(),
            role,
            max_vms: None,
            name: None,
            ttl_s: None,
            scope: None,
        }
    }
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
    /// What the key is for, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The time from which on the key is not valid, in milliseconds since 1970. It is absent if
    /// there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// The time at which the key was last used, to the minute, in milliseconds since 1970. It is
    /// absent if the key was never used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_ms: Option<u64>,
    /// What the key is restricted to. It is absent if only its role restricts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<KeyScope>,
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
