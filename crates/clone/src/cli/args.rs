//! Flags that describe a VM, and how they lie over a configuration file.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clone_api::config::{
    BackingConfig, DiskConfig, DiskFormat, Egress, NetConfig, NetMode, OnReboot, Overlay, Vhost,
};
use clone_api::jail::RequiredJail;
use clone_api::validate::validate;
use clone_api::{ApiError, Bytes, ErrorCode, VmConfig};

use super::options::{KeyValue, first_and_options, options};
use crate::error::{Result, failed};

/// What a VM is. Flags win over the file; lists of disks or interfaces replace the file's.
#[derive(Debug, Default, clap::Args)]
pub(super) struct VmArgs {
    /// Take the description from this TOML file; flags win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The VM's name; one is invented where it is not given.
    #[arg(long, short)]
    name: Option<String>,
    /// Virtual CPUs, 1 to 32.
    #[arg(long, short = 'c', value_name = "N")]
    cpus: Option<u32>,
    /// RAM, as in 512M or 2G.
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// The kernel: a bzImage or an ELF vmlinux.
    #[arg(long, short, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk.
    #[arg(long, short, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's whole command line, in place of the one that is made.
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Words to add to the kernel's command line.
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
    /// A disk (can be given several times): PATH[,ro][,format=raw|qcow2]
    /// [,backing=FILE[,backing-format=raw|qcow2]…][,overlay=ephemeral|FILE][,bandwidth=SIZE][,iops=N].
    /// A comma in a path is written twice
    #[arg(long = "disk", value_name = "DISK", value_parser = disk_parser())]
    disks: Vec<DiskArg>,
    /// A network interface (can be given several times): nat, bridge=NAME or tap=NAME
    /// [,mac=ADDRESS][,queues=N][,vhost=auto|on|off][,neighbours][,egress=full|none|NETWORK+…]
    /// [,bandwidth=SIZE][,address=ADDRESS+…][,connections=N]
    #[arg(long = "net", value_name = "NET", value_parser = net_parser())]
    nets: Vec<NetArg>,
    /// No socket device: no exec, shell or cp.
    #[arg(long)]
    no_vsock: bool,
    /// No memory balloon.
    #[arg(long)]
    no_balloon: bool,
    /// No source of random numbers.
    #[arg(long)]
    no_rng: bool,
    /// How much of the console's output is kept; 0 keeps none.
    #[arg(long, value_name = "SIZE")]
    console_log: Option<Bytes>,
    /// What a reboot of the guest does: it boots again in the same VM, or the VM ends. (A kernel
    /// that panics ends its VM in any case.)
    #[arg(long, value_name = "WHAT", value_parser = on_reboot_parser())]
    on_reboot: Option<OnReboot>,
}

/// What the jail of a VM must have.
#[derive(Debug, Default, clap::Args)]
pub(super) struct JailArgs {
    /// Refuse to start where the VM's jail would lack a layer, instead of warning: any layer, or
    /// one of those given, of namespaces, user-id, cgroup and landlock, with commas between them.
    #[arg(
        long,
        value_name = "LAYERS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all"
    )]
    require_jail: Option<RequiredJail>,
}

impl JailArgs {
    /// The layers that must be there.
    pub(super) fn required(&self) -> RequiredJail {
        self.require_jail.clone().unwrap_or_default()
    }
}

fn on_reboot_parser() -> impl TypedValueParser<Value = OnReboot> {
    PossibleValuesParser::new(["restart", "stop"]).map(|word| match word.as_str() {
        "stop" => OnReboot::Stop,
        _ => OnReboot::Restart,
    })
}

/// `--disk`.
#[derive(Debug, Clone)]
struct DiskArg(DiskConfig);

/// `--net`.
#[derive(Debug, Clone)]
pub(super) struct NetArg(NetConfig);

