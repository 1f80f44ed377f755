//! VMs: requests to create, fork and snapshot them, and their state.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Problem;

/// The longest time of a request, in seconds: 10 years. It is far below what clocks and databases
/// can represent.
pub const MAX_SECONDS: u64 = 315_360_000;

/// A request to create one or more identical VMs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVms {
    /// The template from which the VMs are forked, or a tag that points to it. A bare name is looked up
    /// in the own tenant first, and then among the templates of the administrators (by administrators,
    /// the other way round); `TENANT/NAME` is that of another tenant, and `/NAME` one of the
    /// administrators.
    #[schema(max_length = 97)]
    pub template: String,
    /// The number of VMs to create, 1 to 1,000. The default is 1.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1000, default = 1)]
    pub count: u32,
    /// The name of the VM, which is also the guest's host name. If several VMs are created, they
    /// are named NAME-1, NAME-2 and so on. By default, a name is derived from the name of the
    /// template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 48)]
    pub name: Option<String>,
    /// Labels of the VMs, by which they can be listed: at most 64, with keys of 1 to 63 characters
    /// and values of at most 255.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::limits::labels)]
    pub labels: BTreeMap<String, String>,
    /// Labels that a host must have for the VMs to be placed on it. Without any, every host
    /// qualifies.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::limits::labels)]
    pub host_labels: BTreeMap<String, String>,
    /// Environment variables that are added to those of every command that is run in the VMs:
    /// at most 256, and 64 KiB of names and values together.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::limits::environment)]
    pub environment: BTreeMap<String, String>,
    /// The lifetime of the VMs, in seconds, 1 to 315,360,000 (10 years). After it, they are
    /// destroyed even if they are in use. By default, there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 315360000)]
    pub ttl_s: Option<u64>,
    /// The idle policy: what happens to VMs that nobody uses. By default, nothing happens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<IdlePolicy>,
    /// The network policy of the VMs. The default is the policy of the VM from which the template
    /// was created, which permits everything unless it was restricted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
}

/// The network policy of a VM. The host enforces it, and it also applies to forks of the VM.
/// Running commands, transferring files and connecting to ports through Army are not affected.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// The egress policy: the destinations that the guest may send to.
    pub egress: Egress,
    /// Whether the guest may open connections to the own addresses of its host, where `egress` permits
    /// them. The default is false: only name servers and DHCP are open there. Only administrators may
    /// permit it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host: bool,
}

/// An egress policy: the destinations that a guest may send to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// The guest may send to all destinations.
    Full,
    /// The guest may not send to any destination.
    None,
    /// The guest may send only to IPv4 addresses in these networks: up to 64, each written as
    /// `10.0.0.0/8` or `192.0.2.7`. Host names can be resolved only if a name server is in one of
    /// them.
    Allow(Vec<String>),
}

fn one() -> u32 {
    1
}

/// The idle policy of a VM: what happens to it when no command has been run in it for some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IdlePolicy {
    /// The time without a command after which the VM counts as idle, in seconds, 1 to 315,360,000
    /// (10 years).
    #[schema(minimum = 1, maximum = 315360000)]
    pub after_s: u64,
    /// The action that is taken when the VM is idle.
    pub action: IdleAction,
}

/// The action that is taken when a VM is idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum IdleAction {
    /// The VM is paused. The next command resumes it.
    Pause,
    /// The VM is suspended: its state is kept on its host's disk, and it uses no memory. The next
    /// command wakes it.
    Suspend,
    /// The VM is destroyed.
    Destroy,
}

/// The state of a VM, as its host last reported it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// A host was chosen for the VM and has been asked to create it.
    Creating,
    /// The VM is running.
    Running,
    /// The VM is paused: its virtual CPUs are stopped.
    Paused,
    /// The VM is suspended: its state is kept on its host's disk, and it uses no memory. The next
    /// command, terminal, file or forwarded port wakes it.
    Suspended,
    /// The VM is being moved to another host. Its guest runs, but for an instant, and can be used.
    Migrating,
    /// The VM has ended: it was destroyed, its lifetime expired, or its guest shut down; `reason`
    /// tells which.
    Ended,
    /// The VM could not be created, or its process died; `reason` tells why.
    Failed,
    /// The VM's host does not respond. The VM may still be running.
    Unreachable,
}

