//! The record of the pages that a template's clones touch first.

/// The record's name in a template's directory.
pub const FILE: &str = "prefetch";
