//! A host as the controller sees it: in this process, or at the other end of a connection.

use agent_proto::client::Connection;
use army_api::vms::Balloon;
use army_api::{Problem, ProblemKind};

use crate::node::journal::Entry;
use crate::node::{InUse, Made, Node, Report, Result, TemplateFacts};
use crate::pipe::{Pieces, Sender};

/// Where another host gets a template.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// The host that has it.
    pub host: String,
    /// Where its node listens.
    pub address: std::net::SocketAddr,
    /// The template's name, there and here.
    pub template: String,
    /// The hash of its content.
    pub id: String,
}

/// What the controller asks of a host. [`Node`] says what each does. All of it blocks.
pub trait Host: Send + Sync {
    /// The host's name.
    fn name(&self) -> &str;
    /// Where other hosts reach it, if they do.
    fn address(&self) -> Option<std::net::SocketAddr>;
    /// [`Node::create`].
    fn create(&self, template: &str, entries: &[Entry]) -> Vec<Result<Made>>;
    /// [`Node::fork_live`].
    fn fork_live(&self, id: &str, entries: &[Entry]) -> Vec<Result<Made>>;
    /// [`Node::destroy`].
    fn destroy(&self, id: &str, reason: &str) -> Result<()>;
    /// [`Node::pause`].
    fn pause(&self, id: &str) -> Result<()>;
    /// [`Node::resume`].
    fn resume(&self, id: &str) -> Result<()>;
    /// [`Node::balloon`].
    fn balloon(&self, id: &str, bytes: Option<u64>) -> Result<Balloon>;
    /// [`Node::snapshot`].
    fn snapshot(&self, id: &str, template: &str, diff: bool) -> Result<TemplateFacts>;
    /// [`Node::agent`].
    fn agent(&self, id: &str) -> Result<(Connection, InUse)>;
    /// [`Node::template`].
    fn template(&self, name: &str) -> Result<TemplateFacts>;
    /// [`Node::keep`].
    fn keep(&self, name: &str, standbys: u32) -> Result<()>;
    /// [`Node::remove_template`].
    fn remove_template(&self, name: &str) -> Result<()>;
    /// Gets a template from another host, where it is not here yet.
    fn fetch(&self, origin: &Origin) -> Result<()>;
    /// [`Node::send_template`].
    fn send_template(&self, name: &str, sender: Sender) -> Result<()>;
    /// [`Node::receive_template`].
    fn receive_template(&self, name: &str, pieces: Pieces) -> Result<TemplateFacts>;
    /// [`Node::report`].
    fn report(&self) -> Result<Report>;
    /// [`Node::forget`].
    fn forget(&self, ids: &[String]) -> Result<()>;
    /// A request for a certificate, in PEM, where the host's is getting old.
    fn certificate_request(&self) -> Result<Option<String>>;
    /// Gives the host the certificate, in PEM, that it asked for.
    fn take_certificate(&self, certificate: &str) -> Result<()>;
}

impl Host for Node {
    fn name(&self) -> &str {
        self.name()
    }

    fn address(&self) -> Option<std::net::SocketAddr> {
        None
    }

    fn create(&self, template: &str, entries: &[Entry]) -> Vec<Result<Made>> {
        self.create(template, entries)
    }

    fn fork_live(&self, id: &str, entries: &[Entry]) -> Vec<Result<Made>> {
        self.fork_live(id, entries)
    }

    fn destroy(&self, id: &str, reason: &str) -> Result<()> {
        self.destroy(id, reason)
    }

    fn pause(&self, id: &str) -> Result<()> {
        self.pause(id)
    }

    fn resume(&self, id: &str) -> Result<()> {
        self.resume(id)
    }

    fn balloon(&self, id: &str, bytes: Option<u64>) -> Result<Balloon> {
        self.balloon(id, bytes)
    }

    fn snapshot(&self, id: &str, template: &str, diff: bool) -> Result<TemplateFacts> {
        self.snapshot(id, template, diff)
    }

    fn agent(&self, id: &str) -> Result<(Connection, InUse)> {
        self.agent(id)
    }

    fn template(&self, name: &str) -> Result<TemplateFacts> {
        self.template(name)
    }

    fn keep(&self, name: &str, standbys: u32) -> Result<()> {
        self.keep(name, standbys)
    }

    fn remove_template(&self, name: &str) -> Result<()> {
        self.remove_template(name)
    }

    fn fetch(&self, _: &Origin) -> Result<()> {
        let detail = "this is the only host";
        Err(Problem::new(ProblemKind::Conflict, detail))
    }

    fn send_template(&self, name: &str, sender: Sender) -> Result<()> {
        self.send_template(name, sender)
    }

    fn receive_template(&self, name: &str, pieces: Pieces) -> Result<TemplateFacts> {
        self.receive_template(name, None, pieces)
    }

    fn report(&self) -> Result<Report> {
        Ok(self.report())
    }

    fn forget(&self, ids: &[String]) -> Result<()> {
        self.forget(ids);
        Ok(())
    }

    fn certificate_request(&self) -> Result<Option<String>> {
        // One that is in the controller's own process shows nobody anything.
        Ok(None)
    }

    fn take_certificate(&self, _: &str) -> Result<()> {
        let detail = "no certificate was requested";
        Err(Problem::new(ProblemKind::Conflict, detail))
    }
}
