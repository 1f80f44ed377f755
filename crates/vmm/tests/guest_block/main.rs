//! Block devices under a stock Linux guest: a ring and a thread, raw, qcow2 and layers, freezes
//! under load, and what is left in the files afterwards.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clone_disk::{Disk, DiskSpec, EngineKind, Format, Writes, ephemeral};
use clone_memory::{GuestMemory, RamLayout};
use clone_vmm::devices::block::{Block, BlockConfig, SharedDisk};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{DeviceSlot, Exit, Kernel, Machine, Parts};
use clone_vmm::pci::virtio_pci::SharedVirtioDevice;
use kvm_ioctls::Kvm;

/// How long the guest may take, in the slowest place where tests run.
const PATIENCE: Duration = Duration::from_secs(300);
const DISK_BYTES: u64 = 16 << 20;
/// Where the guest's last write starts, and how long it is.
const LAST_WRITE: (u64, usize) = (67 << 16, 96 << 16);

/// The console, for the test's eyes.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        io::stdout().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

fn open(spec: &DiskSpec, engine: EngineKind) -> SharedDisk {
    Arc::new(Mutex::new(
        Disk::open(spec.open().unwrap(), engine).unwrap(),
    ))
}

fn device(disk: &SharedDisk, id: &str, queues: u16) -> SharedVirtioDevice {
    let config = BlockConfig {
        id: id.to_owned(),
        queues,
        ..BlockConfig::default()
    };
    let block = Block::new(Arc::clone(disk), &config).unwrap();
    Arc::new(Mutex::new(block))
}

/// The files of the test's disks.
struct Files {
    raw: PathBuf,
    qcow2: PathBuf,
    plain: PathBuf,
    layer: PathBuf,
}

impl Files {
    fn new(dir: &Path) -> Self {
        let files = Self {
            raw: dir.join("base.raw"),
            qcow2: dir.join("disk.qcow2"),
            plain: dir.join("plain.raw"),
            layer: dir.join("top.layer"),
        };
        for path in [&files.raw, &files.plain] {
            fs::write(path, vec![0x5a; DISK_BYTES as usize]).unwrap();
        }
        let size = DISK_BYTES.to_string();
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .args([files.qcow2.as_os_str(), size.as_ref()])
            .status();
        assert!(status.unwrap().success());
        files
    }

    fn layered(&self) -> DiskSpec {
        DiskSpec {
            writes: Writes::Layer(self.layer.clone()),
            ..DiskSpec::image(&self.raw, Format::Raw, false)
        }
    }
}

fn content(disk: &SharedDisk) -> Vec<u8> {
    let mut bytes = vec![0; LAST_WRITE.1];
    disk.lock()
        .unwrap()
        .read_at(&mut bytes, LAST_WRITE.0)
        .unwrap();
    bytes
}

#[test]
fn a_linux_guest_finds_its_disks_as_it_left_them() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::new(dir.path());
    let layered = open(&files.layered(), EngineKind::Uring);
    let qcow2 = open(
        &DiskSpec::image(&files.qcow2, Format::Qcow2, false),
        EngineKind::Uring,
    );
    let read_only = open(
        &DiskSpec::image(&files.raw, Format::Raw, true),
        EngineKind::Worker,
    );
    let plain = open(
        &DiskSpec::image(&files.plain, Format::Raw, false),
        EngineKind::Worker,
    );
    let devices = vec![
        device(&layered, "first-disk", 1),
        device(&qcow2, "", 1),
        device(&read_only, "", 1),
        device(&plain, "", 2),
    ];
    let console = Console::default();
    run(dir.path(), devices, &console, &layered);

    let text = console.text();
    let claims = text.lines().filter(|line| line.starts_with("claim "));
    let broken: Vec<&str> = claims
        .clone()
        .filter(|line| !line.ends_with(": holds"))
        .collect();
    assert!(broken.is_empty(), "{broken:?}");
    assert_eq!(claims.count(), 14, "a claim is missing");

    let expected = text
        .lines()
        .find_map(|line| line.strip_prefix("md5 "))
        .unwrap();
    let contents = [&layered, &qcow2, &plain].map(content);
    assert_eq!(md5(&contents[0]), expected);
    assert!(contents.iter().all(|bytes| *bytes == contents[0]));
    // The base never changed, and QEMU finds no fault in the image.
    let mut base = Vec::new();
    File::open(&files.raw)
        .unwrap()
        .read_to_end(&mut base)
        .unwrap();
    assert!(base.iter().all(|byte| *byte == 0x5a));
    drop(qcow2);
    let check = Command::new("qemu-img")
        .args(["check", "-q"])
        .arg(&files.qcow2)
        .status();
    assert!(check.unwrap().success());
}