impl NetArg {
    /// What it says.
    pub(super) fn config(&self) -> &NetConfig {
        &self.0
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> std::result::Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{key}={value}: not a number"))
}

fn size(value: &str) -> std::result::Result<Option<Bytes>, String> {
    value
        .parse()
        .map(Some)
        .map_err(|error: clone_api::units::UnitError| error.to_string())
}

impl DiskArg {
    fn parse(text: &OsStr) -> std::result::Result<Self, String> {
        let (path, rest) = first_and_options(text);
        let mut disk = DiskConfig {
            path: path.into(),
            ..DiskConfig::default()
        };
        for option in rest {
            disk_option(&mut disk, &option)?;
        }
        Ok(Self(disk))
    }
}

fn disk_option(disk: &mut DiskConfig, option: &KeyValue) -> std::result::Result<(), String> {
    let limit = &mut disk.rate_limit;
    match (option.key.as_str(), &option.value) {
        ("ro", None) => disk.read_only = true,
        ("format", Some(_)) => disk.format = Some(disk_format(option)?),
        ("backing", Some(_)) => disk.backing.push(BackingConfig {
            path: option.path()?,
            format: None,
        }),
        ("backing-format", Some(_)) => {
            let nearest = disk.backing.last_mut();
            nearest
                .ok_or("backing-format stands after its backing=FILE")?
                .format = Some(disk_format(option)?);
        }
        ("overlay", Some(word)) if word == "none" => disk.overlay = Overlay::None,
        ("overlay", Some(word)) if word == "ephemeral" => disk.overlay = Overlay::Ephemeral,
        ("overlay", Some(_)) => disk.overlay = Overlay::Kept(option.path()?),
        ("bandwidth", Some(_)) => limit.get_or_insert_default().bandwidth = size(option.text()?)?,
        ("iops", Some(_)) => {
            limit.get_or_insert_default().iops = Some(number("iops", option.text()?)?);
        }
        _ => {
            return Err(format!(
                "`{option}` is no option of a disk: there are ro, format=raw|qcow2, backing=FILE, backing-format=raw|qcow2, overlay=ephemeral|FILE, bandwidth=SIZE, iops=N; a comma in a file's name is written twice"
            ));
        }
    }
    Ok(())
}

fn disk_format(option: &KeyValue) -> std::result::Result<DiskFormat, String> {
    match option.text()? {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(format!(
            "`{option}`: disks are raw or qcow2; others are converted with: qemu-img convert -O qcow2 FILE NEW"
        )),
    }
}

impl NetArg {
    fn parse(text: &OsStr) -> std::result::Result<Self, String> {
        if text.is_empty() {
            return Err(no_net_option(""));
        }
        let mut net = NetConfig::default();
        for option in options(text) {
            let value = option.text()?;
            match (option.key.as_str(), value) {
                ("nat", "") => net.mode = NetMode::Nat,
                ("bridge", name) => {
                    net.mode = NetMode::Bridge;
                    net.bridge = Some(name.into());
                }
                ("tap", name) => {
                    net.mode = NetMode::Tap;
                    net.tap = Some(name.into());
                }
                ("mac", mac) => {
                    let mac = mac.parse();
                    net.mac =
                        Some(mac.map_err(|error: clone_api::units::UnitError| error.to_string())?);
                }
                ("queues", count) => net.queues = Some(number("queues", count)?),
                ("vhost", "auto") => net.vhost = Vhost::Auto,
                ("vhost", "on") => net.vhost = Vhost::On,
                ("vhost", "off") => net.vhost = Vhost::Off,
                ("neighbours", "") => net.neighbours = true,
                ("egress", whom) => net.egress = egress(whom)?,
                ("address", list) => net.addresses = addresses(list)?,
                ("connections", count) => net.connections = Some(number("connections", count)?),
                ("bandwidth", rate) => {
                    net.rate_limit.get_or_insert_default().bandwidth = size(rate)?;
                }
                _ => return Err(no_net_option(&option.to_string())),
            }
        }
        Ok(Self(net))
    }
}

fn no_net_option(option: &str) -> String {
    format!(
        "`{option}` is no option of an interface: there are nat, bridge=NAME, tap=NAME, mac=ADDRESS, queues=N, vhost=auto|on|off, neighbours, egress=full|none|NETWORK+NETWORK…, bandwidth=SIZE, address=ADDRESS+ADDRESS…, connections=N"
    )
}

/// `--disk` and `--net` are read as bytes: paths need not be text.
fn disk_parser() -> impl TypedValueParser<Value = DiskArg> {
    OsStringValueParser::new().try_map(|text| DiskArg::parse(&text))
}

pub(super) fn net_parser() -> impl TypedValueParser<Value = NetArg> {
    OsStringValueParser::new().try_map(|text| NetArg::parse(&text))
}

/// Whom a guest may send to: `full`, `none`, or networks with `+` between them.
fn egress(text: &str) -> std::result::Result<Egress, String> {
    let network = |word: &str| {
        word.parse()
            .map_err(|error: clone_api::units::UnitError| error.to_string())
    };
    match text {
        "full" => Ok(Egress::Full),
        "none" => Ok(Egress::None),
        networks => Ok(Egress::Allow(
            networks
                .split('+')
                .map(network)
                .collect::<std::result::Result<_, _>>()?,
        )),
    }
}

/// IP addresses with `+` between them.
fn addresses(text: &str) -> std::result::Result<Vec<IpAddr>, String> {
    let address = |word: &str| {
        word.parse()
            .map_err(|_| format!("`{word}` is not an IP address"))
    };
    text.split('+').map(address).collect()
}

impl VmArgs {
    /// The description that file and flags make, with all paths absolute and a name.
    pub(super) fn into_config(self) -> Result<VmConfig> {
        let mut config = match &self.config {
            Some(path) => read_file(path)?,
            None => VmConfig::default(),
        };
        self.lay_over(&mut config);
        if config.name.is_empty() {
            config.name = invent_name();
        }
        absolute_paths(&mut config, Path::new(""))?;
        check(&config)?;
        Ok(config)
    }

