//! Makes a merged tree bootable as a guest: the agent, an init, and the few files that give a machine its identity.
//!
//! A tree with systemd gets the agent as a service. Any other (container images have no init, or one that starts
//! services which are not there) gets the agent as `/sbin/init`: it is then PID 1.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::kernel::Elf;
use crate::source::ImageConfig;
use crate::tree::{Content, Kind, Meta, Node, Tree};
use crate::{ImageError, Result};

/// Where the agent lies in every guest.
pub const AGENT_PATH: &str = "/usr/local/bin/clone-agent";
/// Where the guest's agent finds how its image's program is to be run: an [`ImageDescription`] as JSON.
pub const IMAGE_DESCRIPTION_PATH: &str = "/etc/clone/image.json";
const UNIT_PATH: &str = "/etc/systemd/system/clone-agent.service";
const UNIT: &str = "\
[Unit]
Description=Clone guest agent
DefaultDependencies=no
After=systemd-remount-fs.service
Before=shutdown.target
Conflicts=shutdown.target

[Service]
ExecStart=/usr/local/bin/clone-agent
Restart=always
RestartSec=1
OOMScoreAdjust=-900
TasksMax=infinity
LimitNOFILE=1048576

[Install]
WantedBy=sysinit.target
";

/// What becomes PID 1 in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The image's systemd, with the agent as a service; the agent itself if there is no systemd.
    #[default]
    Auto,
    /// The image's own init, whatever it is.
    Image,
    /// The agent, even if the image has an init.
    Agent,
}

/// What PID 1 turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FoundInit {
    /// systemd, with the agent as its service.
    Systemd,
    /// The agent.
    Agent,
    /// Some other init of the image; nothing starts the agent.
    Other,
    /// Nothing: the image cannot boot by itself.
    None,
}

/// The contents of [`IMAGE_DESCRIPTION_PATH`]. Fields are only ever added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDescription {
    /// 1.
    pub format: u32,
    /// What the image was built from, for people.
    pub source: String,
    /// What PID 1 is.
    pub init: FoundInit,
    /// How the image's program is to be run; empty for images that are not containers.
    #[serde(flatten)]
    pub config: ImageConfig,
}

/// What a guest is given.
#[derive(Clone, Debug)]
pub(crate) struct Outfit<'a> {
    pub(crate) agent: Option<&'a Path>,
    pub(crate) init: Init,
    pub(crate) hostname: &'a str,
    pub(crate) nameservers: &'a [IpAddr],
    pub(crate) label: &'a str,
    pub(crate) source: String,
    pub(crate) config: ImageConfig,
    pub(crate) created: i64,
}

/// Fits a tree out.
pub(crate) fn fit_out(tree: &mut Tree, outfit: &Outfit<'_>) -> Result<FoundInit> {
    check_hostname(outfit.hostname)?;
    let mut fitting = Fitting {
        tree,
        mtime: outfit.created,
    };
    for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/etc"] {
        fitting.dir(dir, if dir == "/tmp" { 0o1777 } else { 0o755 })?;
    }
    if let Some(agent) = outfit.agent {
        check_agent(agent)?;
        let mut content = Node {
            meta: Meta::root(0o755, outfit.created),
            kind: Kind::File(Content::host(agent)?),
        };
        content.meta.mtime = outfit.created;
        fitting.tree.put_at(AGENT_PATH, content)?;
    }
    let init = fitting.init(outfit)?;
    fitting.identity(outfit)?;
    let description = ImageDescription {
        format: 1,
        source: outfit.source.clone(),
        init,
        config: outfit.config.clone(),
    };
    let mut json = serde_json::to_vec_pretty(&description)
        .map_err(|e| ImageError::malformed("the image's description", e))?;
    json.push(b'\n');
    fitting.file(IMAGE_DESCRIPTION_PATH, 0o644, json)?;
    Ok(init)
}

struct Fitting<'a> {
    tree: &'a mut Tree,
    mtime: i64,
}

