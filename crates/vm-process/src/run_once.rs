//! The mark that a saved VM runs only once.
//!
//! A saved state has a file that is empty until a guest runs from it. The process of the VM, and
//! nobody else, writes to it before the guest's first instruction, so there is no moment at which
//! the guest has run and the file does not say so: neither when the launcher is killed, nor when
//! the process is, nor (the mark is synced) when the host loses power.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use clone_api::{ApiError, ErrorCode};
use clone_start::document::RAN;
use clone_start::error::Result;

/// The file of a saved state, open.
#[derive(Debug)]
pub(super) struct RunOnce {
    file: File,
}

impl RunOnce {
    /// Takes the open `file`.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] if a guest has run from this state.
    pub(super) fn new(file: File) -> Result<Self> {
        let meta = file
            .metadata()
            .map_err(|error| ApiError::internal(&error))?;
        match meta.len() {
            0 => Ok(Self { file }),
            _ => Err(ApiError::new(
                ErrorCode::Conflict,
                "the VM has run since this state was saved",
            )),
        }
    }

    /// Marks the state, durably. The guest may run as soon as this returns, and not before.
    ///
    /// # Errors
    /// The host's; then the guest must not run.
    pub(super) fn mark(&self) -> io::Result<()> {
        self.file.write_all_at(RAN, 0)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_from_which_a_guest_has_run_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let open = || RunOnce::new(file.try_clone().unwrap());
        open().unwrap();
        open().unwrap().mark().unwrap();
        assert_eq!(open().unwrap_err().code, ErrorCode::Conflict);
    }
}
