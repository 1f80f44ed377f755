//! The node as a host in the controller's own process.

use agent_proto::client::Connection;
use army_api::vms::Balloon;
use army_api::{Problem, ProblemKind};
use army_node_api::host::Host;
use army_node_api::pipe::{Pieces, Sender};
use army_node_api::{InUse, Made, Origin, Report, Result, TemplateFacts, VmSpec};

use crate::Node;

impl Host for Node {
    fn name(&self) -> &str {
        self.name()
    }

    fn address(&self) -> Option<std::net::SocketAddr> {
        None
    }

    fn create(&self, template: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
        self.create(template, entries)
    }

    fn fork_live(&self, id: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
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
