//! The greatest epoch of the host that this node has seen, in a file beside the journal of its VMs.
//!
//! It survives the node's process, so that a controller that was replaced while the node was away is
//! refused, too. See [`army_node_api::Fence`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use army_node_api::cluster::authority::write_private;
use army_node_api::{Error, ErrorKind, Fence, Result};

/// The file, in the journal's folder. The journal leaves files with such a name alone.
const FILE: &str = "epoch";

/// A fence whose epoch is kept in a file.
pub(crate) struct FenceFile {
    path: PathBuf,
    fence: Fence,
}

impl FenceFile {
    /// Reads the file in `folder`, where there is one.
    ///
    /// # Errors
    /// Where there is a file that cannot be read: without it, the node would obey controllers that
    /// were replaced.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let highest = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|_| {
                let message = format!("{} is not a number", path.display());
                Error::new(ErrorKind::Internal, message)
                    .advise("remove the file, when only one controller of the cluster runs")
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => {
                return Err(Error::internal(&format!("read {}", path.display()), &error));
            }
        };
        Ok(Self {
            path,
            fence: Fence::new(highest),
        })
    }

    /// Admits a call of the host's `epoch`, which is recorded where it is greater than all before.
    ///
    /// # Errors
    /// [`ErrorKind::StaleEpoch`] where a greater epoch was seen.
    pub(crate) fn admit(&self, epoch: u64) -> Result<()> {
        let record = |epoch: u64| write_private(&self.path, &epoch.to_string());
        self.fence.admit(epoch, record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_remembered_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || FenceFile::open(folder.path()).unwrap();
        open().admit(0).unwrap();
        open().admit(7).unwrap();
        open().admit(7).unwrap();
        let error = open().admit(6).unwrap_err();
        assert_eq!(error.kind, ErrorKind::StaleEpoch);
        // The journal is not disturbed by the file, nor by one whose write was interrupted.
        fs::write(folder.path().join("epoch.new"), "8").unwrap();
        crate::journal::Journal::open(folder.path().to_owned()).unwrap();
        open().admit(7).unwrap();
        fs::write(folder.path().join(FILE), "x").unwrap();
        assert!(FenceFile::open(folder.path()).is_err());
    }
}
