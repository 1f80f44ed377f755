//! The testbed: a nested KVM host under QEMU's software emulation of an AMD machine.
//!
//! The host's file system is the testbed's root, read-only below a writable overlay, so that what
//! was built outside runs inside at the same path; only cargo's target folder (and where the
//! assets are) is shared writable. Commands travel over virtio-serial ports, one session a port.
//!
//! [`machine`] starts QEMU, [`image`] makes its kernel and RAM disk, [`client`] runs a command from
//! outside, [`supervisor`] is the other end inside, [`wire`] is what they say to each other.

mod client;
mod image;
mod in_memory;
mod machine;
mod supervisor;
mod wire;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;
use clap::{Args, Subcommand};

pub(crate) use in_memory::{in_memory, load};
pub(crate) use machine::Testbed;

/// Ports, and so commands that can run at the same time in one testbed.
const PORTS: usize = 15;
/// The testbed's own address, and that under which it reaches this machine, on the network card
/// that it has where a port is forwarded: those of QEMU's user-mode network.
pub(crate) const INSIDE_ADDRESS: &str = "10.0.2.15";
pub(crate) const OUTSIDE_ADDRESS: &str = "10.0.2.2";

/// The name of a testbed that a command starts for itself.
const SINGLE: &str = "single";

/// What a testbed must be like; what is not said is taken as it comes.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Size {
    /// Memory, as in 6G or 512M [default: 8G]; taken from the host only as it is used.
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub(crate) mem: Option<u32>,
    /// CPUs [default: 1]. With several, QEMU's emulation corrupts its guests: docs/testbed.md.
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// A machine with an IOMMU, and a spare PCI device bound to vfio-pci.
    #[arg(long)]
    pub(crate) vfio: bool,
    /// Let a port of this machine lead to one inside, on the address 10.0.2.15. This machine's own
    /// loopback is 10.0.2.2 inside then.
    #[arg(long, value_name = "OUTSIDE:INSIDE", value_parser = two_ports)]
    pub(crate) forward: Option<(u16, u16)>,
}

/// Reads `8080:80`.
fn two_ports(text: &str) -> Result<(u16, u16), String> {
    let ports = text.split_once(':');
    let ports =
        ports.and_then(|(outside, inside)| Some((outside.parse().ok()?, inside.parse().ok()?)));
    ports.ok_or_else(|| "two port numbers, as in 8080:80".to_owned())
}

/// Reads `6G`, `512M` or a plain number of MiB.
fn mebibytes(text: &str) -> Result<u32, String> {
    let (digits, factor) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let number = digits.parse::<u32>().ok();
    let size = number.and_then(|number| number.checked_mul(factor));
    size.filter(|size| *size >= 256)
        .ok_or_else(|| "a size of at least 256M, as in 6G or 512M".to_owned())
}

#[derive(Subcommand)]
pub(crate) enum Action {
    /// Keeps a testbed running in the background, so that `run` starts at once.
    Up(Size),
    /// Ends the testbed that `up` started.
    Down,
    /// Says whether a testbed is up.
    Status,
    /// Runs a command inside, in this directory, and ends with its exit status.
    ///
    /// Uses the testbed that is up if it is like what was asked for, else a fresh one that goes
    /// away with the command. Inside one is root; only cargo's target folder is shared writable,
    /// all other changes are gone with the testbed. Unix sockets do not work in the shared
    /// folders: put them in /run or /tmp, which are in memory.
    Run {
        #[command(flatten)]
        size: Size,
        /// A fresh testbed, even where one is up.
        #[arg(long)]
        fresh: bool,
        /// The testbed whose state is in this folder, which another chore started.
        #[arg(long, hide = true, value_name = "FOLDER")]
        at: Option<PathBuf>,
        /// Ends the command after so many seconds, with exit status 124.
        #[arg(long)]
        timeout: Option<u64>,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// An interactive shell inside; in a testbed that is up, beside whatever else runs there.
    Shell {
        #[command(flatten)]
        size: Size,
    },
    /// The testbed's own end of the sessions.
    #[command(hide = true)]
    Supervise,
}

pub(crate) fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Up(size) => {
            let testbed = Testbed::up(&size)?;
            println!("testbed up (process {})", testbed.pid());
            Ok(ExitCode::SUCCESS)
        }
        Action::Down => {
            println!(
                "{}",
                if machine::down()? {
                    "testbed down"
                } else {
                    "no testbed was up"
                }
            );
            Ok(ExitCode::SUCCESS)
        }
        Action::Status => Ok(match Testbed::find()? {
            Some(testbed) => {
                println!("testbed up (process {})", testbed.pid());
                ExitCode::SUCCESS
            }
            None => {
                println!("no testbed is up");
                ExitCode::FAILURE
            }
        }),
        Action::Run {
            size,
            fresh,
            at,
            timeout,
            command,
        } => {
            let testbed = match (at, fresh) {
                (Some(folder), _) => Testbed::at(folder)?,
                (None, true) => Testbed::start(&size, SINGLE)?,
                (None, false) => Testbed::find_or_start(&size)?,
            };
            client::run(&testbed, &command, timeout, false)
        }
        Action::Shell { size } => {
            let testbed = Testbed::find_or_start(&size)?;
            let shell = std::env::var_os("SHELL").unwrap_or_else(|| "/bin/bash".into());
            client::run(&testbed, &[shell], None, true)
        }
        Action::Supervise => supervisor::main(),
    }
}

/// The root of the unpacked packages with the QEMU that testbeds run in.
pub(crate) fn qemu_root() -> Result<PathBuf> {
    image::Image::ensure().map(|image| image.root())
}

/// Runs a command inside and returns how it ended, for the other chores.
pub(crate) fn execute(testbed: &Testbed, command: &[OsString]) -> Result<ExitCode> {
    client::run(testbed, command, None, false)
}

/// A process of its own that runs `words` in a testbed of ours. A session keeps its port for as long
/// as its process lives, so one that runs many commands has each in another process.
pub(crate) fn command(testbed: &Testbed, words: &[OsString]) -> Command {
    // Our own file may have been replaced by a build meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["testbed", "run", "--at"])
        .arg(testbed.folder())
        .arg("--")
        .args(words)
        .stdin(Stdio::null());
    command
}
