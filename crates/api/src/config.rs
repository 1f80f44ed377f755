//! The description of a VM: one type from flags, from a TOML file and over the control socket.
//!
//! Every field has a default, so that flags can be laid over a file; what is missing or does not
//! fit together is told by [`crate::validate`]. Unknown fields are refused.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Ipv4Network, MacAddr};

/// A virtual machine as its owner describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Its name, unique on the host: letters, digits, `-`, `_` and `.`, at most 48. `clone run`
    /// invents one where it is empty.
    pub name: String,
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u32,
    /// RAM, a whole number of MiB.
    pub memory: Bytes,
    /// The guest's kernel on the host: a bzImage or an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. Where it is not given, one is made that suits the devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Words added at the end of the command line, given or made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Disks; the first is `/dev/vda`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces; the first is `eth0`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Directories of the host that the guest mounts by virtio-fs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
    /// The socket device through which the host reaches the guest's agent.
    pub vsock: VsockConfig,
    /// The memory balloon.
    pub balloon: BalloonConfig,
    /// Whether the guest gets a source of random numbers.
    pub rng: bool,
    /// The serial console.
    pub console: ConsoleConfig,
    /// What a reboot of the guest does.
    #[serde(skip_serializing_if = "OnReboot::is_default")]
    pub on_reboot: OnReboot,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            vcpus: 1,
            memory: Bytes::mib(512),
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: None,
            append: None,
            disks: Vec::new(),
            net: Vec::new(),
            shares: Vec::new(),
            vsock: VsockConfig::default(),
            balloon: BalloonConfig::default(),
            rng: true,
            console: ConsoleConfig::default(),
            on_reboot: OnReboot::default(),
        }
    }
}

/// Has a kernel wake for work alone: with these an idle guest wakes some fourteen times less often,
/// and a thousand idle guests are most of what a host can hold. The time-stamp counter and lockups
/// are watched by the host, which alone knows how long it kept a guest waiting; pressure averages
/// are counted every two seconds; and compaction ahead of need moves pages, each of which a clone
/// then has to itself. Who wants one of them back appends its opposite, as `psi=1`: the last counts.
const IDLE_IS_IDLE: &str = "tsc=nowatchdog nowatchdog psi=0 sysctl.vm.compaction_proactiveness=0";

impl VmConfig {
    /// The command line that the kernel gets.
    ///
    /// The made one names the serial console, has a kernel that panics ask for a warm reset (by
    /// which the VM's process knows a panic, and ends), skips probing for hardware that the machine
    /// does not have, keeps an idle guest from waking ([`IDLE_IS_IDLE`]), and names the first disk
    /// as the root.
    pub fn kernel_cmdline(&self) -> String {
        let mut line = match &self.cmdline {
            Some(given) => given.clone(),
            None => self.made_cmdline(),
        };
        // The guest's agent reads these; others pass over them.
        for share in &self.shares {
            if let Some(mount) = &share.mount {
                line.push_str(&format!(" {MOUNT_WORD}={}:{mount}", share.tag));
            }
        }
        if let Some(more) = self.append.as_deref().filter(|more| !more.is_empty()) {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(more);
        }
        line
    }

    fn made_cmdline(&self) -> String {
        let mut line = String::from(
            "console=ttyS0 panic=-1 reboot=panic_warm i8042.noaux i8042.nokbd i8042.nomux i8042.nopnp \
             8250.nr_uarts=1 random.trust_cpu=on net.ifnames=0 ",
        );
        line.push_str(IDLE_IS_IDLE);
        if let Some(root) = self.disks.first() {
            let mode = if root.read_only { "ro" } else { "rw" };
            line.push_str(" root=/dev/vda ");
            line.push_str(mode);
        }
        line
    }
}

/// The parameter on the kernel's command line by which the guest's agent mounts a share:
/// `clone.mount=TAG:/PATH`.
pub const MOUNT_WORD: &str = "clone.mount";

/// A directory of the host that the guest mounts by virtio-fs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ShareConfig {
    /// The directory on the host.
    pub path: PathBuf,
    /// The name by which the guest mounts it: letters, digits, `-`, `_` and `.`, at most 36.
    pub tag: String,
    /// Whether the guest may only read.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Where the guest's agent mounts it when the guest boots; nowhere if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
    /// The guest's user and group that the directory's owner appears as; root if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<GuestOwner>,
}

