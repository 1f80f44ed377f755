//! The directory for disk layers whose writes end with their VM.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::cache;

/// The variable that names the directory, for hosts whose `/var/tmp` is in memory.
pub(crate) const VARIABLE: &str = "CLONE_SCRATCH_DIR";
/// The default directory, which most hosts keep on disk and none empties while it runs.
const DEFAULT: &str = "/var/tmp";

/// The directory that the host's owner names, otherwise the first one on a disk. `None` if all are
/// in memory; then layers are kept in memory too, within a limit ([`clone_disk::MEMORY_ROOM`]).
pub(crate) fn dir() -> Option<PathBuf> {
    let named = std::env::var_os(VARIABLE).filter(|name| !name.is_empty());
    match named {
        Some(named) => Some(named.into()).filter(|dir: &PathBuf| takes_layers(dir)),
        None => on_disk(DEFAULT.into()).or_else(|| {
            let cache = cache::dir("layers")?;
            std::fs::create_dir_all(&cache).ok()?;
            on_disk(cache)
        }),
    }
}

/// Returns `dir` if it takes layers and is not in memory.
fn on_disk(dir: PathBuf) -> Option<PathBuf> {
    let opened = File::open(&dir).and_then(|dir| clone_disk::is_in_memory(&dir));
    let on_disk = opened.is_ok_and(|in_memory| !in_memory);
    (on_disk && takes_layers(&dir)).then_some(dir)
}

/// Whether files without a name can be made there.
fn takes_layers(dir: &Path) -> bool {
    clone_disk::ephemeral(Some(dir)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_memory_is_passed_over() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let opened = File::open(disk.path()).unwrap();
        if clone_disk::is_in_memory(&opened).unwrap() {
            // The sources themselves lie in memory: there is no disk to find.
            return;
        }
        assert_eq!(on_disk(disk.path().into()).as_deref(), Some(disk.path()));
        assert_eq!(on_disk("/dev/shm".into()), None);
        assert_eq!(on_disk("/nowhere".into()), None);
    }
}
