//! The cache directory, for files that can be made again.

use std::path::PathBuf;

/// The directory for `kind`: in `$CLONE_CACHE_DIR`, else in `/var/cache/clone` for root and in
/// `$XDG_CACHE_HOME/clone` or `~/.cache/clone` for others. `None` without a home.
pub fn dir(kind: &str) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = if let Some(dir) = set("CLONE_CACHE_DIR") {
        PathBuf::from(dir)
    } else if rustix::process::geteuid().is_root() {
        "/var/cache/clone".into()
    } else if let Some(base) = set("XDG_CACHE_HOME") {
        PathBuf::from(base).join("clone")
    } else {
        PathBuf::from(set("HOME")?).join(".cache/clone")
    };
    Some(base.join(kind))
}
