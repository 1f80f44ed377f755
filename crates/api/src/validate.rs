//! Finds all problems of a VM's description or of a machine's shape at once.
//!
//! Each rule is written once and applied at every border: by the command line to a user's
//! description, by the template store to shapes that it writes, reads or receives, by a fork to the
//! description that it makes of a shape, and by the VM's process to the document of its launcher.
//!
//! The rules use only the description itself. The launcher checks whether files exist and whether
//! the host has the requested features.

use std::collections::HashSet;
use std::path::Path;

use crate::config::{
    DiskConfig, DiskFormat, Egress, NetConfig, NetMode, Overlay, RateLimit, ShareConfig, Vhost,
    VmConfig,
};
use crate::shape::{Ceilings, DISK_QUEUES, Shape};
use crate::units::Bytes;

/// The most vCPUs of a VM.
pub const MAX_VCPUS: u32 = 32;
/// The longest name of a VM: its directory and its sockets must fit a Unix socket's address.
pub const MAX_NAME: usize = 48;
/// The longest command line that Linux on x86-64 takes, without its terminator.
pub const MAX_CMDLINE: usize = 2047;
/// The least RAM in which a Linux guest can decompress itself.
pub const MIN_MEMORY: Bytes = Bytes::mib(16);
/// The most RAM, which fits the smallest physical address space of a 64-bit host.
pub const MAX_MEMORY: Bytes = Bytes::gib(32 << 10);
/// The largest disk, in bytes.
pub const MAX_DISK: Bytes = Bytes::gib(64 << 10);
/// The most pairs of queues of an interface.
pub const MAX_QUEUE_PAIRS: u16 = 8;
/// The most disks, interfaces and shares together: the slots of the PCI bus that no other device uses.
pub const MAX_DEVICES: usize = 24;
/// The most shared directories of a VM.
pub const MAX_SHARES: usize = 8;
/// The longest tag of a shared directory (VIRTIO 1.3, 5.11.4).
pub const MAX_TAG: usize = 36;
/// The longest name of a network interface on Linux.
const MAX_INTERFACE_NAME: usize = 15;

/// A problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The field, as in `disks[1].overlay`.
    pub field: String,
    /// The problem, and how to correct it.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Collects problems.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn check(&mut self, right: bool, field: impl Into<String>, message: impl Into<String>) {
        if !right {
            self.0.push(Problem {
                field: field.into(),
                message: message.into(),
            });
        }
    }
}

/// Whether `name` is a valid name of a VM, which becomes a directory and a part of socket paths.
pub fn is_valid_name(name: &str) -> bool {
    let head = name
        .bytes()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = name
        .bytes()
        .all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c));
    head && rest && name.len() <= MAX_NAME
}

/// All problems of `config`; empty if there are none.
pub fn validate(config: &VmConfig) -> Vec<Problem> {
    let mut problems = Problems::default();
    name(config, &mut problems);
    description(config, &mut problems);
    problems.0
}

/// All problems of a description whose VM gets its name later, as a standby does.
pub fn validate_unnamed(config: &VmConfig) -> Vec<Problem> {
    let mut problems = Problems::default();
    description(config, &mut problems);
    problems.0
}

/// All problems of a shape and its ceilings; empty if there are none.
pub fn validate_shape(shape: &Shape, ceilings: &Ceilings) -> Vec<Problem> {
    let mut problems = Problems::default();
    machine(shape.vcpus, shape.memory, &mut problems);
    if let Some(vsock) = &shape.vsock {
        vsock_cid(vsock.cid, &mut problems);
    }
    cmdline(&shape.cmdline, &mut problems);
    devices(
        shape.disks.len(),
        shape.nets.len(),
        shape.shares.len(),
        &mut problems,
    );
    tags(shape.shares.iter().map(|share| &*share.tag), &mut problems);
    for (index, disk) in shape.disks.iter().enumerate() {
        problems.check(
            disk.bytes <= MAX_DISK,
            format!("disks[{index}].bytes"),
            format!("{} is more than {MAX_DISK}", disk.bytes),
        );
        problems.check(
            disk.queues == DISK_QUEUES,
            format!("disks[{index}].queues"),
            format!("{} is not {DISK_QUEUES}", disk.queues),
        );
    }
    for (index, net) in shape.nets.iter().enumerate() {
        queue_pairs(&format!("nets[{index}]"), net.queues, &mut problems);
    }
    ceilings_of(shape, ceilings, &mut problems);
    problems.0
}

