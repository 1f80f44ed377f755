//! QEMU's process: started, found again, ended, and explained when it dies.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::image::Image;
use super::{INSIDE_ADDRESS, PORTS, Size, client};

/// How long a testbed may take to answer before it is given up.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Lines of the console shown when a testbed dies.
const TAIL: usize = 40;
const PANIC: &str = "Kernel panic";
/// QEMU says this of features of the CPU's model at every start.
const NOISE: &str = "TCG doesn't support requested feature";
const PID_FILE: &str = "pid";
const DEFAULT_MIB: u32 = 8192;
/// Several corrupt what runs in them: docs/testbed.md.
const DEFAULT_CPUS: u32 = 1;
/// How folders of testbeds begin that end with the process that started them; its number and the
/// testbed's name follow.
const OWNED: &str = "run-";
const CONSOLE: &str = "console.log";
const QEMU_LOG: &str = "qemu.log";
/// The emulated CPUs' registers whenever one is reset: how it was when it could not go on.
const CPU_LOG: &str = "cpu.log";
const TRIPLE_FAULT: &str = "Triple fault";
/// Where the spare device of the VFIO flavour is put on its bus.
const SPARE_DEVICE: &str = "0000:00:10.0";

/// A running testbed. One that this process started for itself ends with this value.
pub(crate) struct Testbed {
    folder: PathBuf,
    pid: Pid,
    kind: Kind,
    /// Ours to end.
    child: Option<Child>,
}

/// What a testbed is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    mib: u32,
    cpus: u32,
    vfio: bool,
    forward: Option<(u16, u16)>,
}

impl Kind {
    fn new(size: &Size) -> Self {
        Self {
            mib: size.mem.unwrap_or(DEFAULT_MIB),
            cpus: size.cpus.unwrap_or(DEFAULT_CPUS),
            vfio: size.vfio,
            forward: size.forward,
        }
    }

    /// Whether it is as `size` asks for.
    fn suits(self, size: &Size) -> bool {
        size.mem.is_none_or(|mib| mib == self.mib)
            && size.cpus.is_none_or(|cpus| cpus == self.cpus)
            && (self.vfio || !size.vfio)
            && (size.forward.is_none() || size.forward == self.forward)
    }

    /// The fields after PID and start time in the PID file.
    fn parse<'a>(mut fields: impl Iterator<Item = &'a str>) -> Option<Self> {
        Some(Self {
            mib: fields.next()?.parse().ok()?,
            cpus: fields.next()?.parse().ok()?,
            vfio: fields.next()?.parse().ok()?,
            // A forwarded port is not looked for in a testbed that is up.
            forward: None,
        })
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.mib, self.cpus, self.vfio)
    }
}

impl Testbed {
    /// The testbed of this work tree that `up` left running.
    pub(crate) fn find() -> Result<Option<Self>> {
        let folder = up_folder();
        let Ok(text) = fs::read_to_string(folder.join(PID_FILE)) else {
            return Ok(None);
        };
        let mut fields = text.split_whitespace();
        let pid = fields
            .next()
            .and_then(|field| field.parse().ok())
            .and_then(Pid::from_raw);
        let Some(pid) = pid else { return Ok(None) };
        // A process with that number but another start time is somebody else's.
        let same = start_time(pid).is_some_and(|time| Some(time.as_str()) == fields.next());
        Ok((same && test_kill_process(pid).is_ok()).then(|| Self {
            folder,
            pid,
            // Builds of before wrote no kind, and had one only.
            kind: Kind::parse(fields).unwrap_or_else(|| Kind::new(&Size::default())),
            child: None,
        }))
    }

    /// Starts one in the background, or returns the one that is up.
    pub(crate) fn up(size: &Size) -> Result<Self> {
        let state = crate::paths::testbed_state();
        fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
        // Two at once would clear each other's folder.
        let lock = File::create(state.join("up.lock"))?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock the testbed's state")?;
        if let Some(mut testbed) = Self::find()? {
            if !testbed.kind.suits(size) {
                bail!(
                    "a testbed of another kind is up ({} MiB, {} CPUs{}): end it with `cargo xtask testbed down`",
                    testbed.kind.mib,
                    testbed.kind.cpus,
                    if testbed.kind.vfio { ", VFIO" } else { "" }
                );
            }
            testbed.wait_ready()?;
            return Ok(testbed);
        }
        let mut testbed = Self::launch(up_folder(), size, false)?;
        let time = start_time(testbed.pid).context("the testbed ended at once")?;
        // Before it is ready: should we be ended while we wait, `down` still finds it.
        fs::write(
            testbed.folder.join(PID_FILE),
            format!("{} {time} {}", testbed.pid, testbed.kind),
        )?;
        testbed.wait_ready()?;
        // It goes on without us.
        testbed.child = None;
        Ok(testbed)
    }

