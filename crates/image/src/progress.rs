//! Progress reports of long work to its caller. This module prints nothing; the command draws bars
//! from these calls.

/// A step of long work. Its [`Display`](std::fmt::Display) is a short text for a progress bar.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Downloading a blob.
    Fetch {
        /// Its digest.
        digest: String,
    },
    /// Running mmdebstrap; its output arrives as bytes.
    Debootstrap {
        /// The suite that is installed.
        suite: String,
    },
    /// Reading a directory of the host.
    Scan,
    /// Merging a layer.
    Layer {
        /// The layer's number, counted from 1.
        number: usize,
        /// The number of layers.
        of: usize,
    },
    /// Writing the disk image.
    Write,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fetch { digest } => {
                let short = digest.split(':').next_back().unwrap_or_default();
                write!(f, "fetching {}", short.get(..12).unwrap_or(short))
            }
            Self::Debootstrap { suite } => write!(f, "installing Debian {suite}"),
            Self::Scan => write!(f, "reading the directory"),
            Self::Layer { number, of } => write!(f, "merging layer {number} of {of}"),
            Self::Write => write!(f, "writing the disk"),
        }
    }
}

/// Receives progress. Every method may be called often and from the building thread only.
pub trait Progress {
    /// Starts a step, which ends the previous one; `bytes` is its size, if known.
    fn begin(&self, step: Step, bytes: Option<u64>);
    /// Reports this number of further bytes of the step as done.
    fn advance(&self, bytes: u64);
}

/// Ignores all progress.
impl Progress for () {
    fn begin(&self, _: Step, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
}