impl Fitting<'_> {
    fn file(&mut self, path: &str, mode: u16, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let kind = Kind::File(Content::Bytes(Arc::from(bytes.into())));
        self.tree.put_at(
            path,
            Node {
                meta: Meta::root(mode, self.mtime),
                kind,
            },
        )?;
        Ok(())
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let kind = Kind::Symlink(target.as_bytes().to_vec());
        self.tree.put_at(
            path,
            Node {
                meta: Meta::root(0o777, self.mtime),
                kind,
            },
        )?;
        Ok(())
    }

    /// Makes a directory unless there is one, or a link to one.
    fn dir(&mut self, path: &str, mode: u16) -> Result<()> {
        if self
            .tree
            .find(path)
            .is_none_or(|id| self.tree.dir(id).is_none())
        {
            self.tree.put_at(
                path,
                Node {
                    meta: Meta::root(mode, self.mtime),
                    kind: Kind::empty_dir(),
                },
            )?;
        }
        Ok(())
    }

    fn init(&mut self, outfit: &Outfit<'_>) -> Result<FoundInit> {
        let systemd = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"]
            .iter()
            .find_map(|path| self.tree.find(path));
        let present = self.tree.find("/sbin/init");
        let has_agent = outfit.agent.is_some();
        let (wants_agent, wants_image) = (outfit.init == Init::Agent, outfit.init == Init::Image);
        if wants_agent && !has_agent {
            return Err(ImageError::Unsupported {
                what: "the agent is to be PID 1, but no agent was given".to_owned(),
                advice: "give the path of a static clone-agent".to_owned(),
            });
        }
        if let Some(systemd) = systemd
            && !wants_agent
        {
            // Container images may have systemd without the package that makes it the init.
            if present.is_none() {
                self.link("/sbin/init", "/lib/systemd/systemd")?;
            }
            if present.is_none_or(|init| init == systemd) {
                if has_agent {
                    self.file(UNIT_PATH, 0o644, UNIT)?;
                    self.link(
                        "/etc/systemd/system/sysinit.target.wants/clone-agent.service",
                        UNIT_PATH,
                    )?;
                }
                // Says that caches are up to date, so that a first boot does not rebuild them
                // (systemd-update-done.service(8)).
                self.file("/etc/.updated", 0o644, "")?;
                self.file("/var/.updated", 0o644, "")?;
                return Ok(FoundInit::Systemd);
            }
        }
        if wants_image || !has_agent {
            return Ok(if present.is_some() {
                FoundInit::Other
            } else {
                FoundInit::None
            });
        }
        // The image's own init stays within reach.
        if let Some(parent) = self.tree.find("/sbin")
            && let Some(old) = self.tree.child(parent, b"init")
        {
            self.tree.enter(parent, b"init.image", old)?;
        }
        self.link("/sbin/init", AGENT_PATH)?;
        Ok(FoundInit::Agent)
    }

    fn identity(&mut self, outfit: &Outfit<'_>) -> Result<()> {
        // Empty: every guest is given its own later.
        self.file("/etc/machine-id", 0o444, "")?;
        if let Some(dbus) = self.tree.find("/var/lib/dbus") {
            self.tree.remove(dbus, b"machine-id");
            self.link("/var/lib/dbus/machine-id", "/etc/machine-id")?;
        }
        self.file("/etc/hostname", 0o644, format!("{}\n", outfit.hostname))?;
        if self.is_blank("/etc/hosts") {
            let hosts = format!(
                "127.0.0.1 localhost\n127.0.1.1 {}\n::1 localhost ip6-localhost ip6-loopback\n",
                outfit.hostname
            );
            self.file("/etc/hosts", 0o644, hosts)?;
        }
        if !outfit.nameservers.is_empty()
            || self.tree.find("/etc/resolv.conf").is_none() && !self.is_link("resolv.conf")
        {
            let lines: String = outfit
                .nameservers
                .iter()
                .map(|server| format!("nameserver {server}\n"))
                .collect();
            self.file("/etc/resolv.conf", 0o644, lines)?;
        }
        if self.is_blank("/etc/fstab") {
            self.file(
                "/etc/fstab",
                0o644,
                format!("LABEL={} / ext4 defaults 0 0\n", outfit.label),
            )?;
        }
        Ok(())
    }

    fn is_link(&self, name: &str) -> bool {
        let etc = self.tree.find("/etc");
        let found = etc.and_then(|etc| self.tree.child(etc, name.as_bytes()));
        found.is_some_and(|id| matches!(self.tree.node(id).kind, Kind::Symlink(_)))
    }

    /// True for a file that is missing, or has nothing but comments.
    fn is_blank(&self, path: &str) -> bool {
        let Some(id) = self.tree.find(path) else {
            return true;
        };
        let Kind::File(content) = &self.tree.node(id).kind else {
            return false;
        };
        let Ok(len @ 0..=65_536) = usize::try_from(content.len()) else {
            return false;
        };
        let mut bytes = vec![0; len];
        let read = content
            .open()
            .and_then(|reader| reader.read_exact_at(&mut bytes, 0));
        let is_comment = |line: &[u8]| {
            line.iter()
                .find(|b| !b.is_ascii_whitespace())
                .is_none_or(|&b| b == b'#')
        };
        read.is_ok() && bytes.split(|&b| b == b'\n').all(is_comment)
    }
}

fn check_hostname(name: &str) -> Result<()> {
    let label = |part: &str| {
        let fits = part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        fits && !part.is_empty()
            && part.len() < 64
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if name.len() <= 64 && name.split('.').all(label) {
        return Ok(());
    }
    Err(ImageError::Unsupported {
        what: format!("{name:?} is not a host name"),
        advice: "use at most 64 letters, digits, hyphens and dots".to_owned(),
    })
}

/// The agent must run in any guest: an x86-64 executable that needs no libraries of the image.
pub(crate) fn check_agent(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path).map_err(ImageError::io("read the agent", path))?;
    let is_static = Elf::parse(&bytes).and_then(|elf| elf.is_static());
    let reason = match is_static {
        Ok(true) => return Ok(()),
        Ok(false) => "it is linked dynamically".to_owned(),
        Err(reason) => reason,
    };
    Err(ImageError::Unsupported {
        what: format!("{} cannot be the agent: {reason}", path.display()),
        advice: "give a static x86-64 executable, as `cargo xtask` builds it".to_owned(),
    })
}
