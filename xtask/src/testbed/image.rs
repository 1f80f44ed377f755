//! What the testbed boots: QEMU itself, Debian's full kernel, and a RAM disk with the modules of a
//! KVM host.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{assets, cpio, debian, modules};

/// Bumped when a recipe below changes in a way that its inputs do not show.
const RECIPE: u32 = 40;
/// Everything from Debian's packages.
const MACHINE: &str = "testbed-machine";
const INITRAMFS: &str = "testbed-initramfs";

/// The full kernel: the cloud flavour lacks 9p.
const PACKAGES: &[&str] = &["qemu-system-x86", "linux-image-amd64", "busybox-static"];

/// What mounting the root needs, and what both groups below need.
const ROOT_MODULES: &[&str] = &[
    "crc32c_generic",
    "crc32c_intel",
    "9p",
    "9pnet_virtio",
    "overlay",
    "irqbypass",
];
/// What a KVM host has, in groups that load at the same time.
const HOST_MODULES: [&[&str]; 2] = [
    &[
        "kvm_amd",
        "vhost_net",
        "vhost_vsock",
        "vsock_loopback",
        "tun",
        "tap",
        "vfio_pci",
        "vfio_iommu_type1",
        "iommufd",
    ],
    &[
        "bridge",
        "veth",
        "dummy",
        "nf_tables",
        "nft_chain_nat",
        "nft_masq",
        "nft_ct",
        "nft_limit",
        "nft_reject_inet",
        "nft_fib_inet",
        "nft_meta_bridge",
        "nft_reject_bridge",
        "nft_connlimit",
        "sch_ingress",
        "cls_bpf",
        "br_netfilter",
        "ext4",
        "virtio_blk",
        "virtio_net",
        "virtio_rng",
        "loop",
    ],
];
const INIT: &str = include_str!("init.sh");

/// The parts of a testbed on disk.
pub(super) struct Image {
    machine: PathBuf,
    initramfs: PathBuf,
}

impl Image {
    /// Builds it unless it is there.
    pub(super) fn ensure() -> Result<Self> {
        let key = format!("{RECIPE} {} {PACKAGES:?}", debian::SUITE);
        let machine = assets::ensure(MACHINE, &key, build_machine)?.canonicalize()?;
        let version = fs::read_to_string(machine.join("version"))?;
        let key = format!("{RECIPE} {version} {ROOT_MODULES:?} {HOST_MODULES:?} {INIT}");
        let initramfs = assets::ensure(INITRAMFS, &key, |folder| {
            build_initramfs(&machine, &folder.join("initramfs.cpio"))
        })?;
        Ok(Self {
            initramfs: initramfs.canonicalize()?.join("initramfs.cpio"),
            machine,
        })
    }

    /// The stock bzImage: entered as a bare ELF file it died now and then on the emulated CPU.
    pub(super) fn kernel(&self) -> PathBuf {
        self.machine.join("bzImage")
    }

    pub(super) fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// QEMU, run with the libraries that it was built with and not the host's.
    pub(super) fn qemu(&self) -> Command {
        qemu(&self.root())
    }

    /// The unpacked packages.
    pub(super) fn root(&self) -> PathBuf {
        self.machine.join("root")
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

fn build_machine(folder: &Path) -> Result<()> {
    let root = folder.join("root");
    debian::unpack(PACKAGES, &root, &folder.join("versions"))?;
    let kernel = debian::kernel(&root, "-amd64", Some("cloud-amd64"))?;
    fs::copy(&kernel.image, folder.join("bzImage"))?;
    fs::rename(&kernel.modules, folder.join("modules"))?;
    fs::write(folder.join("version"), &kernel.version)?;
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

fn build_initramfs(machine: &Path, path: &Path) -> Result<()> {
    let mut archive = cpio::Archive::new(std::io::BufWriter::new(fs::File::create(path)?));
    for path in [
        "bin", "dev", "lower", "modules", "proc", "root", "sys", "upper",
    ] {
        archive.folder(path)?;
    }
    let modules = machine.join("modules");
    let root = modules::closure(&modules, ROOT_MODULES)?;
    let mut packed = Vec::new();
    add_modules(&mut archive, "root", &root, &mut packed)?;
    for (index, group) in HOST_MODULES.into_iter().enumerate() {
        let mut group = modules::closure(&modules, &[ROOT_MODULES, group].concat())?;
        group.retain(|module| root.iter().all(|other| other.name != module.name));
        add_modules(&mut archive, &format!("host{index}"), &group, &mut packed)?;
    }
    let busybox = fs::read(machine.join("root/usr/bin/busybox"))?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.finish()?.flush()?;
    Ok(())
}

/// Packs `modules` and, as `modules/GROUP.order`, the order to load them in.
fn add_modules(
    archive: &mut cpio::Archive<impl Write>,
    group: &str,
    modules: &[modules::Module],
    packed: &mut Vec<String>,
) -> Result<()> {
    let mut order = String::new();
    for module in modules {
        anyhow::ensure!(
            !packed.contains(&module.name),
            "{} is in two groups that load at the same time: put it into ROOT_MODULES",
            module.name
        );
        let path = format!("modules/{}.ko", module.name);
        archive.file(&path, 0o644, module.without_signature())?;
        order.push_str(&module.name);
        order.push('\n');
        packed.push(module.name.clone());
    }
    archive.file(&format!("modules/{group}.order"), 0o644, order.as_bytes())?;
    Ok(())
}
