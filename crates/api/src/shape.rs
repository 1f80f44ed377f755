//! The shape of a machine: what its guest can see of it, and nothing of a host.
//!
//! A template carries a shape, so a shape may come from a stranger: no field of it names a path, an
//! interface, an address or a right. The forking side adds those ([`Shape::config`]). The rules that
//! a shape must keep are in [`crate::validate::validate_shape`].

use serde::{Deserialize, Serialize};

use crate::Ipv4Network;
use crate::config::{
    BalloonConfig, ConsoleConfig, DiskConfig, DiskFormat, Egress, NetConfig, NetMode, OnReboot,
    RateLimit, ShareConfig, VmConfig, VsockConfig,
};
use crate::units::Bytes;

/// A machine as its guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// RAM.
    pub memory: Bytes,
    /// The whole command line that the kernel gets when the guest reboots.
    pub cmdline: String,
    /// Disks; the first is `/dev/vda`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskShape>,
    /// Network interfaces; the first is `eth0`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetShape>,
    /// The socket device; absent where the machine has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockShape>,
    /// The memory balloon; absent where the machine has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonShape>,
    /// Whether the machine has a source of random numbers.
    pub rng: bool,
    /// Directories that the guest mounts by virtio-fs. Which directories these are is said by the
    /// side that forks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareShape>,
    /// What a reboot of the guest does.
    pub on_reboot: OnReboot,
}

/// A shared directory as its guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareShape {
    /// The name by which the guest mounts it.
    pub tag: String,
}

/// A disk as its guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskShape {
    /// Its size.
    pub bytes: Bytes,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Its request queues.
    pub queues: u16,
}

/// A network interface as its guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetShape {
    /// Its pairs of queues.
    pub queues: u16,
}

/// The socket device as its guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockShape {
    /// The guest's address.
    pub cid: u32,
}

/// The memory balloon as its guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonShape {
    /// Whether the guest gives memory back by itself when a process fails to get some.
    pub deflate_on_oom: bool,
    /// Whether the guest reports pages that it no longer uses.
    pub free_page_reporting: bool,
}

/// Request queues of every disk: one, which the event loop serves.
pub const DISK_QUEUES: u16 = 1;

impl Shape {
    /// The shape of the machine that `config` describes, with disks of these sizes.
    pub fn of(config: &VmConfig, disk_bytes: &[u64]) -> Self {
        let disks = config.disks.iter().zip(disk_bytes);
        Self {
            vcpus: config.vcpus,
            memory: config.memory,
            cmdline: config.kernel_cmdline(),
            disks: disks
                .map(|(disk, &bytes)| DiskShape {
                    bytes: Bytes(bytes),
                    read_only: disk.read_only,
                    queues: DISK_QUEUES,
                })
                .collect(),
            nets: config.net.iter().map(NetShape::of).collect(),
            vsock: config.vsock.enabled.then_some(VsockShape {
                cid: config.vsock.cid,
            }),
            balloon: config.balloon.enabled.then_some(BalloonShape {
                deflate_on_oom: config.balloon.deflate_on_oom,
                free_page_reporting: config.balloon.free_page_reporting,
            }),
            rng: config.rng,
            shares: config
                .shares
                .iter()
                .map(|share| ShareShape {
                    tag: share.tag.clone(),
                })
                .collect(),
            on_reboot: config.on_reboot,
        }
    }

    /// The description of a machine of this shape with the host's defaults for all that a shape
    /// leaves open: interfaces on the host's own translated network, writes that end with the VM,
    /// logs of the usual size, no rate limits. It has no name, and no path to a kernel or a disk.
    pub fn config(&self) -> VmConfig {
        let balloon = self.balloon.as_ref();
        VmConfig {
            vcpus: self.vcpus,
            memory: self.memory,
            cmdline: Some(self.cmdline.clone()),
            disks: self.disks.iter().map(DiskShape::config).collect(),
            net: self.nets.iter().map(NetShape::config).collect(),
            shares: self
                .shares
                .iter()
                .map(|share| ShareConfig {
                    tag: share.tag.clone(),
                    ..ShareConfig::default()
                })
                .collect(),
            vsock: VsockConfig {
                enabled: self.vsock.is_some(),
                cid: self.vsock.map_or(VsockConfig::default().cid, |it| it.cid),
            },
            balloon: BalloonConfig {
                enabled: balloon.is_some(),
                size: Bytes(0),
                deflate_on_oom: balloon.is_some_and(|it| it.deflate_on_oom),
                free_page_reporting: balloon.is_some_and(|it| it.free_page_reporting),
            },
            rng: self.rng,
            console: ConsoleConfig::default(),
            on_reboot: self.on_reboot,
            ..VmConfig::default()
        }
    }
}

