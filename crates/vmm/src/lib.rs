//! The virtual machine: vCPUs, interrupts, PCI, devices, boot.
//!
//! This crate builds a machine from a description and host resources that were already opened
//! (files, taps, sockets), runs it, and saves or restores its state. It leaves to others: guest
//! RAM and its layers (`clone-memory`), root file systems and kernels (`clone-image`), the jail,
//! the command line and the control socket (`clone`).
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod devices;
pub mod event_loop;
mod exit;
pub mod irq;
pub mod machine;
pub mod pci;
pub mod rate_limit;
pub mod snapshot;
pub mod state_codec;
pub mod timer;
pub mod vcpu;
pub mod virtio;
