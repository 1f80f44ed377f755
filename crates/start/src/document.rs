//! The start document, which a launcher sends to the VM's process with open files, over the Unix
//! socket that is the process's standard input.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clone_api::config::DiskFormat;
use clone_api::control::BaseLayers;
use clone_api::jail::RequiredJail;
use clone_api::validate::{validate, validate_unnamed};
use clone_api::{ApiError, ErrorCode, MacAddr, VmConfig, descriptors};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::shared_file::SharedFile;

/// The size limit of a document that is read, in bytes; the largest that is written has a few
/// kilobytes.
const MAX_DOCUMENT: usize = 4 << 20;

/// The start document: the VM's description, and what the launcher determined and opened for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// The VM's description, with all defaults filled in.
    pub config: VmConfig,
    /// The origin of the guest.
    pub origin: Origin,
    /// The network interfaces, in the order of the description.
    pub nets: Vec<AttachedNet>,
    /// The layers of the jail without which the VM must not run.
    pub required_jail: RequiredJail,
    /// The directory for disk layers whose writes end with the VM; if absent, they are in memory,
    /// within a limit.
    pub layers_dir: Option<PathBuf>,
    /// Whether the machine is only built, and waits for the VM that another host sends: the guest is
    /// neither booted nor continued from the snapshot, whose layers are what the VM builds on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incoming: bool,
}

/// The origin of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Origin {
    /// The guest boots a kernel.
    Boot(BootSource),
    /// The guest continues from a snapshot. It is boxed because it is large.
    Fork(Box<ForkSpec>),
}

/// A clone to start: all files that it is made of, and how it starts.
///
/// What a caller asks for is turned into one of these, once; the clone's process opens its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForkSpec {
    /// The layers, the disks and the kernel that the clone shares with others.
    pub parent: Parent,
    /// The machine's state.
    pub state: SharedFile,
    /// The record of the pages to map before the guest runs.
    pub prefetch: Option<SharedFile>,
    /// Whether the clone is a standby, whose guest runs only when it is adopted.
    pub standby: bool,
    /// Whether pages are mapped one by one, so that those that the guest touches can be recorded.
    /// Otherwise the kernel also maps the neighbours of a page that is read.
    pub observed: bool,
    /// Set for a saved VM that goes on as the same VM: it gets no new generation id. The file is
    /// empty until the guest runs; the VM's process marks it before the guest's first instruction
    /// ([`RAN`]), and refuses to run a guest whose file is marked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_once: Option<SharedFile>,
}

/// The content of [`ForkSpec::run_once`] once the guest has run.
pub const RAN: &[u8] = b"ran\n";

/// The files that snapshots and forks of a VM build on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Parent {
    /// The template that the VM was forked from, or the last kept snapshot of the VM.
    pub template: Option<PathBuf>,
    /// The memory layers, the base first; empty for a VM that was booted.
    pub memory: Vec<SharedFile>,
    /// The files of each disk below its own writes.
    pub disks: Vec<ForkDisk>,
    /// Files that each user locks shared for as long as it runs, so that nobody removes the files
    /// that it uses.
    pub locks: Vec<SharedFile>,
    /// The kernel that forks boot when they reboot; absent for a template of an older format, which
    /// has none.
    #[serde(default)]
    pub boot: Option<BootSource>,
    /// The template that the lowest layers belong to, where those above them are a live fork's or a
    /// saved VM's. `None` where all layers belong to `template`, or none to any template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseTemplate>,
}

/// The template that the lowest layers of a VM belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseTemplate {
    /// The template's directory.
    pub template: PathBuf,
    /// The number of its layers.
    pub layers: BaseLayers,
}

impl BaseTemplate {
    /// Whether the template, which has `all` layers, has these.
    pub fn fits(&self, all: &BaseLayers) -> bool {
        let BaseLayers { memory, disks } = &self.layers;
        let mut both = disks.iter().zip(&all.disks);
        *memory >= 1
            && *memory <= all.memory
            && disks.len() == all.disks.len()
            && both.all(|(used, all)| used <= all)
    }
}

