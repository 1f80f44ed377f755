//! Commands against a VM whose agent means harm: one that drips, one that floods, one that sends
//! what a terminal would act on. The VM is a directory, a process that sleeps and two sockets.
#![allow(clippy::unwrap_used)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::frame::encode;
use agent_proto::messages::{
    Error, FileInfo, FromAgent, Hello, Output as Printed, Started, from_agent::Kind,
};
use clone_api::VmConfig;
use clone_api::control::{MigrationStatus, VmInfo, VmState};
use clone_api::jail::JailStatus;
use clone_host::runtime::Runtime;
use clone_start::Process;
use clone_start::VmDir;
use clone_start::document::Parent;

/// What a command may take on a machine under load, where no wait in it is longer than 5 seconds.
const SOON: Duration = Duration::from_secs(20);
/// What a terminal would act on.
const EVIL: &str = "\u{1b}]0;owned\u{7}\u{1b}[2J";

/// What the agent does once it is connected with.
type Act = fn(&mut UnixStream) -> io::Result<()>;

struct FakeVm {
    root: tempfile::TempDir,
    process: Child,
}

impl FakeVm {
    fn new(act: Act) -> Self {
        let root = tempfile::tempdir().unwrap();
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let runtime = Runtime::at(&root.path().join("run")).unwrap();
        let config = VmConfig {
            name: "a".into(),
            kernel: "k".into(),
            ..VmConfig::default()
        };
        let vm = runtime.create(&config).unwrap();
        vm.dir.write_config(&config).unwrap();
        vm.dir
            .write_process(Process::of(process.id()).unwrap())
            .unwrap();
        vm.dir.write_parent(&Parent::default()).unwrap();
        serve_agent(&vm.dir, act);
        serve_control(&vm.dir, config);
        Self { root, process }
    }

    /// Runs a command, which ends soon.
    fn run(&self, words: &[&str]) -> Output {
        let begun = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_clone"))
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.root.path().join("run"))
            .env("CLONE_CACHE_DIR", self.root.path().join("cache"))
            .output()
            .unwrap();
        assert!(begun.elapsed() < SOON, "{words:?}: {:?}", begun.elapsed());
        output
    }

    fn fails(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(!output.status.success(), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!told.contains('\u{1b}'), "{told:?}");
        told
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn send(stream: &mut UnixStream, kind: Kind) -> io::Result<()> {
    let mut bytes = Vec::new();
    encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
    stream.write_all(&bytes)
}

fn serve_agent(dir: &VmDir, act: Act) {
    let listener = UnixListener::bind(dir.vsock_socket()).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut connect = String::new();
                BufReader::new(&stream).read_line(&mut connect)?;
                stream.write_all(b"OK 1\n")?;
                act(&mut stream)
            });
        }
    });
}

/// Answers what the VM is, and takes every command as done.
fn serve_control(dir: &VmDir, config: VmConfig) {
    let listener = UnixListener::bind(dir.control_socket()).unwrap();
    let info = VmInfo {
        name: config.name.clone(),
        state: VmState::Running,
        pid: 1,
        started_unix_ms: 0,
        share_failures: Default::default(),
        version: "0".into(),
        config,
        rewound: None,
        timeline: Vec::new(),
        jail: JailStatus::default(),
    };
    let info = serde_json::to_string(&info).unwrap();
    let migration = serde_json::to_string(&MigrationStatus::default()).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read_exact(&mut byte).is_err() {
                    break;
                }
                request.push(byte[0]);
            }
            let request = String::from_utf8_lossy(&request);
            let body = match request.split(' ').take(2).collect::<Vec<_>>()[..] {
                ["GET", path] if path.ends_with("/migration") => migration.as_str(),
                ["GET", _] => info.as_str(),
                _ => "{}",
            };
            let len = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len}\r\n\
                 connection: close\r\n\r\n{body}"
            );
        }
    });
}

fn greet(stream: &mut UnixStream) -> io::Result<()> {
    let hello = Hello {
        agent_version: EVIL.into(),
        ..Hello::default()
    };
    send(stream, Kind::Hello(hello))
}

/// A message of half a mebibyte, a byte now and then.
fn drip(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(&[0, 0, 8, 0])?;
    loop {
        thread::sleep(Duration::from_millis(50));
        stream.write_all(&[0])?;
    }
}

/// A command's output without end.
fn flood(stream: &mut UnixStream) -> io::Result<()> {
    greet(stream)?;
    send(
        stream,
        Kind::Started(Started {
            id: 1,
            pid: 2,
            ..Started::default()
        }),
    )?;
    let mut cursor = 0;
    loop {
        let data = vec![b'x'; 64 << 10];
        let len = data.len() as u64;
        let output = Printed {
            stream: 0,
            cursor,
            data,
        };
        send(stream, Kind::Output(output))?;
        cursor += len;
    }
}

#[test]
fn a_guest_whose_agent_drips_is_stopped_by_force() {
    let vm = FakeVm::new(|stream| {
        greet(stream)?;
        drip(stream)
    });
    let begun = Instant::now();
    let stopped = vm.run(&["stop", "--force", "--timeout", "1", "a"]);
    assert!(stopped.status.success(), "{stopped:?}");
    // Not before the guest had its time.
    assert!(begun.elapsed() > Duration::from_secs(1));
}

#[test]
fn an_agent_that_drips_is_given_up_by_a_snapshot() {
    let vm = FakeVm::new(drip);
    let target = vm.root.path().join("template");
    let begun = Instant::now();
    // The agent's version is all that is wanted of it; the VM itself makes no snapshot.
    let told = vm.fails(&["snapshot", "--output", target.to_str().unwrap(), "a"]);
    assert!(!told.is_empty());
    assert!(
        begun.elapsed() > Duration::from_secs(4),
        "nobody was asked: {told}"
    );
}

#[test]
fn an_exec_with_a_flood_of_output_ends_with_a_clear_error() {
    let vm = FakeVm::new(flood);
    let told = vm.fails(&["--json", "exec", "a", "yes"]);
    assert!(told.contains("67108864 bytes of output"), "{told}");
}

#[test]
fn a_refusal_reaches_a_terminal_in_printable_characters() {
    let vm = FakeVm::new(|stream| {
        greet(stream)?;
        let error = Error {
            code: 3,
            message: EVIL.repeat(1000),
        };
        send(stream, Kind::Error(error))?;
        thread::sleep(SOON);
        Ok(())
    });
    for words in [
        &["exec", "a", "true"][..],
        &["--json", "exec", "a", "true"],
        &["cp", "a:/f", "-"],
    ] {
        let told = vm.fails(words);
        assert!(told.contains("owned"), "{told}");
        assert!(told.len() < 2000, "{words:?}: {} bytes", told.len());
    }
}

#[test]
fn a_file_without_an_end_does_not_fill_the_disk() {
    let vm = FakeVm::new(|stream| {
        greet(stream)?;
        send(stream, Kind::File(FileInfo::default()))?;
        loop {
            send(stream, Kind::Data(vec![0; 64 << 10]))?;
        }
    });
    // A small file system, so that it is soon full.
    let target = vm.root.path().join("small");
    std::fs::create_dir(&target).unwrap();
    let script = r#"mount -t tmpfs -o size=32m tmpfs "$0" && exec "$1" cp a:/f "$0/f""#;
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(&target)
        .arg(env!("CARGO_BIN_EXE_clone"))
        .env("CLONE_RUNTIME_DIR", vm.root.path().join("run"))
        .env("CLONE_CACHE_DIR", vm.root.path().join("cache"))
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && told.contains("bytes of a file"),
        "{told}"
    );
}
