//! What is kept of the requests of operations, for whoever resumes them.

use serde::{Deserialize, Serialize};

/// What is kept of the request of an operation that one host carries out.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HostRecord {
    /// The name of the host.
    pub(crate) host: String,
    /// The name under which hosts store the template, where it is not the operation's subject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) store_name: Option<String>,
}

/// What is kept of a request to register a template.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RegisterRecord {
    /// The host that has the template.
    pub(crate) host: String,
    /// The number of standbys to keep.
    pub(crate) standbys: u32,
}

/// The part of what is kept that says how hosts name a template.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct StoredRecord {
    /// The name under which hosts store the template, where it is not the operation's subject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) store_name: Option<String>,
}