    fn lay_over(self, config: &mut VmConfig) {
        fn set<T>(field: &mut T, flag: Option<T>) {
            if let Some(value) = flag {
                *field = value;
            }
        }
        set(&mut config.name, self.name);
        set(&mut config.vcpus, self.cpus);
        set(&mut config.memory, self.memory);
        set(&mut config.kernel, self.kernel);
        set(&mut config.console.log_limit, self.console_log);
        set(&mut config.on_reboot, self.on_reboot);
        config.initrd = self.initrd.or(config.initrd.take());
        config.cmdline = self.cmdline.or(config.cmdline.take());
        config.append = self.append.or(config.append.take());
        if !self.disks.is_empty() {
            config.disks = self.disks.into_iter().map(|disk| disk.0).collect();
        }
        if !self.nets.is_empty() {
            config.net = self.nets.into_iter().map(|net| net.0).collect();
        }
        config.vsock.enabled &= !self.no_vsock;
        config.balloon.enabled &= !self.no_balloon;
        config.rng &= !self.no_rng;
    }
}

/// Reads a file; its relative paths are relative to where it is.
fn read_file(path: &Path) -> Result<VmConfig> {
    let text = std::fs::read_to_string(path).map_err(failed("read the configuration", path))?;
    let mut config: VmConfig = toml::from_str(&text).map_err(|error| {
        ApiError::new(
            ErrorCode::InvalidConfig,
            format!("{}: {error}", path.display()),
        )
    })?;
    let base = path.parent().unwrap_or(Path::new(""));
    absolute_paths(&mut config, base)?;
    Ok(config)
}

/// Makes paths absolute: the VM's process has no working directory to speak of.
fn absolute_paths(config: &mut VmConfig, base: &Path) -> Result<()> {
    let mut paths: Vec<&mut PathBuf> = vec![&mut config.kernel];
    paths.extend(&mut config.initrd);
    for disk in &mut config.disks {
        paths.push(&mut disk.path);
        paths.extend(disk.backing.iter_mut().map(|image| &mut image.path));
        if let Overlay::Kept(layer) = &mut disk.overlay {
            paths.push(layer);
        }
    }
    for path in paths {
        // What is not given stays so, for validation to tell.
        if !path.as_os_str().is_empty() {
            *path = std::path::absolute(base.join(&*path)).map_err(failed("find", path))?;
        }
    }
    Ok(())
}

/// All that is wrong, in one error.
fn check(config: &VmConfig) -> Result<()> {
    let problems = validate(config);
    if problems.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = problems.iter().map(|p| format!("  {p}")).collect();
    Err(ApiError::new(
        ErrorCode::InvalidConfig,
        format!("the VM cannot be made like this:\n{}", list.join("\n")),
    )
    .advise("`clone run --help` tells the flags"))
}

/// A name that nobody else has, most likely; the runtime directory makes sure.
fn invent_name() -> String {
    let mut random = [0; 3];
    // An empty answer leaves zeros, which are a name too.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    format!("vm-{:02x}{:02x}{:02x}", random[0], random[1], random[2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        vm: VmArgs,
    }

    fn parse(flags: &[&str]) -> VmArgs {
        let line = std::iter::once("clone").chain(flags.iter().copied());
        Line::try_parse_from(line).unwrap().vm
    }