fn ceilings_of(shape: &Shape, ceilings: &Ceilings, problems: &mut Problems) {
    for (field, ceilings, devices) in [
        ("ceilings.disks", ceilings.disks.len(), shape.disks.len()),
        ("ceilings.nets", ceilings.nets.len(), shape.nets.len()),
    ] {
        problems.check(
            ceilings == 0 || ceilings == devices,
            field,
            format!("{ceilings} of them for {devices} devices"),
        );
    }
    for (index, disk) in ceilings.disks.iter().enumerate() {
        let field = format!("ceilings.disks[{index}]");
        rate_limit(&field, disk.rate_limit.as_ref(), problems);
    }
    for (index, net) in ceilings.nets.iter().enumerate() {
        let field = format!("ceilings.nets[{index}]");
        egress(&field, &net.egress, problems);
        connections(&field, net.connections, problems);
        rate_limit(&field, net.rate_limit.as_ref(), problems);
    }
}

fn name(config: &VmConfig, problems: &mut Problems) {
    problems.check(
        is_valid_name(&config.name),
        "name",
        format!(
            "`{}` cannot be a name: use letters, digits, `-`, `_` and `.`, a letter or digit first, at most {MAX_NAME}",
            config.name.escape_debug()
        ),
    );
}

fn description(config: &VmConfig, problems: &mut Problems) {
    machine(config.vcpus, config.memory, problems);
    problems.check(
        !config.kernel.as_os_str().is_empty(),
        "kernel",
        "not given: name a bzImage or an ELF vmlinux, as in /boot/vmlinuz",
    );
    for (field, path) in [
        ("kernel", Some(&config.kernel)),
        ("initrd", config.initrd.as_ref()),
    ] {
        problems.check(
            path.is_none_or(|path| path.to_str().is_some()),
            field,
            "the path is not UTF-8, and descriptions are text: rename the file, or name it by a link",
        );
    }
    vsock_cid(config.vsock.cid, problems);
    problems.check(
        config.balloon.size.0.is_multiple_of(4096) && config.balloon.size < config.memory,
        "balloon.size",
        format!(
            "{} must be a multiple of 4096 and less than the memory",
            config.balloon.size
        ),
    );
    let limit = config.console.log_limit;
    problems.check(
        limit.0 == 0 || (Bytes::kib(4)..=Bytes::gib(1)).contains(&limit),
        "console.log_limit",
        format!("{limit} is neither 0 nor between 4K and 1G"),
    );
    cmdline(&config.kernel_cmdline(), problems);
    for (index, disk) in config.disks.iter().enumerate() {
        one_disk(&format!("disks[{index}]"), disk, problems);
    }
    shared_disks(config, problems);
    for (index, net) in config.net.iter().enumerate() {
        one_net(&format!("net[{index}]"), net, problems);
    }
    devices(
        config.disks.len(),
        config.net.len(),
        config.shares.len(),
        problems,
    );
    tags(config.shares.iter().map(|share| &*share.tag), problems);
    for (index, share) in config.shares.iter().enumerate() {
        one_share(&format!("shares[{index}]"), share, problems);
    }
}

/// Whether `tag` can be the name of a shared directory, which guests have in mount tables and on
/// their kernel's command line.
pub fn is_valid_tag(tag: &str) -> bool {
    let fits = tag
        .bytes()
        .all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c));
    fits && (1..=MAX_TAG).contains(&tag.len())
}

