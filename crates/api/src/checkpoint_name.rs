//! Names of checkpoints.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::validate::is_valid_name;

/// The name of a checkpoint, by the rules for the names of VMs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(try_from = "String")]
pub struct CheckpointName(String);

impl CheckpointName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for CheckpointName {
    type Error = ApiError;

    fn try_from(name: String) -> Result<Self, ApiError> {
        match is_valid_name(&name) {
            true => Ok(Self(name)),
            false => Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!("invalid checkpoint name `{}`", name.escape_debug()),
            )
            .advise("use letters, digits, `-`, `_` and `.`, a letter or digit first")),
        }
    }
}

impl std::str::FromStr for CheckpointName {
    type Err = ApiError;

    fn from_str(name: &str) -> Result<Self, ApiError> {
        Self::try_from(name.to_owned())
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_where_they_are_read() {
        for good in ["a", "before-upgrade", "v1.2_x"] {
            let read: CheckpointName = serde_json::from_str(&format!("\"{good}\"")).unwrap();
            assert_eq!(read.as_str(), good);
        }
        for bad in ["", "-a", "a/b", "a b", &"x".repeat(300)] {
            let read = serde_json::from_str::<CheckpointName>(&format!("\"{bad}\""));
            assert!(read.is_err(), "{bad}");
        }
    }
}