impl VmState {
    /// Whether the VM was last reported by its host as one that exists: running, paused or suspended.
    pub fn is_reported(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Suspended)
    }

    /// Whether the VM occupies its host: it has neither ended nor failed.
    pub fn is_alive(self) -> bool {
        !matches!(self, Self::Ended | Self::Failed)
    }
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// The unique id of the VM. Ids are never reused.
    pub id: String,
    /// The name of the VM. The name of a VM that has ended can be used again.
    pub name: String,
    /// The tenant that owns the VM.
    pub tenant: String,
    /// The source of the fork: the name of a template of the administrators, `TENANT/NAME` of
    /// another template, or `vm:` and the id of a VM.
    pub template: String,
    /// The host on which the VM runs.
    pub host: String,
    /// The state of the VM.
    pub state: VmState,
    /// The reason that the VM ended, failed or is unreachable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The labels of the VM.
    pub labels: BTreeMap<String, String>,
    /// The time at which the VM was requested, in milliseconds since 1970.
    pub created_ms: u64,
    /// The time at which the VM will be destroyed, in milliseconds since 1970. It is absent if the
    /// VM has no limited lifetime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// The network policy of the VM: what was requested, within the policy of its tenant. It is
    /// absent if there was neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// The idle policy of the VM. It is absent if the VM has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<IdlePolicy>,
    /// How long the creation of the VM took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork: Option<ForkTimes>,
    /// The addresses that the host has given the guest on the host's own network. A guest may have
    /// others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Notices: what the host or the guest could not provide when the VM was created, as sentences
    /// for people. The VM runs nevertheless.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// The memory usage of the VM, as last measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<VmMemory>,
}

/// How long a fork took, by stage, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkTimes {
    /// Whether the VM was taken from the standbys.
    pub warm: bool,
    /// The time from the arrival of the request until the host was asked to fork: checks, placement
    /// and database, in microseconds.
    pub placement_us: u64,
    /// The time from the request to the host until the guest ran, in microseconds.
    pub running_us: u64,
    /// The time from the moment when the guest ran until it had its own identity, in microseconds.
    pub identity_us: u64,
    /// The time from the arrival of the request until the VM was reported, in microseconds.
    pub total_us: u64,
}

/// The memory usage of a VM on its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmMemory {
    /// The memory size of the guest, in bytes.
    pub guest_bytes: u64,
    /// The memory that only this VM uses, in bytes. It becomes free when the VM is destroyed.
    pub private_bytes: u64,
    /// The mapped memory that the VM shares with other clones of its template, in bytes.
    pub shared_bytes: u64,
    /// The memory of the VM that is swapped out, in bytes.
    pub swapped_bytes: u64,
}

/// The outcome for each VM that was requested.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedVms {
    /// The VMs that were created, in the order of their numbers.
    pub vms: Vec<Vm>,
    /// The VMs that could not be created, with the reason for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
}

/// A VM that could not be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The name that the VM would have had.
    pub name: String,
    /// The reason that the VM could not be created.
    pub problem: Problem,
}

/// A request for live forks of a running VM. The VM itself continues to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkVm {
    /// The number of forks to create, 1 to 1,000. The default is 1.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1000, default = 1)]
    pub count: u32,
    /// The name of the fork, which is also the guest's host name. If several forks are created,
    /// they are named NAME-1, NAME-2 and so on. By default, a name is derived from the VM's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 48)]
    pub name: Option<String>,
}

/// A request to create a template from a running VM. The VM itself continues to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotVm {
    /// The name of the new template. It belongs to the tenant of the VM; where an administrator takes
    /// the snapshot of a VM of their own tenant, it belongs to the administrators and is public.
    /// Administrators may also say `TENANT/NAME`.
    #[schema(max_length = 97)]
    pub template: String,
    /// Whether to store only the changes since the VM's own template. The default is false.
    #[serde(default)]
    pub diff: bool,
}

/// A request to change the size of a VM's memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// The amount of guest memory that the balloon should hold, in bytes, at most 64 TiB.
    #[schema(maximum = 70368744177664_i64)]
    pub bytes: u64,
}

/// The memory balloon of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Balloon {
    /// The amount of guest memory that the balloon should hold, in bytes.
    pub target_bytes: u64,
    /// The amount of guest memory that the balloon holds now, in bytes.
    pub actual_bytes: u64,
    /// The memory that is available in the guest without swapping, in bytes. It is absent if the
    /// guest does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
}

