//! The agent as process 1, in a process and mount namespace of its own. There the kernel tells the
//! end of the machine by the signal that process 1 ends with (reboot(2)). Needs root.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::client::{ByteLimit, Connection, Deadline};
use agent_proto::messages::Exec;

const LIMIT: Duration = Duration::from_secs(30);

/// A machine, as far as its processes see.
struct Machine {
    unshare: Child,
    // Not in /tmp, nor where a work tree in there would be: that is covered inside.
    folder: tempfile::TempDir,
}

impl Machine {
    fn boot() -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let unshare = Command::new("unshare")
            .args(["--pid", "--mount", "--net", "--fork"])
            .arg(env!("CARGO_BIN_EXE_clone-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", folder.path().join("agent").display()))
            .spawn()
            .unwrap();
        Self { unshare, folder }
    }

    fn connect(&self) -> Connection {
        let deadline = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(self.folder.path().join("agent")) {
                Ok(stream) => return Connection::greet(stream, Deadline::after(LIMIT)).unwrap(),
                Err(error) => assert!(Instant::now() < deadline, "no agent: {error}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn run(&self, script: &str) -> String {
        let exec = Exec {
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            directory: "/".to_owned(),
            ..Exec::default()
        };
        let running = self.connect().exec(exec).unwrap();
        let collected = running.collect(ByteLimit::new(1 << 20)).unwrap();
        String::from_utf8(collected.stdout).unwrap()
    }

    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.unshare.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the machine does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Killing `unshare` alone would leave process 1 behind; without its child it ends.
        let children = format!("/proc/{0}/task/{0}/children", self.unshare.id());
        let children = std::fs::read_to_string(children).unwrap_or_default();
        for pid in children.split_whitespace() {
            let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = self.unshare.wait();
    }
}

#[test]
fn orphans_are_reaped_and_the_machine_is_furnished() {
    let machine = Machine::boot();
    assert_eq!(
        machine.run("readlink /proc/1/exe"),
        machine.run("readlink /proc/$PPID/exe")
    );
    machine.run("(sh -c 'exit 3' & exec sleep 0.2) & exit 0");
    let deadline = Instant::now() + LIMIT;
    while machine
        .run("grep -l '^State:.Z' /proc/[0-9]*/status")
        .lines()
        .count()
        > 0
    {
        assert!(Instant::now() < deadline, "a zombie stays");
    }
    let mounts = machine.run("cut -d ' ' -f 2,3 /proc/self/mounts");
    for mount in ["/proc proc", "/run tmpfs", "/tmp tmpfs"] {
        assert!(
            mounts.lines().any(|line| line == mount),
            "no {mount} in {mounts}"
        );
    }
}

#[test]
fn a_shutdown_ends_the_processes_and_powers_off() {
    let mut machine = Machine::boot();
    let said = machine.folder.path().join("said");
    let script = format!(
        "(trap 'echo bye > {0}; exit' TERM; sleep 1000 & : > {0}.ready; wait) &
         until [ -e {0}.ready ]; do sleep 0.05; done",
        said.display()
    );
    machine.run(&script);
    machine.connect().shutdown(false).unwrap();
    // LINUX_REBOOT_CMD_POWER_OFF shows as SIGINT; unshare passes it on as its own end.
    assert_eq!(ended_by(machine.end()), 2);
    assert!(
        Path::new(&said).exists(),
        "the process was not asked to end"
    );
}

#[test]
fn a_reboot_is_told_from_a_power_off() {
    let mut machine = Machine::boot();
    machine.connect().shutdown(true).unwrap();
    // LINUX_REBOOT_CMD_RESTART shows as SIGHUP.
    assert_eq!(ended_by(machine.end()), 1);
}

#[test]
fn sigterm_powers_off() {
    let mut machine = Machine::boot();
    let exec = Exec {
        command: ["/bin/sh", "-c", "kill -TERM 1"]
            .map(str::to_owned)
            .to_vec(),
        ..Exec::default()
    };
    // The connection may end before the answer.
    let _ = machine.connect().exec(exec);
    assert_eq!(ended_by(machine.end()), 2);
}

fn ended_by(status: ExitStatus) -> i32 {
    status
        .signal()
        .or(status.code().map(|code| code - 128))
        .unwrap()
}
