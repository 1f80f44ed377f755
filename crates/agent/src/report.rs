//! Collects the parts of a new identity that could not be applied, as sentences for people.

use std::io;
use std::path::Path;

use crate::conversation::Refusal;
use crate::replace::{Replaced, replace};

/// The notices.
#[derive(Default)]
pub(crate) struct Report {
    notices: Vec<String>,
    /// Files that another stands in for, and why the first of them could not be written.
    covered: Vec<String>,
    reason: Option<io::Error>,
}

impl Report {
    pub(crate) fn add(&mut self, notice: impl Into<String>) {
        self.notices.push(notice.into());
    }

    /// Records the result of an optional step.
    pub(crate) fn take(&mut self, step: Result<(), Refusal>) {
        if let Err(refusal) = step {
            self.add(refusal.message);
        }
    }

    /// Records the result of replacing a file.
    pub(crate) fn replaced(&mut self, path: &Path, how: Replaced) {
        if let Replaced::Covered(reason) = how {
            self.covered.push(path.display().to_string());
            self.reason.get_or_insert(reason);
        }
    }

    /// Replaces a file as an optional step.
    pub(crate) fn replace(&mut self, path: &str, bytes: &[u8]) {
        match replace(Path::new(path), bytes, 0o644) {
            Ok(how) => self.replaced(Path::new(path), how),
            Err(error) => self.add(format!("cannot write {path}: {error}")),
        }
    }

    pub(crate) fn into_notices(mut self) -> Vec<String> {
        if let Some(reason) = self.reason {
            let files = self.covered.join(", ");
            self.notices.push(format!(
                "cannot write {files}: {reason}; files in memory stand in for them until the next boot"
            ));
        }
        self.notices
    }
}
