//! Templates.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// A request to take up a template that a host has in its store (`clone snapshot` made it there).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterTemplate {
    /// Its name in the host's store.
    pub name: String,
    /// The host; the only one where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// How many clones are kept ready. They cost memory and start in a millisecond.
    #[serde(default)]
    #[schema(maximum = 1000)]
    pub standbys: u32,
}

/// A template that VMs can be made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// The hash of its content.
    pub id: String,
    /// The template that it is a difference to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The host that it was taken up from.
    pub host: String,
    /// All hosts that have it.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// The tags that point to it.
    #[serde(default)]
    pub tags: Vec<String>,
    /// The RAM of its clones.
    pub memory_bytes: u64,
    /// Data in its memory layers.
    pub data_bytes: u64,
    /// CPUs of its clones.
    pub vcpus: u32,
    /// When it was taken.
    pub taken_ms: u64,
    /// The CPU features that its clones need: they are placed on hosts that have them. Absent for
    /// templates that were taken up by a version that did not look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuFeatures>,
    /// How many clones are kept ready on each of its hosts.
    pub standbys: u32,
    /// How many are ready now, on all hosts.
    pub ready: u32,
    /// VMs that were made of it and run.
    pub vms: u32,
}

/// The CPU features that a guest may use, or that a host offers, as far as hosts differ in them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuFeatures {
    /// The CPU's maker, as in `AuthenticAMD`.
    pub vendor: String,
    /// Feature bits by CPUID leaf and register, as in `7.ebx`.
    pub features: BTreeMap<String, u32>,
}

/// A request to take a template to another host. One that is chosen for VMs gets it by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyTemplate {
    /// The host.
    pub host: String,
}

/// What a tag points to. VMs can be made of a tag, and are then made of that template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetTag {
    /// The template.
    pub template: String,
}

/// Where a template that is sent goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportTemplate {
    /// The host; the only one where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// A change to a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeTemplate {
    /// How many clones are kept ready.
    #[schema(maximum = 1000)]
    pub standbys: u32,
}
