//! Checks that no other user can change a file or directory that is relied on.

use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// Write permission for the group or for others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The reason why another user could change a file or directory: it belongs neither to root nor to
/// the caller, or others may write to it.
pub(crate) fn distrust(meta: &Metadata) -> Option<String> {
    if meta.uid() != 0 && meta.uid() != caller() {
        let owner = meta.uid();
        return Some(format!(
            "it belongs to user {owner}, who can change it at any time"
        ));
    }
    let mode = meta.permissions().mode() & 0o7777;
    (mode & WRITABLE_BY_OTHERS != 0).then(|| format!("other users can write to it (mode {mode:o})"))
}

/// The user on whose behalf this process acts.
pub(crate) fn caller() -> u32 {
    rustix::process::geteuid().as_raw()
}
