//! A state that is being written.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;

use clone_api::ApiError;
use clone_api::config::NetMode;
use clone_start::error::{Result, failed};
use clone_template::Template;

use super::record::Record;
use super::{SuspendedVms, UNFINISHED};
use crate::locked_dir::LockedDir;

/// A state in a locked directory with a hidden name, which is removed unless it is finished.
pub(crate) struct NewState<'a> {
    vms: &'a SuspendedVms,
    dir: LockedDir,
    name: String,
}

impl<'a> NewState<'a> {
    /// Makes the directory for a state of the VM `vm`.
    pub(crate) fn begin(vms: &'a SuspendedVms, vm: &str) -> Result<Self> {
        let _root = vms.lock()?;
        let random = clone_base::random::hex::<4>();
        let random = random.map_err(|error| ApiError::internal(&error))?;
        let name = format!("{vm}.{random}");
        let dir = LockedDir::make(vms.root.join(format!("{UNFINISHED}{name}")))?;
        Ok(Self { vms, dir, name })
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes a new file in the directory.
    pub(crate) fn new_file(&self, name: &str) -> Result<File> {
        self.dir.new_file(name)
    }

    /// Removes a file that has no content.
    pub(crate) fn drop_file(&self, name: &str) -> Result<()> {
        let path = self.dir().join(name);
        fs::remove_file(&path).map_err(failed("remove", &path))
    }

    /// Gives the state, whose files are synced, its name. From then on it is the VM's, instead of
    /// former states that were not run: those of suspensions that were interrupted after this.
    pub(crate) fn finish(self, record: &Record, template: Option<&Template>) -> Result<()> {
        let vms = self.vms;
        record.write(self.dir())?;
        let whole = vms.root.join(&self.name);
        for address in nat_addresses(record) {
            let reserved = vms.reserved();
            reserved
                .reserve(address, &whole)
                .map_err(failed("keep the address in", &vms.root))?;
        }
        if let Some(template) = template {
            template.hold_for(&whole)?;
        }
        let _root = vms.lock()?;
        fs::rename(self.dir(), &whole).map_err(failed("name", &whole))?;
        let root = File::open(&vms.root).and_then(|root| root.sync_all());
        root.map_err(failed("write to", &vms.root))?;
        for dir in vms.dirs_of(&record.config.name)? {
            if dir != whole && !super::has_run(&dir) {
                vms.remove_dir(&dir)?;
            }
        }
        Ok(())
    }
}

impl Drop for NewState<'_> {
    fn drop(&mut self) {
        // After a success there is nothing of that name any more.
        let _ = fs::remove_dir_all(self.dir());
    }
}

/// The addresses that the VM has behind NAT.
fn nat_addresses(record: &Record) -> impl Iterator<Item = Ipv4Addr> {
    let interfaces = record.config.net.iter().zip(&record.network);
    let behind_nat = interfaces.filter(|(net, _)| net.mode == NetMode::Nat);
    behind_nat.filter_map(|(_, guest)| Some(guest.address.as_ref()?.address))
}
