//! The interface between a VM and its users: its description, and its control socket.
//!
//! - [`config`]: the description of a VM, the same type from flags, from a TOML file and over the
//!   control socket; [`validate`] finds everything that is wrong with one.
//! - [`shape`]: what of a machine a template carries to other hosts.
//! - [`checkpoints`]: states of a running VM that it is set back to.
//! - [`control`]: what the control socket takes and answers; [`routes`] lists its operations, and
//!   `openapi.json` describes them to other programs (a test generates it from the types and
//!   compares).
//! - [`client`]: a small blocking client of that socket; [`descriptors`] sends open files with bytes.
//! - [`jail`]: the layers of a VM's jail that a host may lack.
//!
//! This crate opens no KVM, no disk and no network: it contains only what a client needs.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod checkpoint_name;
pub mod checkpoints;
pub mod client;
pub mod config;
pub mod control;
pub mod descriptors;
mod error;
pub mod jail;
pub mod routes;
pub mod shape;
pub mod units;
pub mod validate;

#[cfg(test)]
mod openapi_tests;

pub use client::{Client, ClientError};
pub use config::VmConfig;
pub use error::{ApiError, ErrorCode};
pub use routes::{Method, Operation, Route};
pub use shape::Shape;
pub use units::{Bytes, Ipv4Network, MacAddr};

/// The OpenAPI 3.1 document of the control socket, as served at `/openapi.json`.
pub const OPENAPI: &str = include_str!("../openapi.json");