impl DiskShape {
    fn config(&self) -> DiskConfig {
        DiskConfig {
            format: Some(DiskFormat::Raw),
            read_only: self.read_only,
            overlay: match self.read_only {
                true => crate::config::Overlay::None,
                false => crate::config::Overlay::Ephemeral,
            },
            ..DiskConfig::default()
        }
    }
}

impl NetShape {
    fn of(config: &NetConfig) -> Self {
        Self {
            queues: config.queues.unwrap_or(1),
        }
    }

    fn config(&self) -> NetConfig {
        NetConfig {
            queues: Some(self.queues),
            ..NetConfig::default()
        }
    }
}

/// What the maker of a template asks of all who fork it. A ceiling only takes away: whatever the
/// forking side allows is narrowed to it, and it can neither name nor add anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ceilings {
    /// For each disk, in the order of the shape.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskCeiling>,
    /// For each network interface, in the order of the shape.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetCeiling>,
}

/// The ceiling of a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCeiling {
    /// How fast the guest may read and write at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
}

/// The ceiling of a network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetCeiling {
    /// The destinations that the guest may send to at most.
    #[serde(default, skip_serializing_if = "Egress::is_full")]
    pub egress: Egress,
    /// How fast packets may go at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// The most connections that the guest may have in the host's table, where it has any there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
}

/// An intersection of two egress policies that has more networks than a policy may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "what both allow takes more than {} networks to say",
    Egress::MAX_NETWORKS
)]
pub struct TooManyNetworks;

impl Ceilings {
    /// The limits that the VM of `config` is held to; none at all where there are none.
    pub fn of(config: &VmConfig) -> Self {
        let disks = config.disks.iter().map(|disk| DiskCeiling {
            rate_limit: disk.rate_limit,
        });
        let nets = config.net.iter().map(|net| NetCeiling {
            egress: net.egress.clone(),
            rate_limit: net.rate_limit,
            connections: net.connections,
        });
        let (disks, nets): (Vec<_>, Vec<_>) = (disks.collect(), nets.collect());
        let default = Self::default();
        Self {
            disks: match disks.iter().all(|disk| *disk == DiskCeiling::default()) {
                true => default.disks,
                false => disks,
            },
            nets: match nets.iter().all(|net| *net == NetCeiling::default()) {
                true => default.nets,
                false => nets,
            },
        }
    }

    /// Narrows what the forking side allows.
    ///
    /// # Errors
    /// [`TooManyNetworks`], with the interface's place.
    pub fn narrow(&self, config: &mut VmConfig) -> Result<(), (usize, TooManyNetworks)> {
        for (disk, ceiling) in config.disks.iter_mut().zip(&self.disks) {
            disk.rate_limit = RateLimit::narrower(disk.rate_limit, ceiling.rate_limit);
        }
        for (index, (net, ceiling)) in config.net.iter_mut().zip(&self.nets).enumerate() {
            let egress = net.egress.narrowed_by(&ceiling.egress);
            net.egress = egress.map_err(|error| (index, error))?;
            net.rate_limit = RateLimit::narrower(net.rate_limit, ceiling.rate_limit);
            if let Some(most) = ceiling.connections.filter(|_| net.mode == NetMode::Nat) {
                let wanted = net.connections.unwrap_or(NetConfig::DEFAULT_CONNECTIONS);
                net.connections = Some(wanted.min(most));
            }
        }
        Ok(())
    }
}