    /// The one that is up, else a fresh one that ends with this value.
    pub(crate) fn find_or_start(size: &Size) -> Result<Self> {
        if let Some(testbed) = Self::find()?.filter(|testbed| testbed.kind.suits(size)) {
            return Ok(testbed);
        }
        Self::start(size, super::SINGLE)
    }

    /// The one whose state is in `folder`, which another process started and ends.
    pub(crate) fn at(folder: PathBuf) -> Result<Self> {
        let text = fs::read_to_string(folder.join(PID_FILE))
            .with_context(|| format!("no testbed is in {}", folder.display()))?;
        let pid = text.split_whitespace().next();
        let pid = pid
            .and_then(|field| field.parse().ok())
            .and_then(Pid::from_raw);
        Ok(Self {
            pid: pid.with_context(|| format!("no testbed is in {}", folder.display()))?,
            folder,
            kind: Kind::new(&Size::default()),
            child: None,
        })
    }

    /// A fresh one that ends with this value. `name` tells it from others of this process.
    pub(crate) fn start(size: &Size, name: &str) -> Result<Self> {
        sweep()?;
        let process = std::process::id();
        let folder = crate::paths::testbed_state().join(format!("{OWNED}{process}-{name}"));
        let mut testbed = Self::launch(folder, size, true)?;
        fs::write(testbed.folder.join(PID_FILE), testbed.pid.to_string())?;
        testbed.wait_ready()?;
        Ok(testbed)
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn launch(folder: PathBuf, size: &Size, dies_with_us: bool) -> Result<Self> {
        crate::host::install_packages()?;
        let image = Image::ensure()?;
        let kind = Kind::new(size);
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot clear {}", folder.display()))?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // Cargo may replace our own file while the testbed runs from it.
        let supervisor = folder.join("supervisor");
        fs::copy("/proc/self/exe", &supervisor).context("cannot copy the supervisor")?;
        let log = File::create(folder.join(QEMU_LOG))?;
        let mut command = image.qemu();
        command
            .args(arguments(&image, kind, &supervisor)?)
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        if dies_with_us {
            // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl is one.
            unsafe {
                command.pre_exec(|| {
                    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                    Ok(())
                });
            }
        }
        let child = command.spawn().context("cannot start QEMU")?;
        let pid = Pid::from_child(&child);
        Ok(Self {
            folder,
            pid,
            kind,
            child: Some(child),
        })
    }

    /// Waits until the supervisor answers.
    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!(
                    "the testbed ended before it was ready ({status})\n{}",
                    self.logs()
                );
            }
            // The sockets appear with QEMU; once connected, the answer is waited for in the kernel.
            if let Some(answered) = client::ping(self, deadline)? {
                return if answered {
                    Ok(())
                } else {
                    bail!("the testbed does not answer\n{}", self.logs())
                };
            }
            if Instant::now() > deadline {
                bail!(
                    "the testbed did not start within {START_LIMIT:?}\n{}",
                    self.logs()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The ends of QEMU's and the kernel's logs, for an error message.
    pub(super) fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = fs::read(self.folder.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).replace('\r', "");
            let lines: Vec<_> = text
                .lines()
                .filter(|line| !line.trim().is_empty() && !line.contains(NOISE))
                .collect();
            let at = lines.len().saturating_sub(TAIL);
            // A panic's reason stands far above its end.
            let panic = lines[..at].iter().find(|line| line.contains(PANIC));
            let shown = panic.into_iter().chain(&lines[at..]).copied();
            shown.collect::<Vec<_>>().join("\n")
        };
        format!(
            "--- QEMU\n{}{}\n--- console\n{}",
            tail(QEMU_LOG),
            self.triple_fault(),
            tail(CONSOLE)
        )
    }