/// Runs the guest to its end; freezes `layered` now and then once it works under load.
fn run(dir: &Path, devices: Vec<SharedVirtioDevice>, console: &Console, layered: &SharedDisk) {
    let mut events = EventLoop::new().unwrap();
    let devices = devices.into_iter().map(|device| DeviceSlot {
        device,
        registrar: events.reserve(),
    });
    let parts = Parts {
        kvm: Kvm::new().unwrap(),
        memory: GuestMemory::anonymous(&RamLayout::new(256 << 20).unwrap()).unwrap(),
        vcpus: 2,
        console: Box::new(console.clone()),
        devices: devices.collect(),
        confine_vcpu: Arc::new(|| Ok(())),
    };
    let mut machine = Machine::new(parts, &mut events).unwrap();
    machine.boot(&mut kernel(dir)).unwrap();
    machine.resume().unwrap();
    let end = Instant::now() + PATIENCE;
    let mut freezes = 0;
    let mut frozen_at = Instant::now();
    while machine.exit().is_none() {
        assert!(Instant::now() < end, "the guest takes too long");
        events.run_once(50).unwrap();
        let loaded = freezes > 0 || console.text().contains("under load");
        if loaded && freezes < 5 && frozen_at.elapsed() > Duration::from_millis(100) {
            machine.pause().unwrap();
            let top = ephemeral(Some(dir)).unwrap();
            layered.lock().unwrap().freeze(top, true).unwrap();
            machine.resume().unwrap();
            freezes += 1;
            frozen_at = Instant::now();
        }
    }
    assert!(
        matches!(machine.exit(), Some(Exit::PowerOff)),
        "{:?}",
        machine.exit()
    );
    assert!(freezes > 0, "nothing was frozen under load");
    assert_eq!(layered.lock().unwrap().layers().len(), freezes + 1);
}

fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout)[..32].to_owned()
}

fn asset(name: &str) -> PathBuf {
    let variable = "CLONE_TEST_ASSETS";
    let folder = std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run this with `cargo xtask test`"));
    PathBuf::from(folder).join(name)
}

/// The tiny RAM disk of all test guests, with this test's `init` over it.
fn kernel(dir: &Path) -> Kernel {
    let mut initrd = fs::read(asset("guest-initramfs/initramfs.cpio")).unwrap();
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    append(&mut initrd, "init", 0o100_755, include_bytes!("init.sh"));
    append(&mut initrd, "TRAILER!!!", 0, b"");
    let path = dir.join("initrd");
    fs::write(&path, initrd).unwrap();
    let quick = "i8042.noaux i8042.nokbd i8042.nomux i8042.nopnp 8250.nr_uarts=1 \
                 random.trust_cpu=on tsc=reliable cryptomgr.notests mitigations=off";
    Kernel {
        image: File::open(asset("guest-kernel/vmlinux")).unwrap(),
        initrd: Some(File::open(path).unwrap()),
        cmdline: format!("console=ttyS0 panic=-1 quiet {quick}"),
    }
}

/// Adds a file to a cpio archive of the "newc" kind.
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let (len, name_len) = (content.len() as u32, name.len() as u32 + 1);
    archive.extend(b"070701");
    for field in [0, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
