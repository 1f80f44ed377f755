//! Shares kernels among templates.
//!
//! A kernel has tens of megabytes, and most templates of a host boot the same one. A new template
//! hard-links the kernel of another template in the same directory that has the same content, so
//! they all share one copy, which is freed with the last of them.

use std::fs;
use std::io;

use clone_start::error::{Result, failed};
use serde::Deserialize;

use super::content::HashedFile;
use super::folder::Folder;
use super::names::is_file_of_a_template;
use super::{open_manifest, read_manifest, verify};

/// The fields of a manifest that are needed here.
#[derive(Deserialize)]
struct Boots {
    kernel: Option<HashedFile>,
    initrd: Option<HashedFile>,
}

/// Replaces `ours`, a file of the new template in `folder`, by a link to the same file of a
/// template in `parent`, if there is one that can be linked.
pub(super) fn share(parent: &Folder, folder: &Folder, ours: &HashedFile) -> Result<()> {
    let list = |error| failed("list", parent.path())(error);
    for entry in fs::read_dir(parent.path()).map_err(list)? {
        let name = entry.map_err(list)?.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A template that cannot be opened is skipped, since the new one has a file of its own.
        let Ok(other) = Folder::open(&parent.path().join(name)) else {
            continue;
        };
        if link(&other, folder, ours).is_ok_and(|linked| linked) {
            return Ok(());
        }
    }
    Ok(())
}

/// Links the file of `other` that has the content of `ours`; returns whether there is one.
fn link(other: &Folder, folder: &Folder, ours: &HashedFile) -> Result<bool> {
    other.check_trusted()?;
    let text = read_manifest(&open_manifest(other)?, other.path())?;
    let Ok(boots) = serde_json::from_slice::<Boots>(&text) else {
        return Ok(false);
    };
    let mut files = boots.kernel.into_iter().chain(boots.initrd);
    let same = |it: &HashedFile| it.hash == ours.hash && it.bytes == ours.bytes;
    let Some(theirs) = files.find(|it| same(it) && is_file_of_a_template(&it.file)) else {
        return Ok(false);
    };
    let linked = link_same(other, folder, &theirs.file, ours);
    linked.map_err(failed("share a kernel of", other.path()))
}

fn link_same(other: &Folder, folder: &Folder, theirs: &str, ours: &HashedFile) -> io::Result<bool> {
    let file = other.open_file(theirs)?;
    // The other template need not have been verified, so its manifest is only a hint.
    if verify::hash_of(&file)? != ours.hash {
        return Ok(false);
    }
    let new = format!("{}.new", ours.file);
    if !folder.link(other, theirs, &file, &new)? {
        return Ok(false);
    }
    folder.rename(&new, &ours.file)?;
    Ok(true)
}