/// A user and a group of the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GuestOwner {
    /// The user's number.
    pub user: u32,
    /// The group's number.
    pub group: u32,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// The image or block device on the host.
    pub path: PathBuf,
    /// How the image is written. Where it is not given, name and content must agree on it: a
    /// guest could turn its raw disk into one that names other files, so content alone is not
    /// trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The backing files of a qcow2 image, the nearest first. Those that an image itself names are never opened.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingConfig>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Where the guest's writes go.
    pub overlay: Overlay,
    /// How fast the guest may read and write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
}

/// A file that a qcow2 image lies over. It is only read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct BackingConfig {
    /// The image on the host.
    pub path: PathBuf,
    /// How it is written; where it is not given, name and content must agree on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
}

/// How a disk image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Bytes as the guest sees them.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// Where the writes to a disk go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Overlay {
    /// Into the image itself.
    #[default]
    None,
    /// Into a layer that ends with the VM; the image is opened for reading only.
    Ephemeral,
    /// Into a layer kept in this file, made where it does not exist; the image is opened for
    /// reading only.
    Kept(PathBuf),
}

/// A limit to the rate of a device, by token buckets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bytes>,
    /// Bytes that may go at once after a rest; a tenth of a second's worth where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Bytes>,
    /// Operations a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Operations that may go at once after a rest; a tenth of a second's worth where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// What it is connected to.
    pub mode: NetMode,
    /// The tap of mode `tap`, which must exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The bridge of mode `bridge`, which must exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The guest's hardware address; a random one where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Pairs of queues, 1 to 8; one where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Whether the host's kernel moves the packets.
    pub vhost: Vhost,
    /// Whether the guest may reach others on the same bridge that may do so too.
    pub neighbours: bool,
    /// Whether the guest may open connections to the host's own addresses, in mode `nat`. Otherwise
    /// only name servers and DHCP are open there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reach_host: bool,
    /// Whom the guest may send to. Forks of it are held to the same.
    #[serde(skip_serializing_if = "Egress::is_full")]
    pub egress: Egress,
    /// The only addresses that the guest may use on a bridge of mode `bridge`; any if there are
    /// none. With addresses given and no IPv6 one among them it has no IPv6.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The most connections that the guest may have in the host's table, in mode `nat`; 4096 where
    /// it is not given. More of them fail until others have ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// How fast packets may go, each direction by itself. With a limit they go through the VM's
    /// process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
}

impl NetConfig {
    /// The most connections of a guest that nothing else was said for.
    pub const DEFAULT_CONNECTIONS: u32 = 4096;
    /// The most addresses that an interface can be held to.
    pub const MAX_ADDRESSES: usize = 16;
    /// The most connections that can be allowed: each new one costs the host a look at all others.
    pub const MAX_CONNECTIONS: u32 = 65_536;
}

/// Whom a guest may send to, over an interface whose tap is ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// Everybody.
    #[default]
    Full,
    /// Nobody: only ARP leaves the guest. What the host's agent connection carries is not held.
    None,
    /// IPv4 addresses in these networks and nobody else, name servers among it.
    Allow(Vec<Ipv4Network>),
}

impl Egress {
    /// The most networks that can be allowed.
    pub const MAX_NETWORKS: usize = 64;

    /// Whether nothing is held back.
    pub fn is_full(&self) -> bool {
        *self == Self::Full
    }
}

/// What a network interface is connected to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum NetMode {
    /// A bridge of our own with addresses and translation to the host's network, made with the
    /// first VM that asks and removed with the last.
    #[default]
    Nat,
    /// A tap of ours on a bridge of the owner's.
    Bridge,
    /// A tap of the owner's.
    Tap,
}

/// Who moves the packets between a tap and the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// The host's kernel where `/dev/vhost-net` is there, else the VM's process.
    #[default]
    Auto,
    /// The host's kernel, or the VM does not start.
    On,
    /// The VM's process.
    Off,
}

