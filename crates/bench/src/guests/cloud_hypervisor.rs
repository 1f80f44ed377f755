//! Cloud Hypervisor, where a path to its binary is given: boots, and goes on from its snapshots.
//!
//! It has no switch for the paravirtual end of interrupt, which its guests have, as ours do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::peer::{PeerVm, Sockets};
use super::{
    CMDLINE, Guest, Machine, connect_when_there, http, time_to_first_line, wait_for_agent,
};
use crate::context::Context;

/// The thread that brings a guest's memory.
const FILLER: &str = "uffd-handler";
/// How long it may take.
const FILL_LIMIT: Duration = Duration::from_secs(120);

/// The time to its guest's first line; the machine is gone then.
pub(crate) fn boot(context: &Context, program: &Path, machine: &Machine) -> Result<Duration> {
    let sockets = Sockets::fresh(&context.scratch(""), "cloud-hypervisor");
    let mut command = Command::new(program);
    add_machine(&mut command, machine, &sockets.vsock);
    time_to_first_line(command).map(|(time, _process)| time)
}

/// How a guest's memory comes back, by Cloud Hypervisor's names.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum Restore {
    /// All of it before the guest runs: the default.
    Copy,
    /// What the guest touches when it does, by userfaultfd, and all else in the background.
    OnDemand,
}

/// A snapshot of Cloud Hypervisor's, of a guest whose agent was up: a folder.
pub(crate) struct Snapshot {
    program: PathBuf,
    folder: PathBuf,
    /// The machine's description, which is in it.
    config: Value,
}

/// Its files, by Cloud Hypervisor's names.
const CONFIG: &str = "config.json";
const SHARED: [&str; 2] = ["state.json", "memory-ranges"];

impl Snapshot {
    /// Boots `machine`, waits for its agent, and takes the snapshot.
    pub(crate) fn take(context: &Context, program: &Path, machine: &Machine) -> Result<Self> {
        let folder = context.scratch("ch");
        fs::create_dir_all(&folder)?;
        let Sockets { api, vsock } = Sockets::fresh(&folder, "base");
        let mut command = command(program, &api);
        add_machine(&mut command, machine, &vsock);
        let base = PeerVm::spawn(command, &vsock)?;
        wait_for_agent(&base)?;
        put(&api, "vm.pause", None)?;
        put(
            &api,
            "vm.snapshot",
            Some(json!({ "destination_url": url(&folder) })),
        )?;
        let config = fs::read(folder.join(CONFIG)).context("the snapshot's description")?;
        Ok(Self {
            program: program.to_owned(),
            config: serde_json::from_slice(&config)?,
            folder,
        })
    }

    /// A machine that goes on from the snapshot, and the time from before its process was started
    /// until its API said that it runs.
    pub(crate) fn fork(&self, number: usize, restore: Restore) -> Result<(PeerVm, Duration)> {
        let name = format!("{restore:?}-{number}");
        let Sockets { api, vsock } = Sockets::fresh(&self.folder, &name);
        let folder = self.with_vsock(&name, &vsock)?;
        let start = Instant::now();
        let forked = PeerVm::spawn(command(&self.program, &api), &vsock)?;
        drop(connect_when_there(&api)?);
        let restore = json!({
            "source_url": url(&folder),
            "memory_restore_mode": restore,
            "resume": true,
        });
        put(&api, "vm.restore", Some(restore))?;
        Ok((forked, start.elapsed()))
    }

    /// The same snapshot with another socket, which is told nowhere but in its description.
    fn with_vsock(&self, name: &str, vsock: &Path) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder)?;
        for name in SHARED {
            symlink(self.folder.join(name), folder.join(name))?;
        }
        let mut config = self.config.clone();
        config["vsock"]["socket"] = json!(vsock);
        fs::write(folder.join(CONFIG), config.to_string())?;
        Ok(folder)
    }
}

/// Waits until all of a guest's memory is there: what goes on in the background would be charged
/// to the next machine.
pub(crate) fn filled(guest: &PeerVm) -> Result<()> {
    let limit = Instant::now() + FILL_LIMIT;
    while has_thread(guest.pid(), FILLER)? {
        anyhow::ensure!(Instant::now() < limit, "a guest's memory is never there");
        // Nothing tells when it is.
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn has_thread(pid: u32, name: &str) -> Result<bool> {
    let path = format!("/proc/{pid}/task");
    for task in fs::read_dir(&path).with_context(|| format!("cannot read {path}"))? {
        // One that has just ended has no name any more.
        let named = fs::read_to_string(task?.path().join("comm"));
        if named.is_ok_and(|named| named.trim_end() == name) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn command(program: &Path, api: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("--api-socket").arg(api);
    command
}

/// Its ACPI tables say that it has no keyboard controller, and at that port is only a way to reset:
/// a kernel told not to believe them (`nopnp`) waits a second for an answer.
fn cmdline() -> String {
    CMDLINE.replace(" i8042.nopnp", "")
}

/// It always has a source of random numbers.
fn add_machine(command: &mut Command, machine: &Machine, vsock: &Path) {
    command
        .args(["--serial", "tty", "--console", "off", "--cpus"])
        .arg(format!("boot={}", machine.vcpus))
        .arg("--memory")
        .arg(format!("size={}M", machine.memory_mib))
        .arg("--kernel")
        .arg(&machine.kernel)
        .arg("--initramfs")
        .arg(&machine.initramfs)
        .args(["--cmdline", &cmdline()]);
    if machine.standard_devices {
        command
            .args(["--balloon", "size=0,free_page_reporting=on", "--vsock"])
            .arg(format!("cid=3,socket={}", vsock.display()));
    }
}

fn put(api: &Path, action: &str, body: Option<Value>) -> Result<()> {
    http::send(api, "PUT", &format!("/api/v1/{action}"), body)
}

fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::{CMDLINE, FILLER, cmdline, has_thread};

    #[test]
    fn the_filling_thread_is_seen_while_it_is_there() {
        let own = std::process::id();
        assert!(!has_thread(own, FILLER).unwrap());
        let (started, is_started) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let body = move || {
            started.send(()).unwrap();
            let _ = ended.recv();
        };
        let filler = thread::Builder::new().name(FILLER.to_owned()).spawn(body);
        is_started.recv().unwrap();
        assert!(has_thread(own, FILLER).unwrap());
        drop(end);
        filler.unwrap().join().unwrap();
    }

    #[test]
    fn one_word_less_is_on_its_command_line() {
        let words = |line: &str| line.split_whitespace().count();
        assert_eq!(words(&cmdline()) + 1, words(CMDLINE));
    }
}
