//! Moves a running VM to another host.
//!
//! The two launchers talk first, over a stream that somebody has connected: `clone migrate` by ssh,
//! Army's nodes by TLS. The source [offers](offer::Offer) the VM. The destination refuses it, with the
//! reason, before anything else is sent; or it asks for the VM's template, if it has not got that;
//! or it starts a process for the VM and accepts. Then each launcher passes its end of the stream to
//! its VM's process. From there on, the two processes ([`clone_migration`]) bring the migration to its
//! end by themselves, even if the launchers are killed.
//!
//! What does not travel: files of the source's host that keep a guest's writes, and images and
//! kernels that are not a template's, which must be the same at the same path on both hosts.

mod frame;
mod offer;
mod receive;
mod send;

pub use clone_migration::Link;
pub use offer::{Needs, needs};
pub use receive::{Arrived, Policy, receive};
pub use send::{Options, send, tell};
