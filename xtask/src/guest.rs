//! What test guests are made of: a stock Debian cloud kernel, a tiny RAM disk, and a whole Debian
//! with systemd and Python, all from Debian's signed packages.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use clap::Subcommand;

use crate::{assets, cpio, debian, guest_debian, host, modules, static_program, testbed};

/// Bumped when the recipes below change in a way that their inputs do not show.
const RECIPE: u32 = 3;
const KERNEL: &str = "guest-kernel";
const INITRAMFS: &str = "guest-initramfs";
/// Without the agent: takes minutes to make, and changes rarely.
const DEBIAN_BASE: &str = "guest-debian-base";
const DEBIAN: &str = "guest-debian";

/// The packages that kernel and RAM disk are made of.
const KERNEL_PACKAGES: &[&str] = &["linux-image-cloud-amd64", "busybox-static"];
/// Modules that the RAM disk loads: what the guest's root and its devices need.
const GUEST_MODULES: &[&str] = &[
    // What Firecracker's devices are found by; PCI is built in.
    "virtio_mmio",
    "crc32c_generic",
    "crc32c_intel",
    "virtio_blk",
    "ext4",
    "virtio_net",
    "virtio_balloon",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "vmgenid",
];
const INIT: &str = include_str!("guest_init.sh");

/// Kernels and file systems for test guests, from Debian's signed packages.
///
/// They end up in target/assets (which may be a link): guest-kernel/{bzImage,vmlinux,version},
/// guest-initramfs/initramfs.cpio (busybox, modules, the guest agent), guest-debian/debian.ext4
/// (systemd and Python 3; boot it with the RAM disk and root=/dev/vda). The versions of all packages
/// are in guest-kernel/versions, guest-debian-base/versions and testbed/versions. CLONE_DEBIAN_MIRROR
/// names another mirror than mmdebstrap's own choice.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Builds what is missing or out of date, and prints where everything is.
    Build,
    /// Forgets the built assets and builds them from the newest packages.
    Update,
}

/// Where the assets are.
pub(crate) struct GuestAssets {
    pub(crate) bzimage: PathBuf,
    pub(crate) vmlinux: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) debian: PathBuf,
}

pub(crate) fn run(command: &Command) -> Result<ExitCode> {
    if matches!(command, Command::Update) {
        for name in [KERNEL, INITRAMFS, DEBIAN_BASE, DEBIAN] {
            assets::forget(name)?;
        }
    }
    let built = build()?;
    for path in [
        &built.bzimage,
        &built.vmlinux,
        &built.initramfs,
        &built.debian,
    ] {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// What is made of Debian's packages alone, built on a thread of its own: most of it is waiting and
/// little is the processor's work, so it goes beside a compiler. [`build`] then has less to do.
pub(crate) struct Fetching(JoinHandle<Result<()>>);

impl Fetching {
    /// Starts it; `needs_testbed` tells whether the testbed's own packages are wanted, too.
    pub(crate) fn start(needs_testbed: bool) -> Self {
        Self(std::thread::spawn(move || {
            host::install_packages()?;
            debian_base(&kernel()?)?;
            match needs_testbed {
                true => testbed::qemu_root().map(drop),
                false => Ok(()),
            }
        }))
    }

    /// Waits until all is there.
    pub(crate) fn wait(self) -> Result<()> {
        self.0.join().expect("fetching does not panic")
    }
}

/// Builds what is missing or out of date.
pub(crate) fn build() -> Result<GuestAssets> {
    host::install_packages()?;
    let kernel = kernel()?;
    let agent = agent()?;
    let agent_key = match &agent {
        Some(path) => blake3::hash(&fs::read(path)?).to_string(),
        None => "no agent".to_owned(),
    };
    let initramfs = initramfs(&kernel, agent.as_deref(), &agent_key)?;
    let debian = debian(&kernel, agent.as_deref(), &agent_key)?;
    Ok(GuestAssets {
        bzimage: kernel.join("bzImage"),
        vmlinux: kernel.join("vmlinux"),
        initramfs: initramfs.join("initramfs.cpio"),
        debian: debian.join("debian.ext4"),
    })
}

fn kernel() -> Result<PathBuf> {
    let key = format!("{RECIPE} {} {KERNEL_PACKAGES:?}", debian::SUITE);
    assets::ensure(KERNEL, &key, |folder| {
        let root = folder.join("root");
        debian::unpack(KERNEL_PACKAGES, &root, &folder.join("versions"))?;
        let kernel = debian::kernel(&root, "cloud-amd64", None)?;
        fs::copy(&kernel.image, folder.join("bzImage"))?;
        let vmlinux = clone_image::kernel::extract_vmlinux(&kernel.image)?;
        fs::write(folder.join("vmlinux"), vmlinux)?;
        fs::rename(&kernel.modules, folder.join("modules"))?;
        fs::copy(root.join("usr/bin/busybox"), folder.join("busybox"))?;
        fs::write(folder.join("version"), &kernel.version)?;
        fs::remove_dir_all(&root).context("cannot remove the unpacked packages")
    })
}

/// The static guest agent.
fn agent() -> Result<Option<PathBuf>> {
    let source = crate::paths::workspace().join("crates/agent/src/main.rs");
    if !fs::read_to_string(&source).is_ok_and(|text| text.contains("mod ")) {
        return Ok(None);
    }
    static_program::for_guests("clone-agent").map(Some)
}

fn initramfs(kernel: &Path, agent: Option<&Path>, agent_key: &str) -> Result<PathBuf> {
    let version = fs::read_to_string(kernel.join("version"))?;
    let key = format!("{RECIPE} {version} {GUEST_MODULES:?} {agent_key} {INIT}");
    assets::ensure(INITRAMFS, &key, |folder| {
        let out = fs::File::create(folder.join("initramfs.cpio"))?;
        let mut archive = cpio::Archive::new(std::io::BufWriter::new(out));
        for path in [
            "bin", "dev", "etc", "modules", "mnt", "proc", "root", "run", "sys", "tmp",
        ] {
            archive.folder(path)?;
        }
        let mut order = String::new();
        for module in modules::closure(&kernel.join("modules"), GUEST_MODULES)? {
            archive.file(
                &format!("modules/{}.ko", module.name),
                0o644,
                &module.content,
            )?;
            order.push_str(&module.name);
            order.push('\n');
        }
        archive.file("modules/order", 0o644, order.as_bytes())?;
        archive.file("bin/busybox", 0o755, &fs::read(kernel.join("busybox"))?)?;
        if let Some(agent) = agent {
            archive.file("bin/clone-agent", 0o755, &fs::read(agent)?)?;
        }
        archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        archive.file("init", 0o755, INIT.as_bytes())?;
        archive.finish()?.flush()?;
        Ok(())
    })
}

/// The file system before the agent is put into it, and the key over what it is made of.
fn debian_base(kernel: &Path) -> Result<(PathBuf, String)> {
    let version = fs::read_to_string(kernel.join("version"))?;
    let key = format!(
        "{RECIPE} {} {version} {:?}",
        debian::SUITE,
        guest_debian::PACKAGES
    );
    let base = assets::ensure(DEBIAN_BASE, &key, |folder| {
        guest_debian::make(&kernel.join("modules"), &version, folder)
    })?;
    Ok((base, key))
}

fn debian(kernel: &Path, agent: Option<&Path>, agent_key: &str) -> Result<PathBuf> {
    let (base, key) = debian_base(kernel)?;
    assets::ensure(DEBIAN, &format!("{key} {agent_key}"), |folder| {
        guest_debian::add_agent(&base, agent, folder)
    })
}
