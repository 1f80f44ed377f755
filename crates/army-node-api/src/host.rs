//! A host as the controller sees it: in this process, or at the other end of a connection.

use agent_proto::client::Connection;
use army_api::vms::Balloon;

use crate::pipe::{Pieces, Sender};
use crate::{InUse, Made, Origin, Report, Result, TemplateFacts, VmSpec};

/// What the controller asks of a host. `Node` says what each does. All of it blocks.
pub trait Host: Send + Sync {
    /// The host's name.
    fn name(&self) -> &str;
    /// Where other hosts reach it, if they do.
    fn address(&self) -> Option<std::net::SocketAddr>;
    /// `Node::create`.
    fn create(&self, template: &str, entries: &[VmSpec]) -> Vec<Result<Made>>;
    /// `Node::fork_live`.
    fn fork_live(&self, id: &str, entries: &[VmSpec]) -> Vec<Result<Made>>;
    /// `Node::destroy`.
    fn destroy(&self, id: &str, reason: &str) -> Result<()>;
    /// `Node::pause`.
    fn pause(&self, id: &str) -> Result<()>;
    /// `Node::resume`.
    fn resume(&self, id: &str) -> Result<()>;
    /// `Node::balloon`.
    fn balloon(&self, id: &str, bytes: Option<u64>) -> Result<Balloon>;
    /// `Node::snapshot`.
    fn snapshot(&self, id: &str, template: &str, diff: bool) -> Result<TemplateFacts>;
    /// `Node::agent`.
    fn agent(&self, id: &str) -> Result<(Connection, InUse)>;
    /// `Node::template`.
    fn template(&self, name: &str) -> Result<TemplateFacts>;
    /// `Node::keep`.
    fn keep(&self, name: &str, standbys: u32) -> Result<()>;
    /// `Node::remove_template`.
    fn remove_template(&self, name: &str) -> Result<()>;
    /// Gets a template from another host, where it is not here yet.
    fn fetch(&self, origin: &Origin) -> Result<()>;
    /// `Node::send_template`.
    fn send_template(&self, name: &str, sender: Sender) -> Result<()>;
    /// `Node::receive_template`.
    fn receive_template(&self, name: &str, pieces: Pieces) -> Result<TemplateFacts>;
    /// `Node::report`.
    fn report(&self) -> Result<Report>;
    /// `Node::forget`.
    fn forget(&self, ids: &[String]) -> Result<()>;
    /// A request for a certificate, in PEM, where the host's is getting old.
    fn certificate_request(&self) -> Result<Option<String>>;
    /// Gives the host the certificate, in PEM, that it asked for.
    fn take_certificate(&self, certificate: &str) -> Result<()>;
}