fn tags<'a>(tags: impl Iterator<Item = &'a str>, problems: &mut Problems) {
    let mut seen = HashSet::new();
    for (index, tag) in tags.enumerate() {
        problems.check(
            is_valid_tag(tag),
            format!("shares[{index}].tag"),
            format!(
                "`{}` cannot be a tag: use letters, digits, `-`, `_` and `.`, at most {MAX_TAG}",
                tag.escape_debug()
            ),
        );
        problems.check(
            seen.insert(tag),
            format!("shares[{index}].tag"),
            "another share has the same tag",
        );
    }
}

fn one_share(field: &str, share: &ShareConfig, problems: &mut Problems) {
    problems.check(
        share.path.is_absolute() && share.path.to_str().is_some(),
        format!("{field}.path"),
        "must be the absolute path of a directory on the host, in UTF-8",
    );
    let is_mount = |mount: &String| {
        let plain = |c: char| c.is_ascii_graphic() && c != '"';
        mount.starts_with('/') && mount.len() <= 255 && mount.chars().all(plain)
    };
    problems.check(
        share.mount.as_ref().is_none_or(is_mount),
        format!("{field}.mount"),
        "must be an absolute path of the guest without spaces, at most 255 bytes long",
    );
}

fn machine(vcpus: u32, memory: Bytes, problems: &mut Problems) {
    problems.check(
        (1..=MAX_VCPUS).contains(&vcpus),
        "vcpus",
        format!("{vcpus} is not between 1 and {MAX_VCPUS}"),
    );
    problems.check(
        (MIN_MEMORY..=MAX_MEMORY).contains(&memory) && memory.0.is_multiple_of(Bytes::mib(1).0),
        "memory",
        format!("{memory} is not a whole number of MiB from {MIN_MEMORY} to {MAX_MEMORY}"),
    );
}

fn vsock_cid(cid: u32, problems: &mut Problems) {
    problems.check(
        cid >= 3 && cid != u32::MAX,
        "vsock.cid",
        format!("{cid} is reserved: use 3 or more"),
    );
}

fn devices(disks: usize, nets: usize, shares: usize, problems: &mut Problems) {
    problems.check(
        disks + nets + shares <= MAX_DEVICES,
        "disks",
        format!("too many: at most {MAX_DEVICES} disks, interfaces and shares together"),
    );
    problems.check(
        shares <= MAX_SHARES,
        "shares",
        format!("too many: at most {MAX_SHARES}"),
    );
}

fn cmdline(line: &str, problems: &mut Problems) {
    problems.check(
        line.len() <= MAX_CMDLINE,
        "cmdline",
        format!("{} bytes long; Linux takes {MAX_CMDLINE}", line.len()),
    );
    problems.check(
        !line.chars().any(char::is_control),
        "cmdline",
        "has a line break or another control character",
    );
}

fn one_disk(field: &str, disk: &DiskConfig, problems: &mut Problems) {
    problems.check(
        !disk.path.as_os_str().is_empty(),
        format!("{field}.path"),
        "not given: name an image or a block device",
    );
    problems.check(
        !disk.read_only || disk.overlay == Overlay::None,
        format!("{field}.overlay"),
        "a disk that is only read has no writes to keep: drop read_only or the overlay",
    );
    problems.check(
        disk.backing.is_empty() || disk.format != Some(DiskFormat::Raw),
        format!("{field}.backing"),
        "only a qcow2 image has backing files: drop them, or set format to qcow2",
    );
    for path in paths(disk) {
        problems.check(
            path.to_str().is_some(),
            field,
            format!(
                "the path {path:?} is not UTF-8, and descriptions are text: rename the file, or \
                 name it by a link"
            ),
        );
    }
    if let Overlay::Kept(layer) = &disk.overlay {
        problems.check(
            !layer.as_os_str().is_empty() && *layer != disk.path,
            format!("{field}.overlay"),
            "must name a file other than the disk itself",
        );
    }
    rate_limit(field, disk.rate_limit.as_ref(), problems);
}

/// Every path of a disk's description.
fn paths(disk: &DiskConfig) -> impl Iterator<Item = &Path> {
    let layer = match &disk.overlay {
        Overlay::Kept(layer) => Some(layer.as_path()),
        Overlay::None | Overlay::Ephemeral => None,
    };
    let backing = disk.backing.iter().map(|image| image.path.as_path());
    std::iter::once(disk.path.as_path())
        .chain(backing)
        .chain(layer)
}

