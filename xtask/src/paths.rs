//! Where things are in the workspace.

use std::path::PathBuf;

/// The workspace's root.
pub(crate) fn workspace() -> PathBuf {
    // Cargo sets it when it runs us; the path that we were built at is for those who run us alone.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or(manifest.clone(), PathBuf::from)
}

/// Cargo's output.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Kernels, file systems and the like; may be a link to a folder shared by several work trees.
pub(crate) fn assets() -> PathBuf {
    target().join("assets")
}

/// State of this work tree's testbeds.
pub(crate) fn testbed_state() -> PathBuf {
    target().join("testbed")
}

/// What cargo built for development.
pub(crate) fn debug_binary(name: &str) -> PathBuf {
    target().join("debug").join(name)
}