/// A filter that chooses which VMs are listed: those that meet all of its conditions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(try_from = "Vec<(String, String)>", into = "Vec<(String, String)>")]
pub struct VmFilter {
    /// Only VMs that were forked from this template are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 200)]
    pub template: Option<String>,
    /// Only VMs on this host are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 200)]
    pub host: Option<String>,
    /// Only VMs with this label are listed, written as `key=value`, or as `key` for any value. It can
    /// be given up to 16 times, for VMs with all of the labels.
    #[param(required = false)]
    pub label: Vec<String>,
    /// Only VMs in this state are listed, VMs that have ended included. It can be given several
    /// times, for VMs in one of the states.
    #[param(required = false)]
    pub state: Vec<VmState>,
    /// Whether VMs that have ended are listed as well. The default is false.
    #[param(required = false)]
    pub all: bool,
    /// The maximum number of VMs in the response, 1 to 10,000. The default is 1,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 10000)]
    pub limit: Option<u32>,
    /// The position at which the page begins: the value of `next` in the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 20)]
    pub after: Option<String>,
}

/// The most labels of a filter.
const MAX_FILTER_LABELS: usize = 16;
/// The longest label of a filter, in characters.
const MAX_FILTER_LABEL: usize = 400;

impl TryFrom<Vec<(String, String)>> for VmFilter {
    type Error = String;

    /// Reads the parameters of a query, of which some may be given several times.
    fn try_from(pairs: Vec<(String, String)>) -> Result<Self, String> {
        let mut filter = Self::default();
        for (name, value) in pairs {
            let invalid = || format!("invalid value `{}` of `{name}`", value.escape_debug());
            let once = |slot: &mut Option<String>| match slot.replace(value.clone()) {
                None => Ok(()),
                Some(_) => Err(format!("`{name}` is given twice")),
            };
            match &*name {
                "template" => once(&mut filter.template)?,
                "host" => once(&mut filter.host)?,
                "after" => once(&mut filter.after)?,
                "label" if filter.label.len() == MAX_FILTER_LABELS => {
                    return Err(format!(
                        "`label` is given more than {MAX_FILTER_LABELS} times"
                    ));
                }
                "label" if value.chars().count() > MAX_FILTER_LABEL => {
                    return Err(format!("`label` has at most {MAX_FILTER_LABEL} characters"));
                }
                "label" => filter.label.push(value),
                "state" => {
                    let word = serde_json::Value::String(value.clone());
                    let state = serde_json::from_value(word).map_err(|_| invalid())?;
                    if !filter.state.contains(&state) {
                        filter.state.push(state);
                    }
                }
                "all" => filter.all = value.parse().map_err(|_| invalid())?,
                "limit" => filter.limit = Some(value.parse().map_err(|_| invalid())?),
                _ => return Err(format!("unknown parameter `{}`", name.escape_debug())),
            }
        }
        Ok(filter)
    }
}

impl From<VmFilter> for Vec<(String, String)> {
    fn from(filter: VmFilter) -> Self {
        let word = |state: &VmState| match serde_json::to_value(state) {
            Ok(serde_json::Value::String(word)) => word,
            // A state is always a word.
            _ => String::new(),
        };
        let single = [
            ("template", filter.template),
            ("host", filter.host),
            ("all", filter.all.then(|| "true".to_owned())),
            ("limit", filter.limit.map(|limit| limit.to_string())),
            ("after", filter.after),
        ];
        let labels = filter.label.into_iter().map(|label| ("label", label));
        let states = filter.state.iter().map(|state| ("state", word(state)));
        let single = single
            .into_iter()
            .filter_map(|(name, it)| Some((name, it?)));
        let all = single.chain(labels).chain(states);
        all.map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// A page of a list of VMs, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmPage {
    /// The VMs of this page.
    pub vms: Vec<Vm>,
    /// The value of `after` that requests the next page. It is absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_what_its_query_says() {
        let filter = VmFilter {
            template: Some("t".into()),
            label: vec!["a=b".into(), "c".into()],
            state: vec![VmState::Running, VmState::Ended],
            all: true,
            limit: Some(7),
            ..VmFilter::default()
        };
        let pairs: Vec<(String, String)> = filter.clone().into();
        assert_eq!(VmFilter::try_from(pairs), Ok(filter));
        let read = |name: &str, value: &str, times: usize| {
            let pair = (name.to_owned(), value.to_owned());
            VmFilter::try_from(vec![pair; times])
        };
        assert_eq!(read("state", "running", 2).unwrap().state.len(), 1);
        for (name, value, times) in [
            ("host", "a", 2),
            ("label", "a", 17),
            ("state", "odd", 1),
            ("limit", "x", 1),
            ("surprise", "1", 1),
        ] {
            assert!(read(name, value, times).is_err(), "{name}");
        }
        assert!(read("label", &"l".repeat(401), 1).is_err());
    }
}
