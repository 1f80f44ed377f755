//! Makes a template of the present format from an old one.

use std::fs::File;
use std::path::Path;

use clone_start::error::{Result, failed};

use super::{NewTemplate, Parts, Template};
use crate::Verified;

/// Makes a template at `target` from `template`, with the kernel and the initial RAM disk that the
/// caller names for reboots of its guest. All other files are shared with `template`. The caller
/// has checked that the kernel can be booted.
pub fn upgrade(
    verified: &Verified,
    template: &Template,
    target: &Path,
    kernel: &Path,
    initrd: Option<&Path>,
) -> Result<Template> {
    template.ensure_verified(verified)?;
    let mut new = NewTemplate::begin(target)?;
    new.share_memory(template)?;
    new.share_state(template)?;
    for index in 0..template.content().disks.len() {
        new.share_disk(template, index, usize::MAX)?;
    }
    copy(kernel, &new.kernel_file()?)?;
    if let Some(initrd) = initrd {
        copy(initrd, &new.initrd_file()?)?;
    }
    new.commit(Parts::same_as(template.content()), Some(verified))
}

fn copy(from: &Path, to: &File) -> Result<()> {
    let file = File::open(from).map_err(failed("open", from))?;
    clone_disk::copy_file(&file, to).map_err(failed("copy", from))
}
