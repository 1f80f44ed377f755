//! Debian packages, without installing them on this machine.
//!
//! `mmdebstrap` fetches packages with all they depend on, checks Debian's signatures, and unpacks
//! them into a folder or a tar. Everything foreign that the testbed and the test guests are made
//! of comes this way, so that it is the same on every host distribution.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::process::run;

/// The release that everything is taken from.
pub(crate) const SUITE: &str = "trixie";

/// Set to use another package mirror than mmdebstrap's own.
const MIRROR_VARIABLE: &str = "CLONE_DEBIAN_MIRROR";

fn mmdebstrap() -> Command {
    let mut command = Command::new("mmdebstrap");
    // Timestamps of the day would make two builds of the same packages differ.
    command
        .env("SOURCE_DATE_EPOCH", "0")
        .arg("--quiet")
        .stdin(Stdio::null());
    command
}

fn add_mirror(command: &mut Command) {
    if let Some(mirror) = std::env::var_os(MIRROR_VARIABLE) {
        command.arg(mirror);
    }
}

/// Unpacks `packages` and what they depend on into `folder`, running none of their scripts.
pub(crate) fn unpack(packages: &[&str], folder: &Path) -> Result<()> {
    println!("unpacking from Debian {SUITE}: {}", packages.join(" "));
    let mut command = mmdebstrap();
    command
        .arg("--variant=extract")
        .arg(format!("--include={}", packages.join(",")))
        .arg(SUITE)
        .arg(folder);
    if !rustix::process::geteuid().is_root() {
        command.arg("--mode=unshare");
    }
    add_mirror(&mut command);
    run(&mut command).context("cannot unpack Debian packages")
}

/// Installs a whole Debian with `packages` and hands its folder to `hooks`, shell commands that get
/// it as `$1` and run as its root; nothing else is kept.
pub(crate) fn file_system(packages: &[&str], hooks: &[String]) -> Result<()> {
    println!("making a Debian {SUITE} file system (a minute or two, once)");
    let mut command = mmdebstrap();
    command.args(["--variant=minbase", "--format=null"]);
    command.arg(format!("--include={}", packages.join(",")));
    command.args(hooks.iter().map(|hook| format!("--customize-hook={hook}")));
    command.args([SUITE, "-"]).stdout(Stdio::null());
    add_mirror(&mut command);
    run(&mut command).context("cannot make a Debian file system")
}

/// The kernel in an unpacked folder whose version ends with `flavour`, as in `cloud-amd64`.
pub(crate) fn kernel(root: &Path, flavour: &str, unless: Option<&str>) -> Result<Kernel> {
    let boot = root.join("boot");
    for entry in fs::read_dir(&boot).with_context(|| format!("no {}", boot.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(version) = name.strip_prefix("vmlinuz-") else {
            continue;
        };
        if version.ends_with(flavour) && unless.is_none_or(|other| !version.ends_with(other)) {
            let modules = root.join("usr/lib/modules").join(version);
            return Ok(Kernel {
                image: boot.join(&name),
                modules,
                version: version.to_owned(),
            });
        }
    }
    anyhow::bail!(
        "no {flavour} kernel among the unpacked packages in {}",
        boot.display()
    )
}

/// A kernel package, unpacked.
pub(crate) struct Kernel {
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// Its modules.
    pub(crate) modules: PathBuf,
    /// Its version, as `uname -r` prints it.
    pub(crate) version: String,
}