/// Refuses two disks that write to the same file, which would destroy it.
fn shared_disks(config: &VmConfig, problems: &mut Problems) {
    let mut written: HashSet<&Path> = HashSet::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let file = match &disk.overlay {
            Overlay::None if !disk.read_only => disk.path.as_path(),
            Overlay::Kept(layer) => layer.as_path(),
            Overlay::None | Overlay::Ephemeral => continue,
        };
        problems.check(
            written.insert(file) || file.as_os_str().is_empty(),
            format!("disks[{index}]"),
            format!("{} is written by another disk too", file.display()),
        );
    }
}

fn one_net(field: &str, net: &NetConfig, problems: &mut Problems) {
    for (name, value, mode) in [
        ("tap", &net.tap, NetMode::Tap),
        ("bridge", &net.bridge, NetMode::Bridge),
    ] {
        let wanted = net.mode == mode;
        problems.check(
            value.is_some() == wanted,
            format!("{field}.{name}"),
            if wanted {
                format!("mode \"{name}\" needs the name of one")
            } else {
                format!("only mode \"{name}\" has one: set mode = \"{name}\"")
            },
        );
        problems.check(
            value.as_deref().is_none_or(is_interface_name),
            format!("{field}.{name}"),
            format!("not an interface's name: 1 to {MAX_INTERFACE_NAME} bytes, no `/` or spaces"),
        );
    }
    problems.check(
        net.mac.is_none_or(|mac| !mac.is_group() && mac.0 != [0; 6]),
        format!("{field}.mac"),
        "names a group or nothing; the first byte must be even, as in 02:…",
    );
    queue_pairs(field, net.queues.unwrap_or(1), problems);
    problems.check(
        net.rate_limit.is_none() || net.vhost != Vhost::On,
        format!("{field}.vhost"),
        "the host's kernel knows no limits: leave out vhost or rate_limit",
    );
    problems.check(
        net.egress.is_full() || net.mode != NetMode::Tap,
        format!("{field}.egress"),
        "a tap of yours is yours to guard: leave out egress, or use another mode",
    );
    egress(field, &net.egress, problems);
    addresses(field, net, problems);
    problems.check(
        net.connections.is_none() || net.mode == NetMode::Nat,
        format!("{field}.connections"),
        "only mode \"nat\" goes through the host's table of connections: leave it out",
    );
    connections(field, net.connections, problems);
    rate_limit(field, net.rate_limit.as_ref(), problems);
}

fn queue_pairs(field: &str, pairs: u16, problems: &mut Problems) {
    problems.check(
        (1..=MAX_QUEUE_PAIRS).contains(&pairs),
        format!("{field}.queues"),
        format!("not between 1 and {MAX_QUEUE_PAIRS}"),
    );
}

fn egress(field: &str, egress: &Egress, problems: &mut Problems) {
    problems.check(
        !matches!(egress, Egress::Allow(networks) if networks.len() > Egress::MAX_NETWORKS),
        format!("{field}.egress"),
        format!("allows more than {} networks", Egress::MAX_NETWORKS),
    );
}

fn connections(field: &str, limit: Option<u32>, problems: &mut Problems) {
    problems.check(
        limit.is_none_or(|limit| (1..=NetConfig::MAX_CONNECTIONS).contains(&limit)),
        format!("{field}.connections"),
        format!("not between 1 and {}", NetConfig::MAX_CONNECTIONS),
    );
}

fn addresses(field: &str, net: &NetConfig, problems: &mut Problems) {
    problems.check(
        net.addresses.is_empty() || net.mode == NetMode::Bridge,
        format!("{field}.addresses"),
        "only a guest on a bridge of yours is held to addresses of yours: set mode = \"bridge\"",
    );
    problems.check(
        net.addresses.len() <= NetConfig::MAX_ADDRESSES,
        format!("{field}.addresses"),
        format!("more than {}", NetConfig::MAX_ADDRESSES),
    );
    problems.check(
        !net.addresses
            .iter()
            .any(|address| address.is_unspecified() || address.is_multicast()),
        format!("{field}.addresses"),
        "no station can have one of them",
    );
}

