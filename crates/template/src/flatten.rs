//! Merges the layers of a template at the end of a long chain.

use std::path::Path;

use clone_api::ApiError;
use clone_start::error::Result;

use super::{NewTemplate, Parts, Template};
use crate::Verified;

/// Makes a template at `target` with the content of `template` in one memory layer and plain disks.
/// `done` is called after each step with its part of [`bytes_to_flatten`].
pub fn flatten(
    verified: &Verified,
    template: &Template,
    target: &Path,
    mut done: impl FnMut(u64),
) -> Result<Template> {
    template.ensure_verified(verified)?;
    let internal = |error: clone_memory::LayerError| ApiError::internal(&error);
    let mut new = NewTemplate::begin(target)?;
    let file = new.memory_file()?;
    template
        .memory()?
        .flatten(0, file, "memory")
        .map_err(internal)?;
    done(memory_bytes(template));
    new.share_state(template)?;
    new.share_kernel(template)?;
    for (index, disk) in template.content().disks.iter().enumerate() {
        let mut opened = template.open_disk(index)?;
        let image = new.disk_file()?;
        let written = opened.write_raw(&image);
        written.map_err(|error| {
            ApiError::internal(&error)
                .advise(format!("disk {index} could not be written: make room"))
        })?;
        done(disk.base.bytes);
    }
    new.commit(Parts::same_as(template.content()), Some(verified))
}

/// The number of bytes that [`flatten`] reads.
pub fn bytes_to_flatten(template: &Template) -> u64 {
    let disks = template.content().disks.iter();
    memory_bytes(template) + disks.map(|disk| disk.base.bytes).sum::<u64>()
}

fn memory_bytes(template: &Template) -> u64 {
    let layers = template.content().memory.layers.iter();
    layers.map(|layer| layer.data_bytes).sum()
}