impl Parent {
    /// Leaves of a template's files the lowest layers, which a VM builds on whose own layers are
    /// elsewhere.
    pub fn narrow_to(&mut self, base: BaseTemplate) {
        self.template = None;
        self.memory.truncate(base.layers.memory as usize);
        for (disk, layers) in self.disks.iter_mut().zip(&base.layers.disks) {
            disk.layers.truncate(*layers as usize);
        }
        self.base = Some(base);
    }

    /// The template that a state of the VM can be kept as a difference from, and how many of the
    /// layers are the template's; `None` for a VM that was booted.
    pub fn base_template(&self) -> Option<BaseTemplate> {
        let whole = || {
            let template = self.template.clone()?;
            let layers = self.layers();
            Some(BaseTemplate { template, layers })
        };
        self.base.clone().or_else(whole)
    }

    /// The number of all layers.
    pub fn layers(&self) -> BaseLayers {
        BaseLayers {
            memory: self.memory.len() as u32,
            disks: self.disks.iter().map(|it| it.layers.len() as u32).collect(),
        }
    }
}

/// A kernel to boot, and its initial RAM disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// The kernel, or a `vmlinux` that was extracted from it.
    pub kernel: SharedFile,
    /// The initial RAM disk.
    pub initrd: Option<SharedFile>,
}

/// The files that a clone's disk shares with others, below the options in the description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkDisk {
    /// The base image and its format; `None` if the lowest layer holds everything.
    pub base: Option<(SharedFile, DiskFormat)>,
    /// The backing files of a qcow2 base, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<(SharedFile, DiskFormat)>,
    /// The layers over it, the lowest first.
    pub layers: Vec<SharedFile>,
}

/// A network interface that the launcher set up. The queues of its tap are sent with the document.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AttachedNet {
    /// The number of the tap's queues.
    pub queues: u16,
    /// The guest's hardware address.
    pub mac: MacAddr,
    /// The MTU in bytes to report to the guest; `None` for the usual 1,500.
    pub mtu: Option<u16>,
    /// The argument on the kernel's command line that sets the guest's address.
    pub kernel_argument: Option<String>,
}

impl Start {
    /// Refuses a document whose machine cannot be built. The launcher is trusted, but the
    /// description that it was given may come from anybody.
    pub fn check(&self) -> Result<()> {
        let (problems, disks) = match &self.origin {
            // A standby is given its final name when it is adopted.
            Origin::Fork(fork) if fork.standby => (
                validate_unnamed(&self.config),
                Some(fork.parent.disks.len()),
            ),
            Origin::Fork(fork) => (validate(&self.config), Some(fork.parent.disks.len())),
            Origin::Boot(_) => (validate(&self.config), None),
        };
        let refuse = |message: String| ApiError::new(ErrorCode::InvalidConfig, message);
        if !problems.is_empty() {
            let problems: Vec<String> = problems.iter().map(|it| format!("  {it}")).collect();
            let message = format!("the VM cannot be made like this:\n{}", problems.join("\n"));
            return Err(refuse(message));
        }
        for (what, given, described) in [
            ("interfaces", self.nets.len(), self.config.net.len()),
            (
                "disks",
                disks.unwrap_or(self.config.disks.len()),
                self.config.disks.len(),
            ),
        ] {
            if given != described {
                return Err(refuse(format!(
                    "{given} {what} came for a VM with {described}"
                )));
            }
        }
        Ok(())
    }
}

/// Sends `start`, and nothing after it, with these open files: the queues of all taps in the order of
/// its interfaces, and the connections to the servers of all shares.
pub fn send(socket: &UnixStream, start: &Start, files: &[OwnedFd]) -> io::Result<()> {
    let text = serde_json::to_vec(start)?;
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let sent = descriptors::send(socket, &text, &files)?;
    let mut rest = socket;
    rest.write_all(&text[sent..])?;
    socket.shutdown(Shutdown::Write)
}

/// Receives a document and the open files with it, until the end of `socket`; `None` if the
/// launcher ended before it sent one.
pub fn receive(socket: impl AsFd) -> Result<Option<(Start, Vec<OwnedFd>)>> {
    let (text, files) = receive_all(socket).map_err(|error| unreadable(&error))?;
    if text.is_empty() {
        return Ok(None);
    }
    let start: Start = serde_json::from_slice(&text).map_err(|error| unreadable(&error))?;
    let queues: usize = start.nets.iter().map(|net| usize::from(net.queues)).sum();
    let shares = start.config.shares.len();
    if queues + shares != files.len() {
        let reason = format!(
            "it names {queues} queues of taps and {shares} shares, and {} came",
            files.len()
        );
        return Err(unreadable(&reason));
    }
    Ok(Some((start, files)))
}

