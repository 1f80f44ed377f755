//! What a guest, the process of its VM and the server of a share say to each other, without a file
//! system.
//!
//! [`wire`] reads and writes FUSE messages, whose bytes come from a guest. [`link`] is the
//! connection between a VM's process, which has the guest's memory, and the server of a share,
//! which has the directory.
//!
//! Source: Linux, include/uapi/linux/fuse.h (protocol 7.38); VIRTIO 1.3, 5.11.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod link;
pub mod wire;