impl Egress {
    /// What all of these policies allow; everything where there are none.
    ///
    /// # Errors
    /// [`TooManyNetworks`] where that cannot be written as a policy.
    pub fn common<'a>(
        policies: impl IntoIterator<Item = &'a Self>,
    ) -> Result<Self, TooManyNetworks> {
        let mut policies = policies.into_iter();
        policies.try_fold(Self::Full, |all, policy| all.intersection(policy))
    }

    /// What this policy allows within a ceiling. A ceiling only takes away, so link-local networks,
    /// which are closed unless a policy names them, remain only where this policy names them.
    ///
    /// # Errors
    /// [`TooManyNetworks`] where that cannot be written as a policy.
    pub fn narrowed_by(&self, ceiling: &Self) -> Result<Self, TooManyNetworks> {
        let Self::Allow(mut both) = self.intersection(ceiling)? else {
            return match (self, ceiling) {
                (Self::Full, Self::Full) => Ok(Self::Full),
                _ => Ok(Self::None),
            };
        };
        let own: &[Ipv4Network] = match self {
            Self::Allow(own) => own,
            Self::Full | Self::None => &[],
        };
        let names = |net: Ipv4Network| own.iter().any(|it| it.is_link_local() && it.contains(net));
        both.retain(|net| !net.is_link_local() || names(*net));
        match both.is_empty() {
            true => Ok(Self::None),
            false => Ok(Self::Allow(both)),
        }
    }

    /// What both policies allow.
    ///
    /// # Errors
    /// [`TooManyNetworks`] where that cannot be written as a policy.
    pub fn intersection(&self, other: &Self) -> Result<Self, TooManyNetworks> {
        let (ours, theirs) = match (self, other) {
            (Self::None, _) | (_, Self::None) => return Ok(Self::None),
            (Self::Full, policy) | (policy, Self::Full) => return Ok(policy.clone()),
            (Self::Allow(ours), Self::Allow(theirs)) => (ours, theirs),
        };
        // Of two networks that have anything in common, one lies within the other.
        let within = ours
            .iter()
            .filter(|net| theirs.iter().any(|it| it.contains(**net)));
        let around = theirs
            .iter()
            .filter(|net| ours.iter().any(|it| it.contains(**net)));
        let mut both: Vec<_> = within.copied().collect();
        both.extend(around.filter(|net| !ours.contains(net)));
        match both.len() {
            0 => Ok(Self::None),
            1..=Self::MAX_NETWORKS => Ok(Self::Allow(both)),
            _ => Err(TooManyNetworks),
        }
    }
}

