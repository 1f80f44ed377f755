//! Standbys: clones that are ready and wait to be given their name.
//!
//! A standby is a VM like any other in a hidden directory, whose guest has not run yet. To adopt
//! it is to rename its directory, which one alone of any number of commands can do, and to tell
//! its process. No server stands between.

use std::fs;
use std::io;

use clone_api::{ApiError, ErrorCode};
use clone_start::error::{Result, failed};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{RunningVm, Runtime, Status, VmDir};

/// What the names of their directories begin with.
pub(super) const PREFIX: &str = ".standby-";

impl Runtime {
    /// A name for a new standby of the template of this id.
    pub fn standby_name(template_id: &str) -> Result<String> {
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| ApiError::internal(&io::Error::from(error)))?;
        Ok(format!(
            "{PREFIX}{}-{:08x}",
            short(template_id),
            u32::from_le_bytes(random)
        ))
    }

    /// The standbys of a template that are ready.
    pub fn standbys(&self, template_id: &str) -> Result<Vec<RunningVm>> {
        let prefix = format!("{PREFIX}{}-", short(template_id));
        let mut ready = Vec::new();
        for dir in self.hidden_dirs(&prefix)? {
            // Reported ready, which the launcher's lock ends.
            if let Status::Running(process) = dir.status()?
                && dir.is_reported()
            {
                ready.push(RunningVm { dir, process });
            }
        }
        Ok(ready)
    }

    /// Takes a standby of a template and gives its directory the name; `None` where there is none
    /// left. Its process is still to be told, and may turn out to be dead.
    ///
    /// This is the beginning of every warm fork, so nothing is asked of the standbys but of the one
    /// that is taken, and however many there are costs nothing.
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
                // Somebody else was first.
                Err(Errno::NOENT) => {}
                Err(Errno::EXIST) => return Err(name_taken(name)),
                Err(error) => return Err(failed("rename", standby.path())(error.into())),
            }
        }
        Ok(None)
    }

    /// The hidden directories whose names begin so.
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

/// As much of a template's id as names need.
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
