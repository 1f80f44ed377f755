//! Tenants: what they may have, and what they have.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::changes::mentioned;
use crate::vms::NetworkPolicy;

/// The quotas of a tenant. One that is absent is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quotas {
    /// The number of VMs that the tenant may have at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vms: Option<u32>,
    /// The memory sizes of the guests of all its VMs together, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_bytes: Option<u64>,
    /// The numbers of CPUs of all its VMs together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// The sizes of the writable disks of all its VMs together, in bytes: what they may grow to, and
    /// not what they have written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_bytes: Option<u64>,
    /// The number of templates that the tenant may own, with those that are being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_templates: Option<u32>,
    /// The number of standbys that its own templates may keep on each host together. It is 0 for a
    /// new tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_standbys: Option<u32>,
}

/// What a tenant has; its VMs count by their nominal sizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Used {
    /// The number of VMs that have not ended.
    pub vms: u32,
    /// The memory sizes of their guests together, in bytes, without those of suspended VMs. VMs of
    /// releases that did not record it do not count.
    pub memory_bytes: u64,
    /// The numbers of their CPUs together, without those of suspended VMs.
    pub vcpus: u32,
    /// The sizes of their writable disks together, in bytes. VMs of releases that did not record it
    /// do not count.
    #[serde(default)]
    pub disk_bytes: u64,
    /// The number of templates that the tenant owns.
    #[serde(default)]
    pub templates: u32,
    /// The number of standbys that they keep on each host that has them, together.
    #[serde(default)]
    pub standbys: u32,
}

/// A tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "name": "red", "quotas": {"max_vms": 10, "max_memory_bytes": 8589934592_i64},
    "used": {"vms": 2, "memory_bytes": 1073741824, "vcpus": 4}
}))]
pub struct Tenant {
    /// The name of the tenant.
    pub name: String,
    /// What it may have.
    pub quotas: Quotas,
    /// What it has.
    pub used: Used,
    /// The network policy of the tenant, within which those of its VMs are. It is absent if there is
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
}

/// A request to change the quotas and the network policy of a tenant. What is not mentioned is kept,
/// and null makes unlimited. VMs that exist are kept where a quota becomes smaller than what there is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"max_vms": 20, "max_vcpus": null}))]
pub struct ChangeTenant {
    /// The number of VMs that the tenant may have at a time, at most 1,000,000.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u32>, maximum = 1000000)]
    pub max_vms: Option<Option<u32>>,
    /// The memory sizes of the guests of all its VMs together, in bytes, at most 4 PiB.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>, maximum = 4503599627370496_i64)]
    pub max_memory_bytes: Option<Option<u64>>,
    /// The numbers of CPUs of all its VMs together, at most 1,000,000.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u32>, maximum = 1000000)]
    pub max_vcpus: Option<Option<u32>>,
    /// The sizes of the writable disks of all its VMs together, in bytes, at most 4 PiB.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>, maximum = 4503599627370496_i64)]
    pub max_disk_bytes: Option<Option<u64>>,
    /// The number of templates that the tenant may own, at most 1,000,000.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u32>, maximum = 1000000)]
    pub max_templates: Option<Option<u32>>,
    /// The number of standbys that its own templates may keep on each host together, at most
    /// 1,000,000.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u32>, maximum = 1000000)]
    pub max_standbys: Option<Option<u32>>,
    /// The network policy of the tenant. What its VMs request is narrowed to it when they are created,
    /// forked, built from, changed or resumed; until then, VMs that exist are as they were.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<NetworkPolicy>)]
    pub network: Option<Option<NetworkPolicy>>,
}