impl RateLimit {
    /// The lower of two limits in each rate and in each burst.
    fn narrower(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        let (Some(one), Some(other)) = (one, other) else {
            return one.or(other);
        };
        fn lower<T: Ord + Copy>(one: Option<T>, other: Option<T>) -> Option<T> {
            one.into_iter().chain(other).min()
        }
        Some(Self {
            bandwidth: lower(one.bandwidth, other.bandwidth),
            bandwidth_burst: lower(one.bandwidth_burst, other.bandwidth_burst),
            iops: lower(one.iops, other.iops),
            iops_burst: lower(one.iops_burst, other.iops_burst),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NetMode, Overlay};

    fn allow(networks: &[&str]) -> Egress {
        Egress::Allow(networks.iter().map(|it| it.parse().unwrap()).collect())
    }

    #[test]
    fn a_shape_says_nothing_of_the_host_that_it_was_taken_on() {
        let config = VmConfig {
            name: "secret-name".into(),
            kernel: "/secret-kernel".into(),
            initrd: Some("/secret-initrd".into()),
            disks: vec![DiskConfig {
                path: "/secret-disk".into(),
                overlay: Overlay::Kept("/secret-overlay".into()),
                ..DiskConfig::default()
            }],
            net: vec![NetConfig {
                mode: NetMode::Bridge,
                bridge: Some("secret-br".into()),
                mac: Some("02:5e:c2:e7:00:01".parse().unwrap()),
                neighbours: true,
                ..NetConfig::default()
            }],
            ..VmConfig::default()
        };
        let shape = Shape::of(&config, &[4096]);
        let text = serde_json::to_string(&shape).unwrap();
        for word in ["secret", "02:5e", "neighbours", "log"] {
            assert!(!text.contains(word), "{word}: {text}");
        }
        let fresh = shape.config();
        assert_eq!(fresh.net[0].mode, NetMode::Nat);
        assert_eq!(fresh.disks[0].overlay, Overlay::Ephemeral);
        assert_eq!(Shape::of(&fresh, &[4096]), shape);
    }

    #[test]
    fn a_ceiling_only_takes_away() {
        let ceilings = Ceilings {
            disks: Vec::new(),
            nets: vec![NetCeiling {
                egress: allow(&["10.0.0.0/8"]),
                rate_limit: Some(RateLimit {
                    bandwidth: Some(Bytes(100)),
                    ..RateLimit::default()
                }),
                connections: None,
            }],
        };
        let narrowed = |egress: Egress, bandwidth: Option<u64>| {
            let mut config = VmConfig {
                net: vec![NetConfig {
                    egress,
                    rate_limit: bandwidth.map(|it| RateLimit {
                        bandwidth: Some(Bytes(it)),
                        iops: Some(7),
                        ..RateLimit::default()
                    }),
                    ..NetConfig::default()
                }],
                ..VmConfig::default()
            };
            ceilings.narrow(&mut config).unwrap();
            let net = config.net.remove(0);
            (net.egress, net.rate_limit.unwrap())
        };
        assert_eq!(narrowed(Egress::Full, None).0, allow(&["10.0.0.0/8"]));
        assert_eq!(narrowed(Egress::None, None).0, Egress::None);
        assert_eq!(
            narrowed(allow(&["10.1.0.0/16", "192.0.2.0/24"]), None).0,
            allow(&["10.1.0.0/16"])
        );
        assert_eq!(narrowed(allow(&["192.0.2.0/24"]), None).0, Egress::None);
        assert_eq!(
            narrowed(allow(&["0.0.0.0/0"]), None).0,
            allow(&["10.0.0.0/8"])
        );
        assert_eq!(narrowed(Egress::Full, None).1.bandwidth, Some(Bytes(100)));
        let (_, limit) = narrowed(Egress::Full, Some(200));
        assert_eq!((limit.bandwidth, limit.iops), (Some(Bytes(100)), Some(7)));
        let (_, limit) = narrowed(Egress::Full, Some(50));
        assert_eq!(limit.bandwidth, Some(Bytes(50)));
    }

    #[test]
    fn a_ceiling_opens_no_link_local_addresses() {
        let metadata = allow(&["169.254.169.254/32", "10.0.0.0/8"]);
        let rest = allow(&["10.0.0.0/8"]);
        for asked in [Egress::Full, allow(&["0.0.0.0/0"])] {
            assert_eq!(asked.narrowed_by(&metadata), Ok(rest.clone()), "{asked:?}");
            let only = allow(&["169.254.169.254/32"]);
            assert_eq!(asked.narrowed_by(&only), Ok(Egress::None), "{asked:?}");
        }
        // Whoever forks may name them.
        let named = allow(&["169.254.0.0/16"]);
        let both = allow(&["169.254.169.254/32"]);
        assert_eq!(named.narrowed_by(&metadata), Ok(both));
        assert_eq!(named.narrowed_by(&Egress::Full), Ok(named.clone()));
        assert_eq!(Egress::Full.narrowed_by(&Egress::Full), Ok(Egress::Full));
        assert_eq!(named.narrowed_by(&Egress::None), Ok(Egress::None));
    }

    #[test]
    fn what_two_policies_allow_is_refused_where_it_cannot_be_said() {
        let networks = |first: u8| (0..63).map(move |n| format!("{first}.{n}.0.0/16"));
        let one: Vec<String> = networks(10).chain(["11.0.0.0/8".into()]).collect();
        let other: Vec<String> = networks(11).chain(["10.0.0.0/8".into()]).collect();
        let policy = |texts: &[String]| {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            allow(&texts)
        };
        let both = policy(&one).intersection(&policy(&other));
        assert_eq!(both, Err(TooManyNetworks));
    }
}
