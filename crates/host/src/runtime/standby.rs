//! Standbys: clones that are started in advance and wait to be adopted.
//!
//! A standby is an ordinary VM in a hidden directory, whose guest has not run yet. A command adopts
//! it by renaming its directory, which only one of several commands can do, and by a call to its
//! process. No server takes part.

use std::fs;

use clone_api::{ApiError, ErrorCode};
use clone_start::error::{Result, failed};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{RunningVm, Runtime, Status, VmDir};

/// The prefix of the names of standbys' directories.
pub(super) const PREFIX: &str = ".standby-";

impl Runtime {
    /// Makes a name for a new standby of the template with this id.
    pub fn standby_name(template_id: &str) -> Result<String> {
        let random = clone_base::random::hex::<4>();
        let random = random.map_err(|error| ApiError::internal(&error))?;
        Ok(format!("{PREFIX}{}-{random}", short(template_id)))
    }

    /// The standbys of a template that are ready.
    pub fn standbys(&self, template_id: &str) -> Result<Vec<RunningVm>> {
        let prefix = format!("{PREFIX}{}-", short(template_id));
        let mut ready = Vec::new();
        for dir in self.hidden_dirs(&prefix)? {
            // The VM runs and the launcher has released its lock, so the standby was reported
            // ready.
            if let Status::Running(process) = dir.status()?
                && dir.is_reported()
            {
                ready.push(RunningVm { dir, process });
            }
        }
        Ok(ready)
    }

    /// Takes a standby of a template by renaming its directory to `name`; `None` if none is left.
    /// The caller must still call the standby's process, which may turn out to have died.
    ///
    /// Every warm fork begins here, so only the standby that is taken is examined, and the cost
    /// does not depend on the number of standbys.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] where the name is taken.
    pub fn claim(&self, template_id: &str, name: &str) -> Result<Option<RunningVm>> {
        let target = self.dir(name);
        let prefix = format!("{PREFIX}{}-", short(template_id));
        for standby in self.hidden_dirs(&prefix)? {
            // Reported ready.
            if !standby.is_reported() {
                continue;
            }
            let renamed = renameat_with(
                CWD,
                standby.path(),
                CWD,
                target.path(),
                RenameFlags::NOREPLACE,
            );
            match renamed {
                Ok(()) => {
                    let process = target.process()?;
                    return Ok(process.map(|process| RunningVm {
                        dir: target,
                        process,
                    }));
                }
                // Another command took this standby.
                Err(Errno::NOENT) => {}
                Err(Errno::EXIST) => return Err(name_taken(name)),
                Err(error) => return Err(failed("rename", standby.path())(error.into())),
            }
        }
        Ok(None)
    }

    /// The hidden directories whose names begin with `prefix`.
    pub(super) fn hidden_dirs(&self, prefix: &str) -> Result<Vec<VmDir>> {
        let list = |error| failed("list", &self.vms)(error);
        let mut dirs = Vec::new();
        for entry in fs::read_dir(&self.vms).map_err(list)? {
            let entry = entry.map_err(list)?;
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(prefix.as_bytes())
            {
                dirs.push(VmDir::at(entry.path()));
            }
        }
        Ok(dirs)
    }
}

/// The part of a template's id that is used in names.
fn short(template_id: &str) -> &str {
    template_id.get(..16).unwrap_or(template_id)
}

pub(super) fn name_taken(name: &str) -> ApiError {
    ApiError::new(
        ErrorCode::Conflict,
        format!("a VM called `{name}` exists already"),
    )
    .advise(format!(
        "use another --name, or end it first: clone rm --force {name}"
    ))
}
