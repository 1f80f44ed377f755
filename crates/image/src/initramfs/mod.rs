//! Builds small initramfs archives: for guests that run in one, and for stock kernels that need
//! modules to mount their root.

mod cpio;
mod modules;
#[cfg(test)]
mod tests;

use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::info_span;

use crate::guest::{AGENT_PATH, check_agent};
use crate::staging::Staging;
use crate::tree::{Content, Kind, Limits, Meta, Node, Tree};
use crate::{ImageError, Result};

/// Modules of distribution kernels that our guests may need; missing ones are skipped.
pub const USUAL_MODULES: [&str; 9] = [
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "virtio_rng",
    "virtio_console",
    "virtiofs",
    "ext4",
    "vmgenid",
];

const BUSYBOX_PATH: &str = "/bin/busybox";
/// The script that loads the modules in order. If one fails (no such device), the next is still
/// tried.
const LOAD_MODULES: &str = "\
for module in $(/bin/busybox cat /lib/modules/order); do
  /bin/busybox insmod /lib/modules/$module.ko
done
";
const PROLOGUE: &str = "\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
";
/// Finds `root=`, `rootfstype=`, `rootflags=`, `ro` and `init=` on the kernel's command line, as Linux itself does.
/// The root is mounted writable unless the command line has `ro`, since no check precedes the
/// mount.
const SWITCH_ROOT: &str = "\
root= type= flags= mode=rw init=/sbin/init
for word in $(/bin/busybox cat /proc/cmdline); do
  case $word in
    root=*) root=${word#root=} ;;
    rootfstype=*) type=\"-t ${word#rootfstype=}\" ;;
    rootflags=*) flags=,${word#rootflags=} ;;
    ro) mode=ro ;;
    rw) mode=rw ;;
    init=*) init=${word#init=} ;;
  esac
done
tries=0
while [ ! -e \"$root\" ] && [ $tries -lt 500 ]; do
  /bin/busybox usleep 20000
  tries=$((tries + 1))
done
if ! /bin/busybox mount $type -o $mode$flags \"$root\" /root; then
  echo \"initramfs: cannot mount the root file system '$root' (root= on the kernel's command line)\"
  exec /bin/busybox poweroff -f
fi
/bin/busybox mount -o move /dev /root/dev
/bin/busybox umount /proc /sys
exec /bin/busybox switch_root /root \"$init\"
";

/// The action of the initramfs after its modules are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitramfsInit {
    /// The agent becomes PID 1, and the guest runs in the initramfs.
    Agent,
    /// Mounts the disk that `root=` names and starts its `/sbin/init`.
    SwitchRoot,
}

/// The description of an initramfs to build.
#[derive(Clone, Debug)]
pub struct InitramfsSpec {
    /// The archive to make.
    pub output: PathBuf,
    /// Replace an `output` that exists.
    pub replace: bool,
    /// A static busybox. It is needed unless the archive contains only the agent.
    pub busybox: Option<PathBuf>,
    /// A static `clone-agent`.
    pub agent: Option<PathBuf>,
    /// The action after the modules are loaded.
    pub init: InitramfsInit,
    /// The kernel's modules directory (`lib/modules/VERSION`), if there are modules to load.
    pub modules_dir: Option<PathBuf>,
    /// Modules that must exist (or be built in); their dependencies are added.
    pub required_modules: Vec<String>,
    /// Modules to add if they exist.
    pub optional_modules: Vec<String>,
    /// Further files: the path on the host, the absolute path in the archive, the mode.
    pub files: Vec<(PathBuf, String, u16)>,
}

impl InitramfsSpec {
    /// Builds `output`; everything else is to be filled in, but for [`USUAL_MODULES`] as optional ones.
    pub fn new(output: impl Into<PathBuf>, init: InitramfsInit) -> Self {
        Self {
            output: output.into(),
            replace: false,
            busybox: None,
            agent: None,
            init,
            modules_dir: None,
            required_modules: Vec::new(),
            optional_modules: USUAL_MODULES.map(str::to_owned).to_vec(),
            files: Vec::new(),
        }
    }
}

/// The result of a build.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct InitramfsReport {
    /// The archive.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// The modules in it, in the order they are loaded.
    pub modules: Vec<String>,
}

