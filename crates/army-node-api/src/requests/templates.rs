//! Requests about templates.

use std::net::SocketAddr;

use army_api::templates::CpuFeatures;
use serde::{Deserialize, Serialize};

super::operations! {
    InspectTemplateRequest = "inspect-template" -> TemplateFacts;
    SetStandbysRequest = "set-standbys" -> ();
    RemoveTemplateRequest = "remove-template" -> ();
    FetchTemplateRequest = "fetch-template" -> ();
    AdmitFetchRequest = "admit-fetch" -> ();
}

/// What a host knows of a template in its store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFacts {
    /// The hash of the template's content.
    pub id: String,
    /// The id of the template that this one is a difference to.
    pub parent: Option<String>,
    /// The size of the clones' RAM.
    pub memory_bytes: u64,
    /// The size of the data in the memory layers.
    pub data_bytes: u64,
    /// The number of the clones' CPUs.
    pub vcpus: u32,
    /// The sizes of the clones' writable disks together, where the node says so.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// When the template was taken, in milliseconds since 1970.
    pub taken_ms: u64,
    /// The CPU features that clones need, where the node says so.
    #[serde(default)]
    pub cpu: Option<CpuFeatures>,
}

/// See [`NodeApi::inspect_template`](crate::NodeApi::inspect_template).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InspectTemplateRequest {
    /// The name of the template.
    pub template: String,
}

/// See [`NodeApi::set_standbys`](crate::NodeApi::set_standbys).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SetStandbysRequest {
    /// The name of the template.
    pub template: String,
    /// The number of standbys to keep.
    pub standbys: u32,
}

/// See [`NodeApi::remove_template`](crate::NodeApi::remove_template).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemoveTemplateRequest {
    /// The name of the template.
    pub template: String,
}

/// See [`NodeApi::fetch_template`](crate::NodeApi::fetch_template).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FetchTemplateRequest {
    /// The host that has the template.
    pub host: String,
    /// The address where that host's node listens.
    pub address: SocketAddr,
    /// The name of the template, which is the same on both hosts.
    pub template: String,
    /// The hash of the template's content. Another template of the same name is not accepted.
    pub id: String,
    /// The ticket that the controller has told that host, too.
    #[serde(default)]
    pub ticket: Option<String>,
}

/// See [`NodeApi::admit_fetch`](crate::NodeApi::admit_fetch).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdmitFetchRequest {
    /// The ticket: at least 32 random characters.
    pub ticket: String,
    /// The name of the template.
    pub template: String,
    /// The hash of the template's content.
    pub id: String,
    /// The host that may fetch the template.
    pub host: String,
    /// How long the ticket is valid, in seconds. An hour is the most.
    pub valid_s: u64,
}

/// See [`NodeApi::export_template`](crate::NodeApi::export_template).
#[derive(Debug, Clone)]
pub struct ExportTemplateRequest {
    /// The name of the template.
    pub template: String,
}

/// See [`NodeApi::import_template`](crate::NodeApi::import_template).
#[derive(Debug, Clone)]
pub struct ImportTemplateRequest {
    /// The name that the template gets.
    pub template: String,
}
