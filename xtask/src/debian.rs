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

/// Where package versions lie in an unpacked folder until they are read.
const VERSIONS: &str = "/package-archives";

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

/// Unpacks `packages` and what they depend on into `folder`, running none of their scripts, and
/// writes their names and versions into `versions`.
pub(crate) fn unpack(packages: &[&str], folder: &Path, versions: &Path) -> Result<()> {
    println!("unpacking from Debian {SUITE}: {}", packages.join(" "));
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut command = mmdebstrap();
    command
        .arg("--variant=extract")
        .arg(format!("--include={}", packages.join(",")))
        // The archives are gone at the end, and nothing else tells the versions.
        .arg(format!(
            "--extract-hook=ls \"$1\"/var/cache/apt/archives > \"$1\"{VERSIONS}"
        ))
        .args(["--skip=output/dev", "--format=tar", SUITE, "-"])
        .stdout(Stdio::piped());
    add_mirror(&mut command);
    // As a tar, the files become ours however mmdebstrap gets its root rights.
    let mut fetch = command.spawn().context("cannot start mmdebstrap")?;
    let stream = fetch.stdout.take().context("mmdebstrap has no output")?;
    let unpacked = run(Command::new("tar")
        .args(["--extract", "--no-same-owner", "--directory"])
        .arg(folder)
        .stdin(stream));
    let status = fetch.wait().context("cannot wait for mmdebstrap")?;
    anyhow::ensure!(status.success(), "mmdebstrap failed: {status}");
    unpacked.context("cannot unpack Debian packages")?;
    let archives = fs::read_to_string(folder.join(&VERSIONS[1..]))
        .context("mmdebstrap told no package versions")?;
    fs::write(versions, archive_versions(&archives)).context("cannot write package versions")
}

/// Turns names of package archives, `NAME_VERSION_ARCHITECTURE.deb`, into lines of `NAME VERSION`.
fn archive_versions(archives: &str) -> String {
    let packages = archives.lines().filter_map(|archive| {
        let (name, rest) = archive.split_once('_')?;
        let (version, _) = rest.strip_suffix(".deb")?.rsplit_once('_')?;
        // A colon, before which an epoch stands, is escaped in names of files.
        Some(format!("{name} {}\n", version.replace("%3a", ":")))
    });
    packages.collect()
}

/// Installs a whole Debian with `packages` and hands its folder to `hooks`, which are mmdebstrap's:
/// shell commands that get it as `$1` and run as its root, or its words for copying files in and
/// out. Nothing else is kept.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_names_of_archives() {
        let archives =
            "busybox-static_1%3a1.37.0-6+b9_amd64.deb\nlock\npartial\nlibc6_2.41-12_amd64.deb\n";
        assert_eq!(
            archive_versions(archives),
            "busybox-static 1:1.37.0-6+b9\nlibc6 2.41-12\n"
        );
    }
}