fn receive_all(socket: impl AsFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut text, mut files) = (Vec::new(), Vec::new());
    let mut chunk = vec![0; 64 << 10];
    while text.len() <= MAX_DOCUMENT {
        match descriptors::receive(&socket, &mut chunk, &mut files) {
            Ok(0) => return Ok((text, files)),
            Ok(count) => text.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("it is too long"))
}

fn unreadable(reason: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(
        ErrorCode::Internal,
        format!("the VM's process cannot read its description: {reason}"),
    )
}

#[cfg(test)]
mod tests {
    use clone_api::config::{DiskConfig, NetConfig, Overlay};

    use super::*;

    fn start(queues: u16) -> Start {
        Start {
            config: VmConfig::default(),
            origin: Origin::Boot(BootSource {
                kernel: SharedFile::named("/k".into()),
                initrd: None,
            }),
            nets: vec![AttachedNet {
                queues,
                mac: MacAddr([2, 0, 0, 0, 0, 1]),
                mtu: None,
                kernel_argument: None,
            }],
            required_jail: RequiredJail::complete(),
            layers_dir: None,
            incoming: false,
        }
    }

    fn sent(queues: u16, taps: &[OwnedFd]) -> Result<Option<(Start, Vec<OwnedFd>)>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&ours, &start(queues), taps).unwrap();
        receive(theirs)
    }

    #[test]
    fn the_queues_of_taps_come_with_the_document() {
        let tap = || OwnedFd::from(tempfile::tempfile().unwrap());
        let taps = || [tap(), tap()];
        let (start, files) = sent(2, &taps()).unwrap().unwrap();
        assert_eq!((start.nets[0].queues, files.len()), (2, 2));
        assert_eq!(start.required_jail, RequiredJail::complete());
        for queues in [1, 3] {
            let error = sent(queues, &taps()).unwrap_err();
            assert!(error.message.contains("and 2 came"), "{}", error.message);
        }
    }

    #[test]
    fn a_launcher_that_ends_without_a_word_is_no_error_and_a_pipe_is_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(receive(theirs).unwrap().is_none());
        let (read, _write) = rustix::pipe::pipe().unwrap();
        assert!(receive(read).is_err());
    }

    fn forked() -> Start {
        Start {
            config: VmConfig {
                name: "a".into(),
                kernel: "/k".into(),
                ..VmConfig::default()
            },
            origin: Origin::Fork(Box::new(ForkSpec {
                parent: Parent::default(),
                state: SharedFile::named("/s".into()),
                prefetch: None,
                standby: false,
                observed: false,
                run_once: None,
            })),
            nets: Vec::new(),
            required_jail: RequiredJail::default(),
            layers_dir: None,
            incoming: false,
        }
    }

    #[test]
    fn a_description_is_checked_at_the_start_of_the_process_too() {
        forked().check().unwrap();
        let refused = |change: &dyn Fn(&mut VmConfig)| {
            let mut start = forked();
            change(&mut start.config);
            start.check().unwrap_err().message
        };
        let kept = |config: &mut VmConfig| {
            config.disks = vec![DiskConfig {
                path: "x".into(),
                read_only: true,
                overlay: Overlay::Kept("/etc/ANYTHING".into()),
                ..DiskConfig::default()
            }];
        };
        assert!(refused(&kept).contains("disks[0].overlay"));
        assert!(refused(&|it| it.name = ".standby-x".into()).contains("name"));
        assert!(refused(&|it| it.vcpus = 0).contains("vcpus"));
        assert!(refused(&|it| it.net = vec![NetConfig::default()]).contains("interfaces"));
        let plain = |config: &mut VmConfig| {
            config.disks = vec![DiskConfig {
                path: "x".into(),
                ..DiskConfig::default()
            }];
        };
        assert!(refused(&plain).contains("disks"));
    }
}
