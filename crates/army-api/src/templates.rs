//! Templates, their tags, and their copies on hosts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// A request to register a template that is in a host's store, where `clone snapshot` created it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterTemplate {
    /// The name of the template in the host's store.
    #[schema(max_length = 48)]
    pub name: String,
    /// The host that has the template. It can be omitted if there is only one host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 200)]
    pub host: Option<String>,
    /// The number of standbys to keep on each host that has the template, 0 to 1,000. Standbys are
    /// clones that are started in advance: they use memory, and a VM that is created from one
    /// starts within milliseconds. The default is 0.
    #[serde(default)]
    #[schema(maximum = 1000)]
    pub standbys: u32,
}

/// The state of a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TemplateState {
    /// VMs can be created from the template.
    #[default]
    Ready,
    /// The template is being removed from its hosts. It cannot be used any more.
    Removing,
}

/// A template from which VMs can be forked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// The unique name of the template.
    pub name: String,
    /// The id of the template: the hash of its content.
    pub id: String,
    /// The state of the template.
    #[serde(default)]
    pub state: TemplateState,
    /// The template on which this one builds. Only the difference to it is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The host from which the template was registered.
    pub host: String,
    /// All hosts that have a copy of the template.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// The tags that point to the template.
    #[serde(default)]
    pub tags: Vec<String>,
    /// The memory size of each clone, in bytes.
    pub memory_bytes: u64,
    /// The size of the data in the template's memory layers, in bytes.
    pub data_bytes: u64,
    /// The number of virtual CPUs of each clone.
    pub vcpus: u32,
    /// The time at which the template was created, in milliseconds since 1970.
    pub taken_ms: u64,
    /// The CPU features that the clones require. They are placed only on hosts that have these
    /// features. It is absent for templates that were registered by a version of Army that did not
    /// record them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuFeatures>,
    /// The number of standbys to keep on each of the template's hosts.
    pub standbys: u32,
    /// The number of standbys that are ready now, on all hosts together.
    pub ready: u32,
    /// The number of VMs that were forked from the template and have not ended.
    pub vms: u32,
}

/// The CPU features that a guest may use, or that a host offers. Only features in which hosts can
/// differ are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuFeatures {
    /// The CPU vendor, such as `AuthenticAMD`.
    pub vendor: String,
    /// The feature bits by CPUID leaf and register, such as `7.ebx`.
    pub features: BTreeMap<String, u32>,
}

/// A request to copy a template to another host. Army also copies templates on demand to hosts that
/// it chooses for VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyTemplate {
    /// The name of the host to copy the template to.
    #[schema(max_length = 200)]
    pub host: String,
}

/// A request to set a tag. VMs that are created from a tag are forked from the template that it
/// points to at that time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetTag {
    /// The name of the template that the tag points to.
    #[schema(max_length = 48)]
    pub template: String,
}

/// The destination of a template that is uploaded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportTemplate {
    /// The host that stores the template. It can be omitted if there is only one host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 200)]
    pub host: Option<String>,
}

/// A request to change a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeTemplate {
    /// The number of standbys to keep on each of the template's hosts, 0 to 1,000.
    #[schema(maximum = 1000)]
    pub standbys: u32,
}
