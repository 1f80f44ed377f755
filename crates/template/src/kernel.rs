//! Kernels that templates have in common.
//!
//! A kernel is tens of megabytes, and most templates of a host boot the same. A new template takes
//! the file of a template beside it that has the same content, by a hard link: however many there
//! are, they hold one copy, which goes with the last of them.

use std::fs;
use std::io;

use clone_start::error::{Result, failed};
use serde::Deserialize;

use super::content::HashedFile;
use super::folder::Folder;
use super::names::is_file_of_a_template;
use super::{open_manifest, read_manifest, verify};

/// As much of a manifest as is needed here.
#[derive(Deserialize)]
struct Boots {
    kernel: Option<HashedFile>,
    initrd: Option<HashedFile>,
}

/// Replaces `ours`, a file of the new template in `folder`, by the same file of a template in
/// `parent`, where there is one that it can be linked to.
pub(super) fn share(parent: &Folder, folder: &Folder, ours: &HashedFile) -> Result<()> {
    let list = |error| failed("list", parent.path())(error);
    for entry in fs::read_dir(parent.path()).map_err(list)? {
        let name = entry.map_err(list)?.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // What cannot be used is no loss: the new template has a file of its own.
        let Ok(other) = Folder::open(&parent.path().join(name)) else {
            continue;
        };
        if link(&other, folder, ours).is_ok_and(|linked| linked) {
            return Ok(());
        }
    }
    Ok(())
}

/// Takes the file of `other` that has the content of `ours`; whether there is one.
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
    // Its manifest is only a hint: the other template need not have been verified.
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
