//! What the testbed boots: QEMU itself, Debian's full kernel, and a RAM disk with the modules of a
//! KVM host.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{assets, cpio, debian, modules};

/// Bumped when the recipe changes in a way that its inputs do not show.
const RECIPE: u32 = 4;
const NAME: &str = "testbed";

/// The full kernel: the cloud flavour lacks 9p.
const PACKAGES: &[&str] = &["qemu-system-x86", "linux-image-amd64", "busybox-static"];

/// What the root needs, then what a KVM host has.
const MODULES: &[&str] = &[
    "crc32c_generic",
    "crc32c_intel",
    "9p",
    "9pnet_virtio",
    "overlay",
    "kvm_amd",
    "vhost_net",
    "vhost_vsock",
    "vsock_loopback",
    "tun",
    "tap",
    "bridge",
    "veth",
    "dummy",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_ct",
    "nft_limit",
    "nft_reject_inet",
    "nft_meta_bridge",
    "nft_reject_bridge",
    "br_netfilter",
    "ext4",
    "virtio_blk",
    "virtio_rng",
    "loop",
    "vfio_pci",
    "vfio_iommu_type1",
    "iommufd",
];
const INIT: &str = include_str!("init.sh");

/// The parts of a testbed on disk.
pub(super) struct Image {
    folder: PathBuf,
}

impl Image {
    /// Builds it unless it is there.
    pub(super) fn ensure() -> Result<Self> {
        let key = format!("{RECIPE} {} {PACKAGES:?} {MODULES:?} {INIT}", debian::SUITE);
        let folder = assets::ensure(NAME, &key, build)?;
        Ok(Self {
            folder: folder.canonicalize()?,
        })
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join("bzImage")
    }

    pub(super) fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs.cpio")
    }

    /// QEMU, run with the libraries that it was built with and not the host's.
    pub(super) fn qemu(&self) -> Command {
        qemu(&self.folder.join("root"))
    }
}

fn qemu(root: &Path) -> Command {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command
        .env("QEMU_MODULE_DIR", libraries.join("qemu"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(root.join("usr/bin/qemu-system-x86_64"))
        .arg("-L")
        .arg(root.join("usr/share/qemu"))
        .arg("-L")
        .arg(root.join("usr/share/seabios"));
    command
}

fn build(folder: &Path) -> Result<()> {
    let root = folder.join("root");
    debian::unpack(PACKAGES, &root)?;
    let kernel = debian::kernel(&root, "-amd64", Some("cloud-amd64"))?;
    fs::copy(&kernel.image, folder.join("bzImage"))?;
    let out = fs::File::create(folder.join("initramfs.cpio"))?;
    let mut archive = cpio::Archive::new(std::io::BufWriter::new(out));
    for path in [
        "bin", "dev", "lower", "modules", "proc", "root", "sys", "upper",
    ] {
        archive.folder(path)?;
    }
    let mut order = String::new();
    for module in modules::closure(&kernel.modules, MODULES)? {
        archive.file(
            &format!("modules/{}.ko", module.name),
            0o644,
            &module.content,
        )?;
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(root.join("usr/bin/busybox"))?,
    )?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.finish()?.flush()?;
    fs::remove_dir_all(&kernel.modules).context("cannot remove the packed modules")?;
    let version = qemu(&root)
        .arg("--version")
        .output()
        .context("cannot run QEMU")?;
    anyhow::ensure!(
        version.status.success(),
        "the unpacked QEMU does not run: {}",
        String::from_utf8_lossy(&version.stderr)
    );
    Ok(())
}