fn is_interface_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_INTERFACE_NAME
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|c| c.is_ascii_graphic() && c != b'/' && c != b':')
}

fn rate_limit(field: &str, limit: Option<&RateLimit>, problems: &mut Problems) {
    let Some(limit) = limit else { return };
    let rates = [
        (
            "bandwidth",
            limit.bandwidth.map(|rate| rate.0),
            limit.bandwidth_burst.map(|burst| burst.0),
        ),
        ("iops", limit.iops, limit.iops_burst),
    ];
    for (name, rate, burst) in rates {
        problems.check(
            rate != Some(0) && burst != Some(0),
            format!("{field}.rate_limit.{name}"),
            "0 would stop the device for good: leave it out for no limit",
        );
        problems.check(
            rate.is_some() || burst.is_none(),
            format!("{field}.rate_limit.{name}_burst"),
            format!("a burst needs a rate: set {name} too"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MacAddr;

    fn good() -> VmConfig {
        VmConfig {
            name: "web-1".into(),
            kernel: "/boot/vmlinuz".into(),
            ..VmConfig::default()
        }
    }

    fn fields(config: &VmConfig) -> Vec<String> {
        validate(config).into_iter().map(|p| p.field).collect()
    }

    #[test]
    fn a_plain_config_has_no_problems() {
        assert_eq!(validate(&good()), []);
    }

    #[test]
    fn a_share_has_a_tag_of_its_own_and_a_directory() {
        let share = |tag: &str, path: &str, mount: Option<&str>| ShareConfig {
            path: path.into(),
            tag: tag.into(),
            mount: mount.map(str::to_owned),
            ..ShareConfig::default()
        };
        let problems = |shares: Vec<ShareConfig>| fields(&VmConfig { shares, ..good() });
        let sound = share("src", "/src", Some("/mnt/src"));
        assert_eq!(problems(vec![sound.clone()]), [""; 0]);
        let twice = vec![sound.clone(), share("src", "/b", None)];
        assert_eq!(problems(twice), ["shares[1].tag"]);
        for tag in ["", "a b", "a=b", "a:b", "a,b", "\u{e9}", &"x".repeat(37)] {
            assert_eq!(problems(vec![share(tag, "/src", None)]), ["shares[0].tag"]);
        }
        for path in ["", "src", "./src"] {
            assert_eq!(problems(vec![share("a", path, None)]), ["shares[0].path"]);
        }
        for mount in ["mnt", "/a b", "/a\" init=/x", "/a\n", ""] {
            let problems = problems(vec![share("a", "/a", Some(mount))]);
            let of_mount = problems.iter().any(|it| *it == "shares[0].mount");
            assert!(of_mount, "{mount:?}: {problems:?}");
        }
        let many = (0..9).map(|number| share(&number.to_string(), "/a", None));
        assert_eq!(problems(many.collect()), ["shares"]);
    }

    #[test]
    fn limits_of_an_interface_belong_to_a_mode() {
        let problems = |net: NetConfig| {
            let config = VmConfig {
                net: vec![net],
                ..good()
            };
            fields(&config)
        };
        let bridge = |addresses: &[&str]| NetConfig {
            mode: NetMode::Bridge,
            bridge: Some("br0".into()),
            addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
            ..NetConfig::default()
        };
        let nat = |connections| NetConfig {
            connections: Some(connections),
            ..NetConfig::default()
        };
        assert!(problems(bridge(&["192.0.2.7", "2001:db8::7"])).is_empty());
        assert!(problems(nat(1)).is_empty());
        let addresses = ["net[0].addresses"];
        for wrong in ["0.0.0.0", "224.0.0.1", "::", "ff02::1"] {
            assert_eq!(problems(bridge(&[wrong])), addresses, "{wrong}");
        }
        assert_eq!(problems(bridge(&["192.0.2.7"; 17])), addresses);
        let nowhere = NetConfig {
            addresses: vec!["192.0.2.7".parse().unwrap()],
            ..NetConfig::default()
        };
        assert_eq!(problems(nowhere), addresses);
        let connections = ["net[0].connections"];
        assert_eq!(problems(nat(0)), connections);
        assert_eq!(problems(nat(65_537)), connections);
        let elsewhere = NetConfig {
            connections: Some(1),
            ..bridge(&[])
        };
        assert_eq!(problems(elsewhere), connections);
    }

    #[test]
    fn every_problem_is_listed_with_its_field() {
        let mut config = VmConfig {
            name: "../etc".into(),
            vcpus: 0,
            memory: Bytes(1000),
            append: Some("a\nb".into()),
            disks: vec![DiskConfig {
                read_only: true,
                overlay: Overlay::Ephemeral,
                rate_limit: Some(RateLimit {
                    iops: Some(0),
                    bandwidth_burst: Some(Bytes(1)),
                    ..RateLimit::default()
                }),
                ..DiskConfig::default()
            }],
            net: vec![NetConfig {
                bridge: Some("br/0".into()),
                mac: Some(MacAddr([1, 0, 0, 0, 0, 1])),
                queues: Some(9),
                ..NetConfig::default()
            }],
            ..VmConfig::default()
        };
        config.vsock.cid = 2;
        config.balloon.size = Bytes::gib(1);
        config.console.log_limit = Bytes(1);
        assert_eq!(
            fields(&config),
            [
                "name",
                "vcpus",
                "memory",
                "kernel",
                "vsock.cid",
                "balloon.size",
                "console.log_limit",
                "cmdline",
                "disks[0].path",
                "disks[0].overlay",
                "disks[0].rate_limit.bandwidth_burst",
                "disks[0].rate_limit.iops",
                "net[0].bridge",
                "net[0].bridge",
                "net[0].mac",
                "net[0].queues",
            ]
        );
    }

    #[test]
    fn one_file_is_not_written_by_two_disks_but_may_be_read_by_many() {
        let disk = |read_only| DiskConfig {
            path: "a.img".into(),
            read_only,
            ..DiskConfig::default()
        };
        let mut config = good();
        config.disks = vec![disk(true), disk(false), disk(true)];
        assert!(fields(&config).is_empty());
        config.disks.push(disk(false));
        assert_eq!(fields(&config), ["disks[3]"]);
    }

    #[test]
    fn a_shape_keeps_the_rules_of_a_description() {
        let config = VmConfig {
            net: vec![NetConfig::default()],
            ..good()
        };
        let shape = Shape::of(&config, &[]);
        let none = Ceilings::default();
        assert_eq!(validate_shape(&shape, &none), []);
        let wrong = |change: &dyn Fn(&mut Shape, &mut Ceilings)| {
            let (mut shape, mut ceilings) = (shape.clone(), none.clone());
            change(&mut shape, &mut ceilings);
            let problems = validate_shape(&shape, &ceilings).into_iter();
            problems.map(|it| it.field).collect::<Vec<_>>()
        };
        assert_eq!(wrong(&|it, _| it.vcpus = 33), ["vcpus"]);
        assert_eq!(wrong(&|it, _| it.memory = Bytes(u64::MAX)), ["memory"]);
        assert_eq!(wrong(&|it, _| it.cmdline = "a\nb".into()), ["cmdline"]);
        assert_eq!(wrong(&|it, _| it.nets[0].queues = 9), ["nets[0].queues"]);
        assert_eq!(wrong(&|it, _| it.nets = vec![it.nets[0]; 25]), ["disks"]);
        let none = |_: &mut Shape, it: &mut Ceilings| it.nets = vec![Default::default(); 2];
        assert_eq!(wrong(&none), ["ceilings.nets"]);
    }

    #[test]
    fn names_cannot_leave_their_directory() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            ".hidden",
            "a b",
            "é",
            &"x".repeat(49),
        ] {
            assert!(!is_valid_name(name), "{name}");
        }
        for name in ["a", "0", "web-1.example_x", &"x".repeat(48)] {
            assert!(is_valid_name(name), "{name}");
        }
    }
}
