//! The whole Debian that test guests boot from a disk: systemd, Python 3, network tools.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::debian;
use crate::process::{output, run};

/// The disk image in an asset's folder.
pub(crate) const IMAGE: &str = "debian.ext4";
const SIZE: &str = "2G";
/// An init, Python, and what tests use.
pub(crate) const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "login",
    "python3",
    "iproute2",
    "iputils-ping",
    "procps",
    "vim-tiny",
    "netcat-openbsd",
    "iperf3",
    "util-linux",
    "less",
    "strace",
];

/// Where the agent and its unit are in the guest.
const AGENT: &str = "/usr/local/bin/clone-agent";
const UNITS: &str = "/etc/systemd/system";
const UNIT: &str = "clone-agent.service";

/// Makes the disk image in `folder`, without an agent, and a list of its packages' versions.
pub(crate) fn make(modules: &Path, kernel_version: &str, folder: &Path) -> Result<()> {
    debian::file_system(PACKAGES, &hooks(modules, kernel_version, folder))?;
    let image = folder.join(IMAGE);
    anyhow::ensure!(image.exists(), "mmdebstrap left no disk image");
    // It was copied whole; most of it is empty.
    run(Command::new("fallocate").arg("--dig-holes").arg(&image))
}

/// The changes to a plain Debian. The last ones make the disk image (inside mmdebstrap, because
/// only there the files have their owners). Without root's rights hooks run as another user, who
/// may not see our files or change our folder: mmdebstrap's own words for copying do it as us.
fn hooks(modules: &Path, kernel_version: &str, folder: &Path) -> Vec<String> {
    let quoted = |path: &Path| format!("'{}'", path.display());
    let modules_inside = format!("/usr/lib/modules/{kernel_version}");
    vec![
        format!("mkdir -p \"$1\"{modules_inside}"),
        format!("sync-in {} {modules_inside}", quoted(modules)),
        "chown -R 0:0 \"$1\"/usr/lib/modules".to_owned(),
        format!("chroot \"$1\" depmod {kernel_version}"),
        "chroot \"$1\" passwd -d root".to_owned(),
        "echo debian > \"$1\"/etc/hostname".to_owned(),
        "echo '127.0.0.1 localhost debian' > \"$1\"/etc/hosts".to_owned(),
        ": > \"$1\"/etc/machine-id".to_owned(),
        "printf '/dev/vda / ext4 defaults,noatime 0 1\\n' > \"$1\"/etc/fstab".to_owned(),
        // Timers that wake an idle guest would dirty its pages.
        "chroot \"$1\" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer".to_owned(),
        "rm -rf \"$1\"/var/lib/apt/lists/* \"$1\"/var/cache/apt/*".to_owned(),
        "chroot \"$1\" dpkg-query --show > \"$1\"/versions".to_owned(),
        format!("download /versions {}", quoted(&folder.join("versions"))),
        "rm \"$1\"/versions".to_owned(),
        // A bind mount shows the folder without what is mounted in it (proc).
        "mkdir \"$1\".tree && mount --bind \"$1\" \"$1\".tree".to_owned(),
        format!(
            "mke2fs -q -F -t ext4 -L root -d \"$1\".tree \"$1\".ext4 {SIZE}; made=$?; \
             umount \"$1\".tree && rmdir \"$1\".tree && mv \"$1\".ext4 \"$1\"/image && exit $made"
        ),
        format!("download /image {}", quoted(&folder.join(IMAGE))),
    ]
}

/// Copies the image of `base` into `folder` and puts the agent into it, if there is one. Seconds,
/// where making the image anew takes minutes.
pub(crate) fn add_agent(base: &Path, agent: Option<&Path>, folder: &Path) -> Result<()> {
    let image = folder.join(IMAGE);
    run(Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .arg(base.join(IMAGE))
        .arg(&image))?;
    let Some(agent) = agent else { return Ok(()) };
    let unit = crate::paths::workspace().join("crates/agent").join(UNIT);
    let text =
        fs::read_to_string(&unit).with_context(|| format!("cannot read {}", unit.display()))?;
    let wants =
        wanted_by(&text).with_context(|| format!("{} is wanted by nothing", unit.display()))?;
    let wants = format!("{UNITS}/{wants}.wants");
    // `mkdir` of what is there complains and does no harm.
    let script = format!(
        "write {} {AGENT}\nsif {AGENT} mode 0100755\n\
         write {} {UNITS}/{UNIT}\nsif {UNITS}/{UNIT} mode 0100644\n\
         mkdir {wants}\nsymlink {wants}/{UNIT} {UNITS}/{UNIT}\n",
        agent.display(),
        unit.display()
    );
    let script_file = folder.join("debugfs-script");
    fs::write(&script_file, script)?;
    output(
        Command::new("debugfs")
            .arg("-w")
            .arg("-f")
            .arg(&script_file)
            .arg(&image),
    )?;
    fs::remove_file(&script_file)?;
    for path in [
        AGENT,
        &format!("{UNITS}/{UNIT}"),
        &format!("{wants}/{UNIT}"),
    ] {
        // debugfs ends with success whatever became of its commands.
        let found = output(
            Command::new("debugfs")
                .args(["-R", &format!("stat {path}")])
                .arg(&image),
        )?;
        anyhow::ensure!(
            found.contains("Inode:"),
            "debugfs could not write {path} into the image"
        );
    }
    Ok(())
}

/// What a systemd unit asks to be started with.
fn wanted_by(unit: &str) -> Option<&str> {
    unit.lines()
        .find_map(|line| line.strip_prefix("WantedBy="))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_says_what_wants_it() {
        assert_eq!(
            wanted_by("[Unit]\n[Install]\nWantedBy=sysinit.target\n"),
            Some("sysinit.target")
        );
        assert_eq!(wanted_by("[Unit]\n"), None);
    }
}
