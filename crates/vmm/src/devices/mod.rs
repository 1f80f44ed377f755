//! The devices of a machine, a folder each: `state.rs` (plain data, saved and restored),
//! `queue.rs` (what the guest asks, no KVM), `backend.rs` (files, taps, sockets), `mod.rs` (the
//! device), `tests.rs`.

pub mod balloon;
pub mod block;
pub mod fs;
pub mod net;
pub mod rng;
pub mod serial;
pub mod vsock;