    /// The CPUs as they were when one could not go on and the machine was reset; else nothing.
    fn triple_fault(&self) -> String {
        let text = fs::read(self.folder.join(CPU_LOG)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        match text.find(TRIPLE_FAULT) {
            Some(at) => format!("\n--- CPUs\n{}", &text[at..]),
            None => String::new(),
        }
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Ends the testbed that is up; false where none was.
pub(super) fn down() -> Result<bool> {
    let Some(testbed) = Testbed::find()? else {
        return Ok(false);
    };
    let pidfd = rustix::process::pidfd_open(testbed.pid, rustix::process::PidfdFlags::empty())?;
    kill_process(testbed.pid, Signal::KILL).context("cannot end the testbed")?;
    let mut gone = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut gone, None)?;
    fs::remove_dir_all(&testbed.folder)?;
    Ok(true)
}

/// Removes what testbeds for single commands left whose process was killed. QEMU went with it.
fn sweep() -> Result<()> {
    let Ok(entries) = fs::read_dir(crate::paths::testbed_state()) else {
        return Ok(());
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(OWNED));
        let owner = rest.and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another process may sweep the same.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

fn up_folder() -> PathBuf {
    crate::paths::testbed_state().join("up")
}

/// When a process started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
fn start_time(pid: Pid) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, a name in parentheses, may hold spaces.
    let rest = stat.rsplit_once(')')?.1;
    rest.split_whitespace().nth(19).map(str::to_owned)
}

/// The network card, where a port is forwarded. Inside it has no route but to this machine.
fn network(kind: Kind) -> String {
    match kind.forward {
        None => "-nic none".to_owned(),
        Some((outside, inside)) => format!(
            "-nic user,ipv6=off,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{outside}-{INSIDE_ADDRESS}:{inside}"
        ),
    }
}

fn arguments(image: &Image, kind: Kind, supervisor: &Path) -> Result<Vec<OsString>> {
    let workspace = crate::paths::workspace();
    let target = crate::paths::target().canonicalize()?;
    let assets = crate::paths::assets().canonicalize()?;
    let assets_apart = !assets.starts_with(&target);
    for path in [&workspace, &target, &assets] {
        let text = path.to_string_lossy();
        if text.contains([' ', ',', '\'', '"']) {
            bail!(
                "the testbed cannot share {text}: move the work tree to a path without spaces, commas and quotes"
            );
        }
    }
    let mut cmdline = format!(
        "console=ttyS0 quiet panic=-1 i8042.noaux i8042.nokbd i8042.nopnp tsc=reliable \
         mitigations=off no_timer_check hpet=disable cryptomgr.notests rcupdate.rcu_expedited=1 random.trust_cpu=on \
         testbed.workspace={} testbed.target={} testbed.supervisor={}",
        workspace.display(),
        target.display(),
        supervisor.canonicalize()?.display(),
    );
    if assets_apart {
        cmdline.push_str(&format!(" testbed.assets={}", assets.display()));
    }
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |text: &str| words.extend(text.split_whitespace().map(OsString::from));
    add("-accel tcg,thread=multi,tb-size=512 -cpu EPYC-v1,+svm,+npt,-xsavec");
    add(&format!("-smp {} -m {}", kind.cpus, kind.mib));
    if kind.vfio {
        add("-M q35,kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on");
        add("-device edu,addr=0x10");
        cmdline.push_str(&format!(" intel_iommu=on testbed.spare={SPARE_DEVICE}"));
    } else {
        add("-M pc");
    }
    add(&format!("-d cpu_reset -D {CPU_LOG}"));
    add("-display none -nodefaults -no-user-config -no-reboot");
    add(&network(kind));
    add(&format!(
        "-chardev file,id=console,path={CONSOLE} -serial chardev:console"
    ));
    let mut share = |tag: &str, path: &Path, mode: &str| {
        add(&format!(
            "-fsdev local,id={tag},path={},security_model=none,multidevs=remap{mode}",
            path.display()
        ));
        add(&format!(
            "-device virtio-9p-pci,fsdev={tag},mount_tag={tag}"
        ));
    };
    share("root", Path::new("/"), ",readonly=on");
    share("workspace", &workspace, ",readonly=on");
    share("target", &target, "");
    if assets_apart {
        share("assets", &assets, "");
    }
    add("-device virtio-serial-pci,max_ports=31 -device virtio-rng-pci");
    for port in 0..PORTS {
        // Relative to QEMU's working directory: socket paths are short.
        add(&format!(
            "-chardev socket,id=port{port},path=port{port},server=on,wait=off"
        ));
        add(&format!(
            "-device virtserialport,chardev=port{port},name=port{port},nr={}",
            port + 1
        ));
    }
    add("-kernel");
    words.push(image.kernel().into());
    words.push("-initrd".into());
    words.push(image.initramfs().into());
    words.push("-append".into());
    words.push(cmdline.into());
    Ok(words)
}
