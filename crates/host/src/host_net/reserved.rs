//! Addresses behind NAT that are kept for guests that do not run at the moment.
//!
//! A reservation is a file with the address as its name. It names a directory of its holder, and
//! counts as long as that directory exists.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The reserved addresses.
#[derive(Debug, Clone)]
pub struct Reserved {
    dir: PathBuf,
}

impl Reserved {
    /// The reservations in `dir`, which need not exist.
    pub fn in_dir(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Whether the address is kept for a guest.
    pub(super) fn contains(&self, address: Ipv4Addr) -> bool {
        holder(&self.path(address)).is_some_and(|holder| holder.exists())
    }

    /// Reserves an address for the holder of a directory, instead of for any former holder.
    ///
    /// # Errors
    /// The host's.
    pub fn reserve(&self, address: Ipv4Addr, holder: &Path) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        clone_base::file::replace(&self.path(address), 0o600, holder.as_os_str().as_bytes())
    }

    /// Removes the reservations of a holder. What cannot be removed does not count any more once the
    /// holder's directory is gone.
    pub fn release(&self, held: &Path) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if holder(&path).is_some_and(|holder| holder == held)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "a reservation stays recorded");
            }
        }
    }

    fn path(&self, address: Ipv4Addr) -> PathBuf {
        self.dir.join(address.to_string())
    }
}

fn holder(path: &Path) -> Option<PathBuf> {
    let name = fs::read(path).ok().filter(|name| !name.is_empty())?;
    Some(PathBuf::from(OsString::from_vec(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_reserved_as_long_as_its_holder_exists() {
        let root = tempfile::tempdir().unwrap();
        let reserved = Reserved::in_dir(root.path().join("addresses"));
        let (a, b) = ([10, 213, 0, 2].into(), [10, 213, 0, 3].into());
        assert!(!reserved.contains(a));
        let holder = |name: &str| {
            let dir = root.path().join(name);
            fs::create_dir(&dir).unwrap();
            dir
        };
        let (first, second) = (holder("first"), holder("second"));
        reserved.reserve(a, &first).unwrap();
        reserved.reserve(b, &first).unwrap();
        assert!(reserved.contains(a) && reserved.contains(b));
        // Another state of the same VM has the address now, and the former one gives up the rest.
        reserved.reserve(b, &second).unwrap();
        reserved.release(&first);
        assert!(!reserved.contains(a) && reserved.contains(b));
        fs::remove_dir(&second).unwrap();
        assert!(!reserved.contains(b));
    }
}
