//! Built things that are kept: a folder each, with a key over what went into it.
//!
//! A folder appears whole or not at all (built under a temporary name, renamed), and is built by
//! one process at a time (a lock file), however many ask for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

const KEY_FILE: &str = "key";

/// Returns the folder of asset `name`, built by `build` unless it is there with the same `key`.
///
/// `key` is everything that should cause a rebuild when it changes. `build` gets an empty folder.
pub(crate) fn ensure(
    name: &str,
    key: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let assets = crate::paths::assets();
    fs::create_dir_all(&assets).with_context(|| format!("cannot make {}", assets.display()))?;
    let lock = File::create(assets.join(format!("{name}.lock")))?;
    flock(&lock, FlockOperation::LockExclusive).context("cannot lock an asset")?;
    let folder = assets.join(name);
    if fs::read_to_string(folder.join(KEY_FILE)).is_ok_and(|present| present == key) {
        return Ok(folder);
    }
    let fresh = assets.join(format!("{name}.new"));
    remove(&fresh)?;
    fs::create_dir_all(&fresh)?;
    build(&fresh).with_context(|| format!("cannot build the asset {name}"))?;
    fs::write(fresh.join(KEY_FILE), key)?;
    remove(&folder)?;
    fs::rename(&fresh, &folder)?;
    Ok(folder)
}

/// Forgets an asset, so that it is built again.
pub(crate) fn forget(name: &str) -> Result<()> {
    remove(&crate::paths::assets().join(name))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
