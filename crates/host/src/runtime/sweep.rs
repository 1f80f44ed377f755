//! Removes the resources that a VM left on the host after its process ended.

use std::fs;

use clone_api::ApiError;
use clone_start::cgroup;
use clone_start::error::{Result, failed};

use super::{Runtime, Status, VmDir, standby};
use crate::host_net::{self, HostNet};
use crate::suspended::SuspendedVms;

impl Runtime {
    /// Removes every stale directory and its host resources; returns the names of the VMs.
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

    /// Removes standbys whose process has ended, and directories that no live fork shares any more.
    fn sweep_hidden(&self) -> Result<()> {
        for dir in self.hidden_dirs(standby::PREFIX)? {
            let _root = self.lock()?;
            if dir.status()? == Status::Stale {
                remove(&dir)?;
            }
        }
        self.sweep_live()?;
        match &self.suspended {
            Some(dir) => SuspendedVms::at(dir.clone()).sweep(),
            None => Ok(()),
        }
    }

    /// Removes `dir` and its host resources if it is stale; returns whether it was.
    pub fn sweep_one(&self, dir: &VmDir) -> Result<bool> {
        let root = self.lock()?;
        // Before this command had the lock, another one may have swept the directory, and a new VM
        // may have taken its name.
        if dir.status()? != Status::Stale {
            return Ok(false);
        }
        remove(dir)?;
        drop(root);
        self.sweep_hidden()?;
        Ok(true)
    }
}

/// Whether the VM may have resources on the host's network. Removing a VM without interfaces needs
/// no network privileges.
fn may_have_network(dir: &VmDir) -> bool {
    match dir.config() {
        Ok(config) => !config.net.is_empty(),
        // The launcher ended before it set up the network.
        Err(_) => false,
    }
}

/// Removes the host resources first: as long as the directory exists, a removal that failed is
/// tried again.
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
    /// Abandons the start, and removes everything that was made for it. The VM's process must have
    /// ended.
    pub fn abandon(self, runtime: &Runtime) -> Result<()> {
        let _root = runtime.lock()?;
        remove(&self.dir)
    }
}
