//! Where layers for writes are kept that end with their VM.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::cache;

/// Names the directory, for hosts whose `/var/tmp` is in memory.
pub(crate) const VARIABLE: &str = "CLONE_SCRATCH_DIR";
/// Kept on a disk by most hosts, and emptied by none at work.
const DEFAULT: &str = "/var/tmp";

/// The directory that the host's owner names, else the first on a disk. `None` where all are in
/// memory: then layers are as well, within a limit ([`clone_disk::MEMORY_ROOM`]).
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

/// `dir`, if it takes layers and is not in memory.
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
