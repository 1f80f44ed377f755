//! Changes of VMs that exist.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::vms::{IdlePolicy, NetworkPolicy};

/// A request to change a VM. What is not mentioned is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"ttl_s": 3600, "labels": {"team": "red", "draft": null}}))]
pub struct ChangeVm {
    /// The lifetime that the VM has left from now on, in seconds, 1 to 315,360,000 (10 years),
    /// longer or shorter than before. Null removes the limit.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 315360000)]
    pub ttl_s: Option<Option<u64>>,
    /// The idle policy. The idle time begins with this request. Null removes the policy.
    #[serde(
        default,
        deserialize_with = "mentioned",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<IdlePolicy>)]
    pub idle: Option<Option<IdlePolicy>>,
    /// The network policy. It is in force when the request is answered, also for connections that
    /// exist, and it cannot permit what the VM's template or, for a fork, the forked VM did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// The labels to set, or, where the value is null, to remove. Labels that are not mentioned are
    /// kept. A VM has at most 64 labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::limits::label_changes)]
    pub labels: BTreeMap<String, Option<String>>,
}

/// Reads a field that may be null: null differs from a field that is absent.
pub(crate) fn mentioned<'de, T, D>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_removes_and_what_is_absent_is_kept() {
        let read = |text: &str| serde_json::from_str::<ChangeVm>(text).unwrap();
        assert_eq!(read("{}"), ChangeVm::default());
        let change = read(r#"{"ttl_s": null, "idle": null, "labels": {"a": null}}"#);
        assert_eq!((change.ttl_s, change.idle), (Some(None), Some(None)));
        assert_eq!(change.labels["a"], None);
        let text = serde_json::to_string(&change).unwrap();
        assert_eq!(text, r#"{"ttl_s":null,"idle":null,"labels":{"a":null}}"#);
        assert_eq!(read(r#"{"ttl_s": 5}"#).ttl_s, Some(Some(5)));
    }
}
