//! What every bench is given: the programs that are compared, the guest's files, how long to take.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use clap::Args;

/// What `run` is told.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The benches; all where none is named.
    pub(crate) names: Vec<String>,
    /// Fewer samples.
    #[arg(long)]
    quick: bool,
    /// How many machines are started of each kind, in benches that start many.
    #[arg(long)]
    runs: Option<usize>,
    /// Another VMM to compare with.
    #[arg(long = "peer", value_parser = peer)]
    peers: Vec<(String, PathBuf)>,
    /// The `clone` that is measured. Like the next three, it is not needed by benches without guests.
    #[arg(long, default_value = "/nonexistent")]
    clone: PathBuf,
    /// The program that measures in a guest.
    #[arg(long, default_value = "/nonexistent")]
    guest_program: PathBuf,
    /// Where kernels and file systems for guests are.
    #[arg(long, default_value = "/nonexistent")]
    assets: PathBuf,
    /// The unpacked packages with QEMU.
    #[arg(long, default_value = "/nonexistent")]
    qemu: PathBuf,
    /// What KVM this is, for the record.
    #[arg(long)]
    kvm: String,
    /// Where results go.
    #[arg(long)]
    out: PathBuf,
    /// Copy what is measured to memory first: where files are slow to read, as in the testbed,
    /// reading QEMU's own program would be what is measured.
    #[arg(long)]
    stage: bool,
}

/// Where staged files are kept, for the next bench too.
const STAGE: &str = "/run/clone-bench-files";
/// What is taken of the unpacked packages.
const QEMU_PARTS: [&str; 4] = [
    "usr/bin/qemu-system-x86_64",
    "usr/lib/x86_64-linux-gnu",
    "usr/share/qemu",
    "usr/share/seabios",
];

impl Options {
    /// Copies what is measured, and points to the copies.
    fn stage(&mut self) -> Result<()> {
        let stage = Path::new(STAGE);
        // Tens of thousands of pages over a slow file system: once is enough, it does not change.
        let qemu = stage.join("qemu");
        if !qemu.join("complete").exists() {
            for part in QEMU_PARTS {
                copy(&self.qemu.join(part), &qemu.join(part))?;
            }
            fs::write(qemu.join("complete"), "")?;
        }
        let assets = stage.join("assets");
        for part in [
            "guest-kernel/bzImage",
            "guest-kernel/vmlinux",
            "guest-initramfs/initramfs.cpio",
            "guest-debian/debian.ext4",
        ] {
            copy(&self.assets.join(part), &assets.join(part))?;
        }
        let clone = stage.join("clone");
        copy(&self.clone, &clone)?;
        // The VM's process is beside it.
        copy(
            &self.clone.with_file_name("clone-vm"),
            &stage.join("clone-vm"),
        )?;
        (self.qemu, self.assets, self.clone) = (qemu, assets, clone);
        for (name, program) in &mut self.peers {
            let staged = stage.join(name);
            copy(program, &staged)?;
            *program = staged;
        }
        Ok(())
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let parent = to.parent().unwrap_or(to);
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let status = Command::new("cp")
        .args(["--archive", "--dereference", "--no-target-directory"])
        // What runs, for another bench, cannot be written to.
        .arg("--remove-destination")
        .args([from, to])
        .status()
        .context("cannot start `cp`")?;
    anyhow::ensure!(status.success(), "cannot copy {}", from.display());
    Ok(())
}

/// VMMs that take part where a path to them is given.
const PEERS: [&str; 2] = ["firecracker", "cloud-hypervisor"];

/// Reads `NAME=PATH`.
pub(crate) fn peer(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if PEERS.contains(&name) && !path.is_empty() => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err(format!(
            "NAME=PATH is wanted, and the name is {}",
            PEERS.join(" or ")
        )),
    }
}

/// What every bench is given.
pub(crate) struct Context {
    options: Options,
    peers: BTreeMap<String, PathBuf>,
    /// Runtime directory, images and sockets: in memory, and gone with this value.
    scratch: PathBuf,
}

impl Context {
    pub(crate) fn new(mut options: Options) -> Result<Self> {
        if options.stage {
            options.stage()?;
        }
        let base = match rustix::process::geteuid().is_root() {
            true => PathBuf::from("/run"),
            // For what needs no guests.
            false => std::env::temp_dir(),
        };
        let scratch = base.join(format!("clone-bench-{}", std::process::id()));
        fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot make {}", scratch.display()))?;
        fs::create_dir_all(&options.out)
            .with_context(|| format!("cannot make {}", options.out.display()))?;
        Ok(Self {
            peers: options.peers.iter().cloned().collect(),
            options,
            scratch,
        })
    }

    /// `quick` in a short run, `full` else.
    pub(crate) fn samples(&self, quick: usize, full: usize) -> usize {
        if self.options.quick { quick } else { full }
    }

    /// Whether there is time for what takes minutes.
    pub(crate) fn is_full(&self) -> bool {
        !self.options.quick
    }

    /// How many machines of each kind are started.
    pub(crate) fn runs(&self, quick: usize, full: usize) -> usize {
        let runs = self.options.runs;
        runs.unwrap_or_else(|| self.samples(quick, full)).max(1)
    }

    /// The program of another VMM, where it was given.
    pub(crate) fn peer(&self, name: &str) -> Option<&Path> {
        self.peers.get(name).map(PathBuf::as_path)
    }

    pub(crate) fn out(&self) -> &Path {
        &self.options.out
    }

    pub(crate) fn kvm(&self) -> &str {
        &self.options.kvm
    }

    /// A path for a file that is gone with the run; in memory, short enough for sockets.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    pub(crate) fn kernel(&self, name: &str) -> PathBuf {
        self.options.assets.join("guest-kernel").join(name)
    }

    pub(crate) fn initramfs(&self) -> PathBuf {
        self.options.assets.join("guest-initramfs/initramfs.cpio")
    }

    /// A raw image with a stock Debian.
    pub(crate) fn debian(&self) -> PathBuf {
        self.options.assets.join("guest-debian/debian.ext4")
    }

    pub(crate) fn guest_program(&self) -> &Path {
        &self.options.guest_program
    }

    /// The `clone` that is measured, with a runtime directory of its own.
    pub(crate) fn clone(&self) -> Command {
        let mut command = Command::new(&self.options.clone);
        command.env("CLONE_RUNTIME_DIR", &self.scratch);
        command
    }

    /// QEMU, with the libraries that it was built with.
    pub(crate) fn qemu(&self) -> Command {
        let root = &self.options.qemu;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("--library-path")
            .arg(&libraries)
            .arg(root.join("usr/bin/qemu-system-x86_64"));
        for folder in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.join(folder));
        }
        command
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

#[cfg(test)]
mod tests {
    use super::peer;

    #[test]
    fn a_peer_is_a_known_name_and_a_path() {
        for name in ["firecracker", "cloud-hypervisor"] {
            assert_eq!(
                peer(&format!("{name}=/bin/vmm")).unwrap(),
                (name.to_owned(), "/bin/vmm".into())
            );
        }
        for wrong in ["firecracker", "firecracker=", "bochs=/bin/bochs"] {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }
}
