//! Suspended VMs: their processes have ended, and their state is kept on disk, so that they go on
//! later as the same VMs.
//!
//! `/var/lib/clone/suspended/NAME.RANDOM/` holds
//! - `suspended.json`: what the VM is ([`Record`]);
//! - `memory`: a layer with the pages that differ from the template's, or all of them;
//! - `state`: the machine's state;
//! - `disk-N`: what was written to the ephemeral disk N above the template's layers;
//! - `ran`: empty until the guest runs again ([`clone_start::document::ForkSpec::run_once`]);
//! - `lock`: locked while a VM that was resumed from here runs, since it uses these files.
//!
//! A directory is written under a hidden name and renamed when it is whole and synced. It is *valid*
//! as long as `ran` is empty. The VM's process marks it before the guest runs, so a VM never runs
//! twice, whichever program is killed when. A directory that is marked and not locked is removed by
//! the next command, as is a hidden one that nobody locks.
//!
//! The addresses of suspended VMs behind NAT are reserved by files in `.addresses`.

mod new_state;
mod record;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use clone_api::{ApiError, ErrorCode};
use clone_start::error::{Result, failed};

pub(crate) use new_state::NewState;
pub use record::Record;
pub(crate) use record::{Base, disk_file, own_file};

use crate::host_net::Reserved;
pub(crate) use crate::locked_dir::LOCK;
use crate::locked_dir::{is_unused, lock_in};

/// The prefix of directories that are not whole.
const UNFINISHED: &str = ".new-";
/// The directory of the addresses that are reserved.
const ADDRESSES: &str = ".addresses";
/// The name of the file that is marked when the guest runs.
pub(crate) const RAN: &str = "ran";
/// The name of the memory layer.
pub(crate) const MEMORY: &str = "memory";
/// The name of the file with the machine's state.
pub(crate) const STATE: &str = "state";

/// The directory of all suspended VMs of a user.
#[derive(Debug, Clone)]
pub struct SuspendedVms {
    root: PathBuf,
}

/// A suspended VM that can be resumed.
#[derive(Debug, Clone)]
pub struct SuspendedVm {
    dir: PathBuf,
    /// What the VM is.
    pub record: Record,
}

impl SuspendedVm {
    /// The directory with the VM's state.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl SuspendedVms {
    /// The suspended VMs whose directories are in `root`, which need not exist.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The addresses that are kept for the VMs.
    pub fn reserved(&self) -> Reserved {
        Reserved::in_dir(self.root.join(ADDRESSES))
    }

    /// All VMs that can be resumed, ordered by name. One whose record cannot be read is left out, with
    /// a line in the log.
    ///
    /// # Errors
    /// The directories cannot be listed.
    pub fn list(&self) -> Result<Vec<SuspendedVm>> {
        let mut found = Vec::new();
        for dir in self.dirs()? {
            if has_run(&dir) {
                continue;
            }
            match Record::read(&dir) {
                Ok(record) => found.push(SuspendedVm { dir, record }),
                Err(error) => tracing::warn!("{}", error.message),
            }
        }
        found.sort_by(|a: &SuspendedVm, b| {
            let key =
                |vm: &SuspendedVm| (vm.record.config.name.clone(), vm.record.suspended_unix_ms);
            key(a).cmp(&key(b))
        });
        Ok(found)
    }

    /// The VM `name`, if it is suspended. Where a suspension was interrupted and repeated, there are
    /// two equal states, and the later one counts.
    ///
    /// # Errors
    /// The directories cannot be listed, or the record of this VM cannot be read.
    pub fn find(&self, name: &str) -> Result<Option<SuspendedVm>> {
        let mut latest: Option<SuspendedVm> = None;
        for dir in self.dirs_of(name)? {
            if has_run(&dir) {
                continue;
            }
            let record = Record::read(&dir)?;
            let is_later =
                |other: &SuspendedVm| other.record.suspended_unix_ms <= record.suspended_unix_ms;
            if record.config.name == name && latest.as_ref().is_none_or(is_later) {
                latest = Some(SuspendedVm { dir, record });
            }
        }
        Ok(latest)
    }

