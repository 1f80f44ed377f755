//! The sources of a root file system's files. Each fills the same in-memory tree.

pub(crate) mod cpu_level;
pub(crate) mod debian;
pub(crate) mod digest;
pub(crate) mod directory;
pub(crate) mod layer;
pub(crate) mod oci;
#[cfg(feature = "pull")]
pub(crate) mod pull;
#[cfg(all(test, feature = "pull"))]
mod pull_tests;
pub(crate) mod store;
mod tar_number;
pub(crate) mod tar_stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use debian::Debian;
pub use directory::Ownership;
pub use oci::ImageConfig;
#[cfg(feature = "pull")]
pub use pull::{Credentials, RegistryImage};