    #[test]
    fn flags_win_over_the_file_and_the_rest_of_it_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm.toml");
        std::fs::write(
            &file,
            "name = \"a\"\nvcpus = 4\nmemory = \"1G\"\nkernel = \"vmlinuz\"\ninitrd = \"/i\"\n\
             [[disks]]\npath = \"one\"\n[[disks]]\npath = \"two\"\n",
        )
        .unwrap();
        let file_flag = file.to_str().unwrap();
        let config = parse(&[
            "--config",
            file_flag,
            "-c",
            "2",
            "--disk",
            "/three,ro",
            "--no-rng",
            "--on-reboot",
            "stop",
        ])
        .into_config()
        .unwrap();
        assert_eq!((config.vcpus, config.memory), (2, Bytes::gib(1)));
        assert_eq!(config.kernel, dir.path().join("vmlinuz"));
        assert_eq!(config.disks.len(), 1);
        assert!(config.disks[0].read_only && !config.rng);
        assert_eq!(config.on_reboot, OnReboot::Stop);
    }

    #[test]
    fn all_problems_are_told_at_once_by_their_fields() {
        let error = parse(&[
            "--cpus", "0", "--memory", "1K", "--disk", "a", "--disk", "a",
        ])
        .into_config()
        .unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        for field in ["vcpus:", "memory:", "kernel:", "disks[1]:"] {
            assert!(error.message.contains(field), "{field}: {}", error.message);
        }
    }

    #[test]
    fn a_mistake_in_the_file_is_told_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm.toml");
        std::fs::write(&file, "vcpus = 1\nmemori = \"1G\"\n").unwrap();
        let error = parse(&["--config", file.to_str().unwrap()])
            .into_config()
            .unwrap_err();
        assert!(error.message.contains("line 2"), "{}", error.message);
        assert!(error.message.contains("memori"), "{}", error.message);
    }

    fn disk(text: &str) -> std::result::Result<DiskConfig, String> {
        DiskArg::parse(OsStr::new(text)).map(|disk| disk.0)
    }

    fn net(text: &str) -> std::result::Result<NetConfig, String> {
        NetArg::parse(OsStr::new(text)).map(|net| net.0)
    }

    #[test]
    fn disks_and_interfaces_say_everything_in_one_word() {
        let disk = disk("/a=b,format=qcow2,overlay=/o,bandwidth=10M,iops=7").unwrap();
        assert_eq!(disk.path, Path::new("/a=b"));
        assert_eq!(disk.overlay, Overlay::Kept("/o".into()));
        assert_eq!(disk.rate_limit.unwrap().iops, Some(7));
        let tap = net("tap=t0,mac=02:00:00:00:00:01,queues=2,vhost=off").unwrap();
        assert_eq!((tap.mode, tap.queues), (NetMode::Tap, Some(2)));
        let egress = |word: &str| net(word).map(|net| net.egress);
        assert_eq!(egress("nat,egress=none"), Ok(Egress::None));
        let allowed = ["10.0.0.0/8", "192.0.2.1"].map(|it| it.parse().unwrap());
        assert_eq!(
            egress("nat,egress=10.0.0.0/8+192.0.2.1"),
            Ok(Egress::Allow(allowed.into()))
        );
        assert!(egress("nat,egress=10.0.0.1/8").is_err());
        let held = net("bridge=br0,address=192.0.2.7+2001:db8::7").unwrap();
        let addresses: [IpAddr; 2] = ["192.0.2.7", "2001:db8::7"].map(|it| it.parse().unwrap());
        assert_eq!(held.addresses, addresses);
        assert_eq!(net("nat,connections=99").unwrap().connections, Some(99));
    }

    #[test]
    fn wrong_words_of_disks_and_interfaces_are_refused() {
        for wrong in [
            "a,rw",
            "a,format=vmdk",
            "a,iops=x",
            "a,bandwidth=",
            "a,overlay=",
            "a,backing=",
            "a,backing-format=raw",
        ] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
        for wrong in [
            "",
            "nat,mac=x",
            "wifi",
            "nat,vhost=maybe",
            "bridge=b,address=x",
            "nat,connections=-1",
        ] {
            assert!(net(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_disk_may_have_any_path_and_backing_files() {
        let disk = disk("/a,,b =c,backing=/base,,1,backing=/base 2,backing-format=raw,ro").unwrap();
        assert_eq!(disk.path, Path::new("/a,b =c"));
        let formats: Vec<_> = disk
            .backing
            .iter()
            .map(|it| (it.path.clone(), it.format))
            .collect();
        let expected: [(PathBuf, _); 2] = [
            ("/base,1".into(), None),
            ("/base 2".into(), Some(DiskFormat::Raw)),
        ];
        assert_eq!(formats, expected);
        assert!(disk.read_only);
        // What was meant as one path and was not escaped is told how.
        let error = DiskArg::parse(OsStr::new("/a,b")).unwrap_err();
        assert!(error.contains("written twice"), "{error}");
    }

    #[test]
    fn a_path_that_is_not_utf8_is_told_by_its_field() {
        use std::os::unix::ffi::OsStrExt;
        let line = ["clone", "-k", "/k", "--disk"].map(OsStr::new);
        let line = line.into_iter().chain([OsStr::from_bytes(b"/n\xff.img")]);
        let vm = Line::try_parse_from(line).unwrap().vm;
        let error = vm.into_config().unwrap_err();
        assert!(error.message.contains("disks[0]"), "{}", error.message);
        assert!(error.message.contains("UTF-8"), "{}", error.message);
    }

    #[test]
    fn invented_names_are_valid_and_differ() {
        let names: std::collections::HashSet<_> = (0..50).map(|_| invent_name()).collect();
        assert!(names.len() > 40);
        assert!(names.iter().all(|n| clone_api::validate::is_valid_name(n)));
    }
}
