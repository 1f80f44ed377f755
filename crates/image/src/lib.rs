//! Kernels, initramfs archives and root file systems for guests.
//!
//! - [`kernel`]: recognises kernels, extracts `vmlinux` from bzImages, caches it.
//!
//! This crate knows nothing of KVM or of running guests: paths go in, files come out. It prints nothing; long work
//! reports through callbacks and `tracing` spans.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod decompress;
mod error;
pub mod kernel;

pub use error::{ImageError, Result};
