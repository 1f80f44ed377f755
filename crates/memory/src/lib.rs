//! Guest RAM: where it lies in the guest's address space, how it is mapped in the host's, what of
//! it was changed, and the files that hold it.
//!
//! - [`GuestMemory`] is all RAM of one guest: fresh, or seen through [`layers`].
//! - [`layers`] are files of pages, written from one guest and mapped by many.
//! - [`dirty`] finds the pages that a guest has changed, by the host's page tables.
//! - [`accounting`] measures the host memory that a guest uses.
//!
//! This crate knows nothing of KVM, devices or vCPUs: it hands out mappings with their guest
//! addresses, and the VMM registers them.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod accounting;
pub mod dirty;
mod flatten;
mod layer_writer;
pub mod layers;
pub mod layout;
mod mapping;
pub mod pages;
mod rewind;
mod sys;

pub use accounting::{ProcessUsage, RamUsage};
pub use dirty::{ChangeTracker, DirtyError, Pagemap};
pub use layer_writer::{Checksums, LayerWriter};
pub use layers::{Layer, LayerError, LayerId, LayerStack};
pub use layout::RamLayout;
pub use mapping::{GuestMemory, GuestRam, MemoryError, Region};
pub use pages::PageSet;
pub use rewind::{PutBack, PutBackError};
