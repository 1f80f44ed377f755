//! Removing what a VM left on the host when its process is gone.

use std::fs;

use clone_api::ApiError;
use clone_start::cgroup;
use clone_start::error::{Result, failed};

use super::{Runtime, Status, VmDir, standby};
use crate::host_net::{self, HostNet};

impl Runtime {
    /// Removes every stale directory and what belongs to it; gives the names.
    pub fn sweep(&self) -> Result<Vec<String>> {
        let mut swept = Vec::new();
        for dir in self.dirs()? {
            if dir.status()? == Status::Stale && self.sweep_one(&dir)? {
                swept.push(dir.name());
            }
        }
        self.sweep_hidden()?;
        Ok(swept)
    }

    /// Removes standbys whose process is gone, and what no live fork shares any more.
    fn sweep_hidden(&self) -> Result<()> {
        for dir in self.hidden_dirs(standby::PREFIX)? {
            let _root = self.lock()?;
            if dir.status()? == Status::Stale {
                remove(&dir)?;
            }
        }
        self.sweep_live()
    }

    /// Removes `dir` and what belongs to it, if it is stale; whether it was.
    pub fn sweep_one(&self, dir: &VmDir) -> Result<bool> {
        let root = self.lock()?;
        // Another command may have swept it, and a new VM taken its name, before we had the lock.
        if dir.status()? != Status::Stale {
            return Ok(false);
        }
        remove(dir)?;
        drop(root);
        self.sweep_hidden()?;
        Ok(true)
    }
}

/// A VM without interfaces needs no rights on the host's network to be removed.
fn may_have_network(dir: &VmDir) -> bool {
    match dir.config() {
        Ok(config) => !config.net.is_empty(),
        // Cut short by a launcher's death, before it came to the network.
        Err(_) => false,
    }
}

/// Host resources first: while the directory is there, a failure is tried again.
fn remove(dir: &VmDir) -> Result<()> {
    cgroup::remove(&dir.birth_path()).map_err(failed("remove the jail of", dir.path()))?;
    if may_have_network(dir) {
        HostNet::new(host_net::DEFAULT_DIR)
            .detach(&dir.network_key())
            .map_err(|error| ApiError::internal(&error))?;
    }
    fs::remove_dir_all(dir.path()).map_err(failed("remove", dir.path()))
}

impl super::StartingVm {
    /// Gives up: removes everything again. The VM's process must be gone.
    pub fn abandon(self, runtime: &Runtime) -> Result<()> {
        let _root = runtime.lock()?;
        remove(&self.dir)
    }
}