/// The socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct VsockConfig {
    /// Whether the guest has it. Without it there is no `exec`, `shell` or `cp`.
    pub enabled: bool,
    /// The guest's address, 3 or more. Addresses need not be unique on a host: each VM has its
    /// own Unix socket.
    pub cid: u32,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            cid: 3,
        }
    }
}

/// The memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Whether the guest has it.
    pub enabled: bool,
    /// How much of the guest's RAM it holds from the start.
    pub size: Bytes,
    /// Whether the guest gives memory back by itself when a process fails to get some.
    pub deflate_on_oom: bool,
    /// Whether the guest reports pages that it no longer uses, for the host to take back.
    pub free_page_reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            size: Bytes(0),
            deflate_on_oom: true,
            free_page_reporting: true,
        }
    }
}

/// The serial console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// How much of the console's output is kept, 4 KiB or more; 0 keeps none.
    pub log_limit: Bytes,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            log_limit: Bytes::mib(1),
        }
    }
}

/// What a reboot of the guest does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// The guest boots again in the same VM: same name, sockets, disks with their content,
    /// network. Its RAM is fresh.
    #[default]
    Restart,
    /// The VM ends.
    Stop,
}

impl OnReboot {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_flags_can_say() {
        let config: VmConfig = toml::from_str(
            r#"
            name = "web"
            vcpus = 2
            memory = "1G"
            kernel = "/boot/vmlinuz"
            append = "quiet"

            [[disks]]
            path = "root.qcow2"
            format = "qcow2"
            overlay = "ephemeral"

            [[disks]]
            path = "data.raw"
            overlay = { kept = "data.layer" }
            rate_limit = { bandwidth = "10M", iops = 500 }

            [[net]]
            mode = "tap"
            tap = "tap7"
            mac = "02:c1:00:00:00:07"

            [console]
            log_limit = "64K"
            "#,
        )
        .unwrap();
        assert_eq!(config.memory, Bytes::gib(1));
        assert_eq!(config.disks[0].format, Some(DiskFormat::Qcow2));
        assert_eq!(config.disks[1].overlay, Overlay::Kept("data.layer".into()));
        assert_eq!(config.net[0].mode, NetMode::Tap);
        assert_eq!(config.console.log_limit, Bytes::kib(64));
        assert!(config.rng && config.vsock.enabled && config.balloon.enabled);
    }

    #[test]
    fn a_config_survives_json_and_toml() {
        let config = VmConfig {
            name: "a".into(),
            kernel: "k".into(),
            disks: vec![DiskConfig {
                overlay: Overlay::Kept("o".into()),
                ..DiskConfig::default()
            }],
            net: vec![NetConfig::default()],
            ..VmConfig::default()
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config);
        let toml = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&toml).unwrap(), config);
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        for text in ["vcpu = 2", "[[disks]]\npth = \"x\"", "[vsock]\nport = 1"] {
            let error = toml::from_str::<VmConfig>(text).unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{error}");
        }
    }

    #[test]
    fn an_interface_that_holds_nothing_back_is_written_as_ever() {
        let text = |egress| {
            let net = NetConfig {
                egress,
                ..NetConfig::default()
            };
            let text = serde_json::to_string(&net).unwrap();
            assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), net);
            text
        };
        assert!(!text(Egress::Full).contains("egress"));
        assert!(text(Egress::None).contains(r#""egress":"none""#));
        let allowed = Egress::Allow(vec!["10.0.0.0/8".parse().unwrap()]);
        assert!(text(allowed).contains(r#""egress":{"allow":["10.0.0.0/8"]}"#));
    }

    #[test]
    fn the_made_command_line_names_the_first_disk_as_root() {
        let mut config = VmConfig::default();
        assert!(!config.kernel_cmdline().contains("root="));
        config.disks.push(DiskConfig {
            read_only: true,
            ..DiskConfig::default()
        });
        config.append = Some("quiet".into());
        assert!(config.kernel_cmdline().ends_with("root=/dev/vda ro quiet"));
        config.cmdline = Some("console=hvc0".into());
        assert_eq!(config.kernel_cmdline(), "console=hvc0 quiet");
    }
}