/// Builds an initramfs: an uncompressed cpio archive, which is the quickest to boot from.
///
/// The same input gives the same bytes. The output appears when it is complete.
///
/// # Errors
/// See [`ImageError`].
pub fn build_initramfs(spec: &InitramfsSpec) -> Result<InitramfsReport> {
    let _span = info_span!("initramfs_build", output = %spec.output.display()).entered();
    let staging = Staging::create(&spec.output, spec.replace)?;
    let mut tree = Tree::new(Limits::default());
    let modules = match &spec.modules_dir {
        Some(dir) => modules::collect(dir, &spec.required_modules, &spec.optional_modules)?,
        None => Vec::new(),
    };
    lay_out(&mut tree, spec)?;
    let names: Vec<String> = modules.iter().map(|module| module.name.clone()).collect();
    for module in modules {
        put(
            &mut tree,
            &format!("/lib/modules/{}.ko", module.name),
            0o644,
            module.bytes,
        )?;
    }
    if !names.is_empty() {
        put(
            &mut tree,
            "/lib/modules/order",
            0o644,
            names.join("\n") + "\n",
        )?;
    }
    put_init(&mut tree, spec, !names.is_empty())?;
    let failed = |e| ImageError::io("write the initramfs", &spec.output)(e);
    let bytes = cpio::write(
        &tree,
        BufWriter::with_capacity(1 << 18, staging.file()),
        failed,
    )?;
    staging.commit(spec.replace)?;
    Ok(InitramfsReport {
        path: spec.output.clone(),
        bytes,
        modules: names,
    })
}

fn put(tree: &mut Tree, path: &str, mode: u16, bytes: impl Into<Vec<u8>>) -> Result<()> {
    let kind = Kind::File(Content::Bytes(Arc::from(bytes.into())));
    tree.put_at(
        path,
        Node {
            meta: Meta::root(mode, 0),
            kind,
        },
    )
    .map(drop)
}

fn put_host(tree: &mut Tree, path: &str, mode: u16, host: &Path) -> Result<()> {
    let kind = Kind::File(Content::host(host)?);
    tree.put_at(
        path,
        Node {
            meta: Meta::root(mode, 0),
            kind,
        },
    )
    .map(drop)
}

fn lay_out(tree: &mut Tree, spec: &InitramfsSpec) -> Result<()> {
    for dir in [
        "/bin", "/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp",
    ] {
        tree.put_at(
            dir,
            Node {
                meta: Meta::root(0o755, 0),
                kind: Kind::empty_dir(),
            },
        )?;
    }
    for (path, minor) in [("/dev/console", 1), ("/dev/null", 3)] {
        let major = if minor == 1 { 5 } else { 1 };
        tree.put_at(
            path,
            Node {
                meta: Meta::root(0o600, 0),
                kind: Kind::CharDevice { major, minor },
            },
        )?;
    }
    if let Some(busybox) = &spec.busybox {
        put_host(tree, BUSYBOX_PATH, 0o755, busybox)?;
        let link = Node {
            meta: Meta::root(0o777, 0),
            kind: Kind::Symlink(b"busybox".to_vec()),
        };
        tree.put_at("/bin/sh", link)?;
    }
    if let Some(agent) = &spec.agent {
        check_agent(agent)?;
        put_host(tree, AGENT_PATH, 0o755, agent)?;
    }
    for (host, path, mode) in &spec.files {
        put_host(tree, path, *mode, host)?;
    }
    Ok(())
}

fn put_init(tree: &mut Tree, spec: &InitramfsSpec, has_modules: bool) -> Result<()> {
    let missing = |what: &str, advice: &str| ImageError::Unsupported {
        what: format!("this initramfs needs {what}"),
        advice: advice.to_owned(),
    };
    if spec.init == InitramfsInit::Agent && spec.agent.is_none() {
        return Err(missing("an agent", "give the path of a static clone-agent"));
    }
    if spec.busybox.is_none() {
        if has_modules || spec.init == InitramfsInit::SwitchRoot {
            return Err(missing(
                "a busybox",
                "give the path of a static one (Debian: package busybox-static)",
            ));
        }
        let link = Kind::Symlink(AGENT_PATH.as_bytes().to_vec());
        return tree
            .put_at(
                "/init",
                Node {
                    meta: Meta::root(0o777, 0),
                    kind: link,
                },
            )
            .map(drop);
    }
    let modules = if has_modules { LOAD_MODULES } else { "" };
    let last = match spec.init {
        InitramfsInit::SwitchRoot => SWITCH_ROOT.to_owned(),
        // The other commands of busybox are there for whoever runs commands in this guest.
        InitramfsInit::Agent => format!("/bin/busybox --install -s /bin\nexec {AGENT_PATH}\n"),
    };
    put(tree, "/init", 0o755, [PROLOGUE, modules, &last].concat())
}
