//! The crate's one error type: every variant says what was tried on what, and what to do about it where that is known.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong while a kernel, an initramfs or a root file system is made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The host refused an operation on a file.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried, as a verb: "open", "create the cache directory".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A kernel file that is truncated, hostile, or of a kind that cannot be booted.
    #[error("{path} is not a kernel that can be booted: {reason}", path = path.display())]
    Kernel {
        /// The kernel's path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An archive, layer or manifest that is malformed or hostile.
    #[error("{what} is malformed: {reason}")]
    Malformed {
        /// Which part of the input.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Content that is not what its digest promises.
    #[error(
        "{what} has digest {found} where {expected} was promised: the image is damaged or was tampered with; fetch it again"
    )]
    Digest {
        /// Which blob or layer.
        what: String,
        /// The digest the manifest names.
        expected: String,
        /// The digest of what was read.
        found: String,
    },
    /// A limit of this build was exceeded.
    #[error("{what} exceeds the limit of {limit}: {advice}")]
    Limit {
        /// What grew too large.
        what: String,
        /// The limit with its unit.
        limit: String,
        /// What the user can do.
        advice: &'static str,
    },
    /// The request itself cannot be carried out.
    #[error("{what}: {advice}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        advice: String,
    },
    /// A registry could not be reached, refused, or broke off.
    #[error("cannot fetch {what}: {detail}; {advice}")]
    Registry {
        /// What was fetched.
        what: String,
        /// What happened.
        detail: String,
        /// What the user can do.
        advice: &'static str,
    },
    /// A program the build needs failed.
    #[error("{program} failed ({status}): {detail}")]
    Program {
        /// Its name.
        program: &'static str,
        /// How it ended.
        status: String,
        /// The last lines it wrote, or advice.
        detail: String,
    },
}

impl ImageError {
    /// Wraps an I/O error: `.map_err(ImageError::io("open", path))`.
    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// A malformed part of the input.
    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed {
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}

/// Shorthand of this crate.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;
