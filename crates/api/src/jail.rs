//! The layers of the jail around a VM's process that a host may lack, and which of them must be
//! there.
//!
//! Capabilities, system call filters and resource limits are not listed: a VM never runs without
//! them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};

/// A layer of the jail that some hosts cannot provide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum JailLayer {
    /// An empty root, and namespaces for mounts, network, IPC, host name and cgroups.
    Namespaces,
    /// A user id that no other process has.
    UserId,
    /// A cgroup that limits memory and threads.
    Cgroup,
    /// Landlock, which forbids all paths and TCP ports.
    Landlock,
}

impl JailLayer {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Namespaces, Self::UserId, Self::Cgroup, Self::Landlock];

    /// Its name, as in JSON and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::UserId => "user-id",
            Self::Cgroup => "cgroup",
            Self::Landlock => "landlock",
        }
    }
}

impl fmt::Display for JailLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for JailLayer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = Self::ALL.into_iter();
        all.find(|layer| layer.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{text}` is not a layer of the jail; the layers are {names}")
        })
    }
}

/// A layer that a jail lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MissingLayer {
    /// The layer.
    pub layer: JailLayer,
    /// Why the host cannot provide it.
    pub reason: String,
}

impl fmt::Display for MissingLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.layer, self.reason)
    }
}

/// How complete a VM's jail is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct JailStatus {
    /// The layers that it lacks; none where it is complete.
    pub missing: Vec<MissingLayer>,
}

impl JailStatus {
    /// A warning for each layer that is missing.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.missing
            .iter()
            .map(|missing| format!("warning: the VM's jail lacks a layer: {missing}"))
    }
}

/// The layers without which a VM must not run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RequiredJail(Vec<JailLayer>);

impl RequiredJail {
    /// All layers must be there.
    pub fn complete() -> Self {
        Self(JailLayer::ALL.to_vec())
    }

    /// Whether `jail` has every layer that is required.
    ///
    /// # Errors
    /// [`ErrorCode::HostUnsupported`], with each layer that is missing and why.
    pub fn check(&self, jail: &JailStatus) -> Result<(), ApiError> {
        let missing = jail.missing.iter();
        let missing = missing.filter(|missing| self.0.contains(&missing.layer));
        let missing: Vec<String> = missing.map(MissingLayer::to_string).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::HostUnsupported,
            format!(
                "the VM's jail would lack a layer that is required: {}",
                missing.join("; ")
            ),
        )
        .advise("provide it on this host, or do not require it"))
    }
}

/// `all`, or layers with commas between them.
impl FromStr for RequiredJail {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::complete()),
            layers => layers
                .split(',')
                .map(str::parse)
                .collect::<Result<_, _>>()
                .map(Self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(layer: JailLayer) -> JailStatus {
        let reason = "this host has none".to_owned();
        JailStatus {
            missing: vec![MissingLayer { layer, reason }],
        }
    }

    #[test]
    fn a_jail_that_lacks_a_required_layer_is_refused_with_the_reason() {
        let jail = without(JailLayer::Cgroup);
        let refused = RequiredJail::complete().check(&jail).unwrap_err();
        assert_eq!(refused.code, ErrorCode::HostUnsupported);
        assert!(refused.message.ends_with("cgroup: this host has none"));
        let others: RequiredJail = "landlock,user-id".parse().unwrap();
        others.check(&jail).unwrap();
        others.check(&without(JailLayer::UserId)).unwrap_err();
        RequiredJail::default().check(&jail).unwrap();
        RequiredJail::complete()
            .check(&JailStatus::default())
            .unwrap();
    }

    #[test]
    fn layers_have_one_name_in_json_and_on_command_lines() {
        for layer in JailLayer::ALL {
            let json = serde_json::to_value(layer).unwrap();
            assert_eq!(json, layer.name());
            assert_eq!(layer.name().parse(), Ok(layer));
        }
        assert_eq!("all".parse(), Ok(RequiredJail::complete()));
        let unknown = "cgroup,chroot".parse::<RequiredJail>().unwrap_err();
        assert!(unknown.contains("`chroot`") && unknown.contains("namespaces"));
        assert!("".parse::<RequiredJail>().is_err());
    }
}
