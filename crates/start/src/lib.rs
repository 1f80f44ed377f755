//! The contract between a launcher and a VM's process, and the state of a VM on its host that both
//! use.
//!
//! - [`invocation`]: the arguments and exit codes of the program `clone-vm`.
//! - [`document`]: what the launcher sends it; [`shared_file`]: files in that, with their identity.
//! - [`report`]: what it answers.
//! - [`vm_dir`]: a VM's runtime directory; [`process`]: a process that cannot be mistaken for
//!   another; [`cgroup`]: the VM's control group.
//! - [`disks`], [`cpu`], [`fits`]: from a description to open disks, to KVM, and to
//!   saved states that belong to it.
//!
//! This crate starts no process and serves no socket.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cgroup;
pub mod cpu;
pub mod disks;
pub mod document;
pub mod error;
pub mod fits;
pub mod invocation;
pub mod process;
pub mod report;
pub mod shared_file;
pub mod vm_dir;

pub use error::{Result, failed};
pub use process::Process;
pub use shared_file::SharedFile;
pub use vm_dir::VmDir;
