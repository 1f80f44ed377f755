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

/// Who can use a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// The tenant that owns the template, and administrators.
    Private,
    /// The tenants of `shared_with`, too.
    Shared,
    /// All tenants. Templates of releases in which templates had no owner are public.
    #[default]
    Public,
}

/// A template from which VMs can be forked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// The name of the template. It is unique among the templates and tags of its tenant. Callers of
    /// other tenants name the template `TENANT/NAME`.
    pub name: String,
    /// The id of the template: the hash of its content.
    pub id: String,
    /// The state of the template.
    #[serde(default)]
    pub state: TemplateState,
    /// The tenant that owns the template. It is absent for templates of the administrators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Who can use the template.
    #[serde(default)]
    pub visibility: Visibility,
    /// The tenants that can use a template whose `visibility` is `shared`. Only the owner and
    /// administrators see them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_with: Vec<String>,
    /// The name under which hosts store the template, where it is not `name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_name: Option<String>,
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
    /// The sizes of the writable disks of each clone together, in bytes. A clone stores only what it
    /// writes. It is absent for templates that were registered by a version of Army that did not
    /// record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
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

impl Template {
    /// The name under which hosts store the template. It is unique among the templates of all
    /// tenants.
    pub fn stored_as(&self) -> &str {
        self.store_name.as_deref().unwrap_or(&self.name)
    }

    /// The name by which every caller who can use the template reaches it: `TENANT/NAME`, or `NAME`
    /// for templates of the administrators.
    pub fn full_name(&self) -> String {
        match &self.tenant {
            Some(tenant) => format!("{tenant}/{}", self.name),
            None => self.name.clone(),
        }
    }
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
    #[schema(max_length = 97)]
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

/// A request to change a template. What is not mentioned is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"visibility": "shared", "shared_with": ["blue"]}))]
pub struct ChangeTemplate {
    /// The number of standbys to keep on each of the template's hosts, 0 to 1,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1000)]
    pub standbys: Option<u32>,
    /// Who can use the template. Only administrators make a template public. VMs that exist are
    /// kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visibility: Option<Visibility>,
    /// The tenants that can use the template, at most 100, in place of those before. It requires
    /// the visibility `shared`, which is the default where `shared_with` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 100)]
    pub shared_with: Option<Vec<String>>,
}