    /// Refuses a name that a suspended VM has.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`].
    pub fn check_free(&self, name: &str) -> Result<()> {
        // A name is taken as long as it can be resumed, even if its record is damaged.
        let taken = self.dirs_of(name)?.iter().any(|dir| !has_run(dir));
        if !taken {
            return Ok(());
        }
        let message = format!("the VM `{name}` is suspended");
        Err(ApiError::new(ErrorCode::Conflict, message).advise(format!(
            "resume it with `clone resume {name}`, or remove it with `clone rm {name}`"
        )))
    }

    /// Removes a suspended VM, whose state is lost.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`] if no VM of that name is suspended.
    pub fn remove(&self, name: &str) -> Result<()> {
        if self.dirs_of(name)?.is_empty() {
            return Err(not_suspended(name));
        }
        let _root = self.lock()?;
        let mut removed = false;
        for dir in self.dirs_of(name)? {
            // One that has run is in use, and is swept when its VM has ended.
            if !has_run(&dir) {
                self.remove_dir(&dir)?;
                removed = true;
            }
        }
        match removed {
            true => Ok(()),
            false => Err(not_suspended(name)),
        }
    }

    /// Removes what nobody needs any more: states from which a VM ran that has ended, and what
    /// suspensions left that were interrupted.
    ///
    /// # Errors
    /// A directory cannot be listed or removed.
    pub fn sweep(&self) -> Result<()> {
        if !self.root.exists() {
            return Ok(());
        }
        let _root = self.lock()?;
        for dir in self.all_dirs()? {
            let unfinished = name_of(&dir).starts_with(UNFINISHED);
            if (unfinished || has_run(&dir)) && is_unused(&dir) {
                self.remove_dir(&dir)?;
            }
        }
        Ok(())
    }

    /// Removes a directory. It is renamed first, so that what is left after a kill is no state.
    fn remove_dir(&self, dir: &Path) -> Result<()> {
        self.reserved().release(dir);
        let record = Record::read(dir).ok();
        if let Some(template) = record.as_ref().and_then(Record::template) {
            clone_template::release(template, dir);
        }
        let hidden = match name_of(dir).starts_with(UNFINISHED) {
            true => dir.to_owned(),
            false => {
                let hidden = self.root.join(format!("{UNFINISHED}{}", name_of(dir)));
                fs::rename(dir, &hidden).map_err(failed("remove", dir))?;
                hidden
            }
        };
        fs::remove_dir_all(&hidden).map_err(failed("remove", &hidden))
    }

    /// The whole directories.
    fn dirs(&self) -> Result<Vec<PathBuf>> {
        let mut dirs = self.all_dirs()?;
        dirs.retain(|dir| !name_of(dir).starts_with('.'));
        Ok(dirs)
    }

    /// The whole directories whose names begin with that of the VM.
    fn dirs_of(&self, name: &str) -> Result<Vec<PathBuf>> {
        let mut dirs = self.dirs()?;
        dirs.retain(|dir| name_of(dir).rsplit_once('.').is_some_and(|it| it.0 == name));
        Ok(dirs)
    }

    fn all_dirs(&self) -> Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", &self.root)(error)),
        };
        let mut dirs = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("list", &self.root))?;
            let is_dir = entry.file_type().is_ok_and(|it| it.is_dir());
            if is_dir && entry.file_name() != ADDRESSES {
                dirs.push(entry.path());
            }
        }
        Ok(dirs)
    }

    /// Takes the lock under which directories are made and removed.
    fn lock(&self) -> Result<File> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(failed("make", &self.root))?;
        lock_in(&self.root)
    }
}

fn name_of(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Whether a guest has run from this state. A state whose mark cannot be looked at is treated as
/// one: its guest must not run twice.
fn has_run(dir: &Path) -> bool {
    fs::metadata(dir.join(RAN)).map_or(true, |meta| meta.len() > 0)
}

fn not_suspended(name: &str) -> ApiError {
    let message = format!("there is no suspended VM `{name}`");
    ApiError::new(ErrorCode::NotFound, message).advise("`clone ls` lists all VMs")
}
