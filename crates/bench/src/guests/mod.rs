//! The machines that are compared: the same kernel, RAM disk, command line, memory, CPUs and, as
//! far as each VMM has them, devices.
//!
//! QEMU's machine is `microvm` with devices on PCI, as ours are. In all guests the same agent
//! answers: QEMU's behind the host's vsock, all others' behind a Unix socket of their VM.

mod clone;
pub(crate) mod cloud_hypervisor;
pub(crate) mod firecracker;
mod http;
mod peer;
mod qemu;
mod qmp;
mod vsock;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::client::{ByteLimit, Connection};
use agent_proto::messages::{Exec, Put};
use anyhow::{Context as _, Result, anyhow, bail};

pub(crate) use self::clone::CloneVm;
pub(crate) use self::qemu::{Qemu, QemuMove, QemuSnapshot};
use crate::context::Context;

/// The RAM disk's first words from user space.
const FIRST_LINE: &str = "guest: user space";
/// How long a guest may take to boot.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long an agent may take to greet once it is there.
const GREETING_LIMIT: Duration = Duration::from_secs(60);
/// The most output of a benchmark's command.
const OUTPUT_LIMIT: ByteLimit = ByteLimit::new(64 << 20);
/// How long another VMM's socket may take to be there.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks for that; nothing tells when it is there.
const LOOK: Duration = Duration::from_micros(500);
const PROGRAM: &str = "/bin/bench-guest";

/// What all VMMs are given.
pub(crate) const MEMORY_MIB: u64 = 256;
/// The command line, the same for all; it spares them looking for hardware that none has.
pub(crate) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 i8042.noaux i8042.nokbd \
                                  i8042.nomux i8042.nopnp 8250.nr_uarts=1 random.trust_cpu=on";

/// What a machine is to have.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u64,
    /// vsock, a balloon and a source of random numbers.
    pub(crate) standard_devices: bool,
    /// A raw image.
    pub(crate) disk: Option<PathBuf>,
    /// Whether that is the root file system; its writes end with the machine.
    pub(crate) root: bool,
    /// A tap device that is there.
    pub(crate) tap: Option<String>,
    /// A bridge that is there, for VMMs that make their tap themselves: ours.
    pub(crate) bridge: Option<String>,
}

impl Machine {
    /// One CPU, vsock, balloon and rng, from the kernel file of that name.
    pub(crate) fn standard(context: &Context, kernel: &str) -> Self {
        Self {
            kernel: context.kernel(kernel),
            initramfs: context.initramfs(),
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            standard_devices: true,
            disk: None,
            root: false,
            tap: None,
            bridge: None,
        }
    }

    /// A stock Debian with systemd, of 512 MiB.
    pub(crate) fn debian(context: &Context) -> Self {
        Self {
            memory_mib: 512,
            disk: Some(context.debian()),
            root: true,
            ..Self::standard(context, "vmlinux")
        }
    }
}

/// A running machine with an agent; ended when dropped.
pub(crate) trait Guest {
    /// A new connection to its agent.
    fn connect(&self) -> Result<Connection>;

    /// The VMM's process.
    fn pid(&self) -> u32;
}

/// What Clone's library says went wrong.
pub(crate) fn told(error: clone_api::ApiError) -> anyhow::Error {
    anyhow!("{}", error.message)
}

/// Connects to a socket that another VMM is about to make.
pub(crate) fn connect_when_there(socket: &Path) -> Result<UnixStream> {
    let end = Instant::now() + SOCKET_LIMIT;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > end => {
                return Err(error).with_context(|| format!("nobody is at {}", socket.display()));
            }
            Err(_) => thread::sleep(LOOK),
        }
    }
}

/// Waits for the agent of a machine that boots.
pub(crate) fn wait_for_agent(guest: &dyn Guest) -> Result<()> {
    let limit = Instant::now() + BOOT_LIMIT;
    loop {
        match guest.connect() {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > limit => {
                return Err(error).context("the guest's agent did not answer");
            }
            // Nothing tells when a guest's program starts to listen.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Runs `words` in the guest and returns what it printed; another end than 0 is an error.
pub(crate) fn exec(guest: &dyn Guest, words: &[&str]) -> Result<String> {
    exec_on(guest.connect()?, words)
}

/// The same on a connection that is there.
pub(crate) fn exec_on(connection: Connection, words: &[&str]) -> Result<String> {
    let exec = Exec {
        command: words.iter().map(|&word| word.to_owned()).collect(),
        ..Exec::default()
    };
    let running = connection.exec(exec)?.streaming();
    let collected = running.collect(OUTPUT_LIMIT)?;
    if collected.exited.code != Some(0) {
        let complaint = String::from_utf8_lossy(&collected.stderr);
        bail!(
            "`{}` in the guest: {:?}: {complaint}",
            words.join(" "),
            collected.exited
        );
    }
    Ok(String::from_utf8_lossy(&collected.stdout).into_owned())
}

/// Copies the measuring program into the guest.
pub(crate) fn put_program(guest: &dyn Guest, context: &Context) -> Result<()> {
    let path = context.guest_program();
    let mut program =
        File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let put = Put {
        path: PROGRAM.to_owned(),
        mode: 0o755,
        ..Put::default()
    };
    Ok(guest.connect()?.put(put, &mut program)?)
}

/// Runs the measuring program in the guest, and returns its figures.
pub(crate) fn measure(guest: &dyn Guest, words: &[&str]) -> Result<Vec<f64>> {
    let printed = exec(guest, &[&[PROGRAM], words].concat())?;
    let figures = printed.lines().map(|line| line.parse::<f64>());
    let figures = figures.collect::<Result<Vec<f64>, _>>();
    let figures = figures.with_context(|| format!("{words:?} printed {printed:?}"))?;
    anyhow::ensure!(!figures.is_empty(), "{words:?} printed nothing");
    Ok(figures)
}

/// The time from before `command` is started until its console, which is its standard output,
/// shows the guest's first line from user space. The process is left to the caller, to be ended.
pub(crate) fn time_to_first_line(mut command: Command) -> Result<(Duration, Ended)> {
    let shown = format!("{:?}", command.get_program());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = Ended(
        command
            .spawn()
            .with_context(|| format!("cannot start {shown}"))?,
    );
    let (console, errors) = (child.0.stdout.take(), child.0.stderr.take());
    let (console, errors) = (console.context("no console")?, errors.context("no errors")?);
    let (sender, seen) = mpsc::channel();
    // Lives until the process closes its output, which is when it is ended.
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if String::from_utf8_lossy(&line).contains(FIRST_LINE) {
                // Nobody waits for a second one.
                let _ = sender.send(start.elapsed());
            }
        }
    });
    match seen.recv_timeout(BOOT_LIMIT) {
        Ok(time) => Ok((time, child)),
        Err(_) => {
            drop(child);
            let said: Vec<_> = BufReader::new(errors)
                .lines()
                .map_while(Result::ok)
                .collect();
            bail!("{shown} booted no guest: {}", said.join("\n"))
        }
    }
}

/// A process that ends with this value.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
