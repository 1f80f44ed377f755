//! The names of a template's files, and the error for a template that cannot be used.

use std::path::{Component, Path};

use clone_api::{ApiError, ErrorCode};

/// The manifest's name in its directory.
pub(crate) const MANIFEST: &str = "manifest.json";
/// The record of the pages that clones touch first.
pub(crate) const PREFETCH: &str = "prefetch";
pub(crate) const STATE: &str = "state";
pub(crate) const KERNEL: &str = "kernel";
pub(crate) const INITRD: &str = "initrd";

/// The prefix of files that name a directory which builds on the template.
pub(crate) const HELD: &str = "held-by-";

/// The name of the file that says that the directory `holder` builds on the template.
pub(crate) fn held_by(holder: &Path) -> String {
    let name = holder.file_name().unwrap_or_default();
    format!("{HELD}{}", name.to_string_lossy())
}

/// Whether a template can have a file with this name.
pub(crate) fn is_file_of_a_template(name: &str) -> bool {
    if name.starts_with(HELD) {
        return true;
    }
    let memory = name.starts_with("memory-") && name.ends_with(".layer");
    let disk = name.starts_with("disk-") && (name.ends_with(".raw") || name.contains(".layer-"));
    let others = [MANIFEST, STATE, KERNEL, INITRD, PREFETCH, "prefetch.new"];
    memory || disk || others.contains(&name)
}

/// Whether the name is that of an entry in a directory, and leads nowhere else.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let first = matches!(parts.next(), Some(Component::Normal(part)) if part == name);
    first && parts.next().is_none() && name != MANIFEST
}

/// The error for a template that cannot be used.
pub(crate) fn refused(path: &Path, reason: &str) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidConfig,
        format!("the template {} cannot be used: {reason}", path.display()),
    )
}
