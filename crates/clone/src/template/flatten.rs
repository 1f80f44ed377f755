//! Making one layer of many: for a template at the end of a long chain.

use std::fs;
use std::path::Path;

use clone_api::ApiError;
use clone_api::config::DiskFormat;
use clone_disk::{Disk, DiskSpec, EngineKind, Format, ImageSpec, Writes};

use super::{NewTemplate, Parts, Template};
use crate::error::{Result, failed};
use crate::runtime::Runtime;

/// Makes a template at `target` that is `template` with one memory layer and plain disks.
pub fn flatten(runtime: &Runtime, template: &Template, target: &Path) -> Result<Template> {
    template.ensure_verified(runtime)?;
    let internal = |error: clone_memory::LayerError| ApiError::internal(&error);
    let mut new = NewTemplate::begin(target)?;
    let file = new.memory_file()?;
    template
        .memory()?
        .flatten(0, file, "memory")
        .map_err(internal)?;
    let state = template.state_path();
    let bytes = fs::read(&state).map_err(failed("read", &state))?;
    std::io::Write::write_all(&mut new.state_file()?, &bytes).map_err(failed("copy", &state))?;
    for (index, disk) in template.disks().into_iter().enumerate() {
        let spec = DiskSpec {
            base: disk.base.map(|(path, format)| ImageSpec {
                path,
                format: match format {
                    DiskFormat::Raw => Format::Raw,
                    DiskFormat::Qcow2 => Format::Qcow2,
                },
            }),
            backing: Vec::new(),
            layers: disk.layers,
            writes: Writes::Refused,
        };
        let opened = spec
            .open()
            .and_then(|files| Disk::open(files, EngineKind::Blocking));
        let mut opened = opened.map_err(|error| ApiError::internal(&error))?;
        let image = new.disk_file()?;
        let written = opened.write_raw(&image);
        written.map_err(|error| {
            ApiError::internal(&error)
                .advise(format!("disk {index} could not be written: make room"))
        })?;
    }
    let content = template.content();
    new.commit(
        Parts {
            parent: None,
            agent_version: content.agent_version.clone(),
            config: content.config.clone(),
            cpu: content.cpu.clone(),
            created_unix_ms: content.created_unix_ms,
        },
        Some(runtime),
    )
}
