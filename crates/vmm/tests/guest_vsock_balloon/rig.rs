//! A Linux guest whose only program answers tests over vsock, with a balloon and an entropy device.
//!
//! The machine runs in the test's own thread; the test itself runs beside it as a host would.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use clone_disk::{Disk, DiskFiles, EngineKind, Format, WriteFile};
use clone_memory::{GuestMemory, RamLayout};
use clone_vmm::devices::balloon::{Balloon, BalloonOffer, DiscardRam};
use clone_vmm::devices::block::{Block, BlockConfig};
use clone_vmm::devices::rng::Rng;
use clone_vmm::devices::vsock::{Vsock, VsockResources};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{DeviceSlot, Kernel, Machine, Parts};
use clone_vmm::pci::virtio_pci::SharedVirtioDevice;
use kvm_ioctls::Kvm;

/// The port that the guest's program listens on.
const SERVICE: u32 = 1000;
/// How long any test may take, in the slowest place where tests run.
const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) const RAM: u64 = 256 << 20;

/// What a test does to its guest.
pub(crate) struct Host {
    path: PathBuf,
    balloon: Arc<Mutex<Balloon>>,
    pauses: Sender<Duration>,
}

impl Host {
    /// A stream to the guest's program, which was told `request`. Waits until the guest is up.
    pub(crate) fn ask(&self, request: &str) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(mut stream) = self.connect(SERVICE) {
                writeln!(stream, "{request}").unwrap();
                return stream;
            }
            assert!(Instant::now() < deadline, "the guest never listened");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// A stream to a port, if the guest takes it.
    pub(crate) fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") {
            // A refusal is the end of the stream, or its reset.
            if !matches!(stream.read(&mut byte), Ok(1)) {
                return None;
            }
            line.push(byte[0]);
        }
        assert!(line.starts_with(b"OK "), "{line:?}");
        Some(stream)
    }

    /// The whole answer to a request.
    pub(crate) fn answer(&self, request: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.ask(request).read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// A line of the guest's `/proc/meminfo`, in bytes.
    pub(crate) fn meminfo(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.answer("read /proc/meminfo 10000")).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib << 10
    }

    pub(crate) fn balloon(&self) -> MutexGuard<'_, Balloon> {
        self.balloon.lock().unwrap()
    }

    /// Has the machine paused for a while, soon.
    pub(crate) fn pause_for(&self, span: Duration) {
        self.pauses.send(span).unwrap();
    }

    /// Waits until `what` holds.
    pub(crate) fn until(&self, name: &str, what: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !what() {
            assert!(Instant::now() < deadline, "never: {name}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Boots the guest and runs `test` against it.
pub(crate) fn with_guest(test: impl FnOnce(&Host) + Send + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut events = EventLoop::new().unwrap();
    let memory = GuestMemory::anonymous(&RamLayout::new(RAM).unwrap()).unwrap();
    let release = Box::new(DiscardRam::new(memory.ram().clone()));
    let balloon = Balloon::new(release, BalloonOffer::default()).unwrap();
    let balloon = Arc::new(Mutex::new(balloon));
    let vsock = Vsock::new(VsockResources::new(listener), 3).unwrap();
    let devices: Vec<SharedVirtioDevice> = vec![
        Arc::new(Mutex::new(debian_disk())),
        Arc::new(Mutex::new(vsock)),
        balloon.clone(),
        Arc::new(Mutex::new(Rng::new(None).unwrap())),
    ];
    let devices = devices.into_iter().map(|device| DeviceSlot {
        device,
        registrar: events.reserve(),
    });
    let parts = Parts {
        kvm: Kvm::new().unwrap(),
        memory,
        vcpus: 2,
        console: Box::new(std::io::stdout()),
        devices: devices.collect(),
        confine_vcpu: Arc::new(|| Ok(())),
    };
    let mut machine = Machine::new(parts, &mut events).unwrap();
    machine.boot(&mut kernel(dir.path())).unwrap();
    machine.resume().unwrap();
    let (pauses, asked) = channel();
    let host = Host {
        path,
        balloon,
        pauses,
    };
    let test = thread::spawn(move || test(&host));
    run(&mut machine, &mut events, &asked, || test.is_finished());
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(
    machine: &mut Machine,
    events: &mut EventLoop,
    pauses: &Receiver<Duration>,
    finished: impl Fn() -> bool,
) {
    while !finished() {
        assert!(
            machine.exit().is_none(),
            "the guest ended: {:?}",
            machine.exit()
        );
        events.run_once(50).unwrap();
        if let Ok(span) = pauses.try_recv() {
            machine.pause().unwrap();
            let end = Instant::now() + span;
            while Instant::now() < end {
                events.run_once(10).unwrap();
            }
            machine.resume().unwrap();
        }
    }
}

fn asset(name: &str) -> PathBuf {
    let variable = "CLONE_TEST_ASSETS";
    let folder = std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run this with `cargo xtask test`"));
    PathBuf::from(folder).join(name)
}

fn debian_disk() -> Block {
    let image = File::open(asset("guest-debian/debian.ext4")).unwrap();
    let files = DiskFiles {
        base: Some((image, Format::Raw)),
        backing: Vec::new(),
        layers: Vec::new(),
        writes: WriteFile::Refused,
    };
    let disk = Disk::open(files, EngineKind::Worker).unwrap();
    Block::new(Arc::new(Mutex::new(disk)), &BlockConfig::default()).unwrap()
}

/// The tiny RAM disk of all test guests, with this test's files over it.
fn kernel(dir: &Path) -> Kernel {
    let mut initrd = fs::read(asset("guest-initramfs/initramfs.cpio")).unwrap();
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    append(&mut initrd, "init", 0o100_755, include_bytes!("init.sh"));
    append(
        &mut initrd,
        "service.py",
        0o100_644,
        include_bytes!("service.py"),
    );
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
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        content.len() as u32,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
