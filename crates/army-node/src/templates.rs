//! The templates in the host's store.

use std::io::{self, BufReader, BufWriter};
use std::path::PathBuf;

use army_node_api::Result;
use army_node_api::chunks::{ChunkReader, ChunkReceiver, ChunkSender, ChunkWriter};
use army_node_api::requests::TemplateFacts;
use army_node_api::validate::check_template_name;
use clone_template::Template;

use crate::{Node, cpu_features, lock};

/// Bytes of a template that are sent in one chunk.
const CHUNK: usize = 256 << 10;

impl Node {
    /// Describes a template.
    pub fn template(&self, name: &str) -> Result<TemplateFacts> {
        Ok(facts(&self.open_template(name)?))
    }

    /// Creates a template from a running VM, which continues to run.
    pub fn snapshot(&self, id: &str, template: &str, diff: bool) -> Result<TemplateFacts> {
        let vm = self.find_awake(id)?;
        let target = self.template_path(template)?;
        let (template, _) = clone_host::snapshot::take(&self.runtime, &vm, &target, diff)?;
        Ok(facts(&template))
    }

    /// Receives a template from a stream. With an `id`, another template is refused.
    pub fn receive_template(
        &self,
        name: &str,
        id: Option<&str>,
        content: ChunkReceiver,
    ) -> Result<TemplateFacts> {
        let target = self.template_path(name)?;
        // Templates are received one after the other: two with the same name would conflict.
        let _turn = lock(&self.receiving);
        let mut source = BufReader::with_capacity(CHUNK, ChunkReader::new(content));
        let template = clone_template::receive(&target, id, &mut source, &self.runtime.verified())?;
        Ok(facts(&template))
    }

    /// Verifies a template and keeps that many standbys of it ready from now on.
    pub fn set_standbys(&self, name: &str, standbys: u32) -> Result<()> {
        let template = self.open_template(name)?;
        self.standbys.set(name, template, standbys);
        Ok(())
    }

    /// Removes a template that no VM uses.
    pub fn remove_template(&self, name: &str) -> Result<()> {
        check_template_name(name)?;
        self.standbys.stop(name);
        lock(&self.sources).remove(name);
        let id = self
            .open_template(name)
            .ok()
            .map(|it| it.manifest().id.clone());
        self.store.remove(name)?;
        match id {
            Some(id) => Ok(self.runtime.verified().forget(&id)?),
            None => Ok(()),
        }
    }

    pub(crate) fn open_template(&self, name: &str) -> Result<Template> {
        Ok(Template::open(&self.template_path(name)?)?)
    }

    fn template_path(&self, name: &str) -> Result<PathBuf> {
        check_template_name(name)?;
        Ok(self.store.path(name)?)
    }
}

/// Sends all of a template. An error is the last item of the stream.
pub(crate) fn send(template: &Template, sender: ChunkSender) {
    let mut sink = BufWriter::with_capacity(CHUNK, ChunkWriter(sender.clone()));
    if let Err(error) = clone_template::send(template, &mut sink) {
        let _ = sender.blocking_send(Err(io::Error::other(error.message)));
    }
}

fn facts(template: &Template) -> TemplateFacts {
    let content = template.content();
    let disks = content.shape.disks.iter().filter(|it| !it.read_only);
    TemplateFacts {
        id: template.manifest().id.clone(),
        parent: content.parent.clone(),
        memory_bytes: content.memory.bytes,
        data_bytes: content.memory.layers.iter().map(|it| it.data_bytes).sum(),
        vcpus: content.shape.vcpus,
        disk_bytes: Some(disks.fold(0, |sum: u64, it| sum.saturating_add(it.bytes.0))),
        taken_ms: content.created_unix_ms,
        cpu: Some(cpu_features(content.cpu.clone())),
    }
}
