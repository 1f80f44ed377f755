//! Requests about the host itself.

use std::collections::HashMap;

use army_api::hosts::{Capacity, MissingJailLayer};
use army_api::templates::CpuFeatures;
use army_api::vms::{VmMemory, VmState};
use serde::{Deserialize, Serialize};

super::operations! {
    ReportRequest = "report" -> HostReport;
    RenewalRequest = "request-renewal" -> RenewalResponse;
    InstallCertificateRequest = "install-certificate" -> ();
}

/// See [`NodeApi::report`](crate::NodeApi::report).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReportRequest {}

/// The state of a host and of all its VMs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostReport {
    /// What the host has, and how much of it is left.
    pub capacity: Capacity,
    /// The layers that the jail of the host's VMs lacks.
    #[serde(default)]
    pub missing_jail_layers: Vec<MissingJailLayer>,
    /// All VMs in the node's journal. One that has ended stays in it until the controller has
    /// [`forget_vms`](crate::NodeApi::forget_vms) called for it.
    pub vms: Vec<VmReport>,
    /// The number of standbys that are ready, by the template's name.
    pub ready: HashMap<String, u32>,
    /// The number of standbys that the node keeps, by the template's name; `None` where the node does
    /// not say. A node forgets it when its process ends.
    #[serde(default)]
    pub standbys: Option<HashMap<String, u32>>,
    /// The CPU features that clones can have on the host, where the node says so.
    #[serde(default)]
    pub cpu: Option<CpuFeatures>,
    /// What an administrator should know about the host, as sentences: for example that a file of
    /// its journal could not be read.
    #[serde(default)]
    pub notices: Vec<String>,
}

/// The state of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM's id.
    pub id: String,
    /// The state of the VM.
    pub state: VmState,
    /// Why the VM has ended.
    pub reason: Option<String>,
    /// The memory of a VM that runs.
    pub memory: Option<VmMemory>,
    /// The addresses that the host has given a VM that runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// The incarnation of the VM on the host; 0 where the node does not say.
    #[serde(default)]
    pub epoch: u64,
}

/// See [`NodeApi::request_renewal`](crate::NodeApi::request_renewal).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RenewalRequest {}

/// Whether the host's certificate should be renewed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewalResponse {
    /// A certificate signing request in PEM, where the host's certificate is getting old.
    pub signing_request: Option<String>,
}

/// See [`NodeApi::install_certificate`](crate::NodeApi::install_certificate).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstallCertificateRequest {
    /// The certificate in PEM, for the last signing request.
    pub certificate: String,
}
