//! The agent as process 1 of a machine that costs nothing: process, mount, network, host name and
//! IPC namespaces of its own, a root in memory with the host's programs in it, and a Unix socket in
//! place of vsock. What an agent does in a guest is tried here, in well under a second. Needs root.
#![allow(clippy::unwrap_used)]

mod commands;
mod furniture;
mod identity;
mod init;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::client::{ByteLimit, ClientError, Collected, Connection, Deadline};
use agent_proto::messages::{ErrorCode, Exec, Exited};

const LIMIT: Duration = Duration::from_secs(30);
/// More than any command of these tests prints.
const MOST: ByteLimit = ByteLimit::new(64 << 20);
/// Lays out the root and becomes the agent. $1 is the root, $2 its agent, $3 its size, $4 a script
/// that changes the root before it is used.
const BOOT: &str = r#"
set -e
mount -t tmpfs -o "size=$3,mode=0755" tmpfs "$1"
cd "$1"
mkdir dev etc proc sys run tmp var root usr agent
chmod 1777 tmp
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
mount --bind /usr usr
touch agent/agent && mount --bind "$2" agent/agent
echo base > etc/hostname
printf 'root:x:0:0::/root:/bin/sh\nada:x:1000:1000::/:/bin/sh\nweb:x:33:33::/:/usr/sbin/nologin\n' > etc/passwd
printf 'root:x:0:\nada:x:1000:\nstaff:x:50:ada\n' > etc/group
eval "$4"
exec chroot . /agent/agent --listen unix:/run/agent
"#;

/// A machine, as far as its processes see.
struct Machine {
    unshare: Child,
    init: i32,
    // The root is mounted here in the machine's own namespace.
    _folder: tempfile::TempDir,
}

impl Machine {
    fn boot() -> Self {
        Self::boot_with("")
    }

    /// `script` runs in the machine's root directory before its start.
    fn boot_with(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let unshare = Command::new("unshare")
            .args([
                "--pid",
                "--mount",
                "--net",
                "--uts",
                "--ipc",
                "--kill-child",
            ])
            .args(["/bin/sh", "-c", BOOT, "boot"])
            .arg(folder.path())
            .arg(env!("CARGO_BIN_EXE_clone-agent"))
            .args(["32m", script])
            .spawn()
            .unwrap();
        let mut machine = Self {
            unshare,
            init: 0,
            _folder: folder,
        };
        let children = format!("/proc/{0}/task/{0}/children", machine.unshare.id());
        machine.wait_for("process 1", |machine| {
            let children = fs::read_to_string(&children).unwrap_or_default();
            machine.init = children.trim().parse().unwrap_or(0);
            machine.init != 0
        });
        // The root is the machine's only once its init runs.
        machine.wait_for("an agent", |machine| machine.stream().is_ok());
        machine
    }

    fn wait_for(&mut self, what: &str, mut is_there: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !is_there(self) {
            let ended = self.unshare.try_wait().unwrap();
            assert!(ended.is_none(), "the machine ended before it had {what}");
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A path of the machine, as seen from outside. Absolute links in it lead outside.
    fn path(&self, path: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.init)).join(path.trim_start_matches('/'))
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn stream(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.path("run/agent"))
    }

    fn connect(&self) -> Connection {
        Connection::greet(self.stream().unwrap(), Deadline::after(LIMIT)).unwrap()
    }

    /// Runs a command to its end.
    fn exec(&self, exec: Exec) -> (Exited, String, String) {
        let running = self.connect().exec(exec).unwrap();
        let Collected {
            exited,
            stdout,
            stderr,
            ..
        } = running.collect(MOST).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (exited, text(stdout), text(stderr))
    }

    /// What a script prints that must succeed.
    fn run(&self, script: &str) -> String {
        let (exited, stdout, stderr) = self.exec(shell(script));
        assert_eq!(exited.code, Some(0), "{script}: {stdout}{stderr}");
        stdout
    }

    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.unshare.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the machine does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Killing `unshare` alone would leave process 1 behind; without its child it ends.
        if let Some(init) = rustix::process::Pid::from_raw(self.init)
            && matches!(self.unshare.try_wait(), Ok(None))
        {
            let _ = rustix::process::kill_process(init, rustix::process::Signal::KILL);
        }
        let _ = self.unshare.wait();
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn shell(script: &str) -> Exec {
    Exec {
        command: words(&["/bin/sh", "-c", script]),
        directory: "/".to_owned(),
        ..Exec::default()
    }
}

fn refusal<T>(result: Result<T, ClientError>) -> (ErrorCode, String) {
    match result {
        Err(ClientError::Refused(error)) => (error.code(), error.message),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}
