//! What can go wrong with a disk before or between requests.

use std::io;
use std::path::{Path, PathBuf};

use crate::remedy::Remedy;

/// An error in opening or changing a disk. Failed requests carry an `io::Error` instead.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file of a disk cannot be opened.
    #[error("cannot open disk file {path} {access}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// How it was to be opened, as in "for writing".
        access: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// Another process uses the file in a way that excludes this one.
    #[error("disk file {path} is in use by another machine ({access} refused)")]
    InUse {
        /// The file.
        path: PathBuf,
        /// How it was to be used.
        access: &'static str,
    },
    /// A part of a disk cannot be read, written or sized.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, as in "read the header of the layer".
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// An image is not what it should be, or uses what is not supported.
    #[error("{format} image refused: {reason}")]
    Image {
        /// The format, as in "qcow2".
        format: &'static str,
        /// Why it was refused.
        reason: String,
        /// What makes it usable.
        remedy: Remedy,
    },
    /// A file that cannot be a disk as it is, and what makes it one.
    #[error("{path}: {reason}; {advice}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why it was refused.
        reason: String,
        /// A command, or what to say instead.
        advice: String,
    },
    /// The parts of a disk do not fit each other, or the operation does not fit the disk.
    #[error("disk refused: {0}")]
    Mismatch(String),
}

/// Converts an I/O error to a [`DiskError::Io`] that names the failed action.
pub(crate) fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io { action, source }
}

impl DiskError {
    /// The same error about the image at `path`: one that names the command that helps.
    pub(crate) fn about(self, path: &Path) -> Self {
        match self {
            Self::Image {
                format,
                reason,
                remedy,
            } => Self::Unusable {
                path: path.to_owned(),
                reason: format!("{format} image refused: {reason}"),
                advice: remedy.advice(path),
            },
            other => other,
        }
    }
}
