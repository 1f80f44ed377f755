//! Starts and finds VMs on a host, for the command line and for Army's node.
//!
//! - [`launch`]: starting VMs: from a kernel, from a template, from a running VM, ahead of need.
//! - [`runtime`]: the runtime directories of all VMs.
//! - [`snapshot`]: making a template of a running VM.
//! - [`checkpoint`]: states of a running VM that it is rewound to.
//! - [`migrate`]: moving a running VM to another host.
//! - [`host_net`]: taps, bridges and addresses on the host.
//! - [`programs`]: the programs that belong to this one: a VM's process, and the agent for guests.
//! - [`cache`]: where things are kept that can be made again.
//!
//! The VM itself is run by the program `clone-vm`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cache;
pub mod checkpoint;
pub mod host_net;
pub mod launch;
mod locked_dir;
pub mod migrate;
pub mod programs;
pub mod runtime;
mod scratch;
pub mod snapshot;
pub mod suspend;
pub mod suspended;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
