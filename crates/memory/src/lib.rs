//! Guest RAM: where it lies in the guest's address space and how it is mapped in the host's.
//!
//! This crate knows nothing of KVM, devices or vCPUs: it hands out mappings ([`GuestMemory`]) with
//! their guest addresses, and the VMM registers them.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod layout;
mod mapping;

pub use layout::RamLayout;
pub use mapping::{GuestMemory, GuestRam, MemoryError, Region};
