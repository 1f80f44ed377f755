//! Kernels, initramfs archives and root file systems for guests.
//!
//! - [`kernel`]: recognises kernels, extracts `vmlinux` from bzImages, caches it.
//! - [`build_rootfs`]: turns a directory or a container image into a bootable ext4 disk: [`source`](Source) → one
//!   tree in memory → the guest's agent and identity added → the disk written.
//! - [`build_initramfs`]: packs busybox, the agent and kernel modules as an initramfs.
//!
//! This crate knows nothing of KVM or of running guests: paths go in, files come out. It prints nothing; long work
//! reports through callbacks and `tracing` spans.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod decompress;
mod error;
mod ext4;
mod guest;
mod initramfs;
pub mod kernel;
mod progress;
mod rootfs;
mod source;
mod staging;
mod tree;

pub use error::{ImageError, Result};
pub use ext4::DiskSize;
pub use guest::{AGENT_PATH, FoundInit, IMAGE_DESCRIPTION_PATH, ImageDescription, Init};
pub use initramfs::{
    InitramfsInit, InitramfsReport, InitramfsSpec, USUAL_MODULES, build_initramfs,
};
pub use progress::{Progress, Step};
pub use rootfs::{RootfsReport, RootfsSpec, Source, build_rootfs};
#[cfg(feature = "pull")]
pub use source::{Credentials, RegistryImage};
pub use source::{Debian, ImageConfig, Ownership};
pub use tree::Limits;
