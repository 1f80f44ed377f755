//! The `clone` command: its client side, and the process of a VM.
//!
//! - [`cli`]: one file per command; a client of the VMs' sockets.
//! - [`launch`]: starting VMs: from a kernel, from a template, from a running VM, ahead of need.
//! - [`snapshot`]: making a template of a running VM.
//! - [`process`]: what runs as a VM: opens resources, jails itself, assembles the machine, serves
//!   the control socket and the console.
//! - [`runtime`]: the directory of a VM while it runs, which is all that both sides share.
//! - [`shared_file`]: files that VMs share, named by path and known by identity.
//! - [`template`]: what clones are forked from, on disk.
//! - [`host_net`]: taps, bridges and addresses on the host.
//! - [`jail`]: what a VM's process may still do.
//!
//! It is a library only so that tests and fuzz targets reach its parts.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cache;
pub mod cli;
pub mod cpu;
mod error;
pub mod file_sink;
pub mod host_net;
pub mod jail;
pub mod launch;
mod log;
pub mod process;
pub mod runtime;
mod scratch;
pub mod shared_file;
pub mod snapshot;
pub mod template;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod trust;

pub use error::{Result, failed};
