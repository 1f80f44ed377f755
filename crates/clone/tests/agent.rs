//! Commands and files through the agent of a guest, as far as no guest is needed: the test plays the
//! guest's part.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::frame::{self, Decoder};
use agent_proto::messages::{
    Empty, Exec, FileInfo, FromAgent, FromHost, Hello, Put, Started, from_agent, from_host,
    request::Operation,
};
use clone_api::VmConfig;
use clone_host::runtime::Runtime;
use clone_start::Process;

/// A VM called `a` whose process is this test.
struct Guest {
    folder: tempfile::TempDir,
    listener: UnixListener,
}

/// One connection of the host's, from the agent's side.
struct Session {
    stream: UnixStream,
    decoder: Decoder,
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(&folder.path().join("run")).unwrap();
        let config = VmConfig {
            name: "a".into(),
            kernel: "k".into(),
            ..VmConfig::default()
        };
        let vm = runtime.create(&config).unwrap();
        vm.dir.write_config(&config).unwrap();
        vm.dir
            .write_process(Process::of(std::process::id()).unwrap())
            .unwrap();
        let listener = UnixListener::bind(vm.dir.vsock_socket()).unwrap();
        Self { folder, listener }
    }

    fn command(&self, words: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_clone"))
            .args(words)
            .current_dir(self.folder.path())
            .env("CLONE_RUNTIME_DIR", self.folder.path().join("run"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Greets the next connection, and takes its request.
    fn accept(&self, hello: Hello) -> (Session, Operation) {
        let (mut stream, _) = self.listener.accept().unwrap();
        let mut asked = [0; 13];
        stream.read_exact(&mut asked).unwrap();
        stream.write_all(b"OK 1\n").unwrap();
        let mut session = Session {
            stream,
            decoder: Decoder::default(),
        };
        session.send(from_agent::Kind::Hello(hello));
        let Some(from_host::Kind::Request(request)) = session.receive() else {
            panic!("no request")
        };
        (session, request.operation.unwrap())
    }

    /// A command that runs.
    fn accept_exec(&self) -> (Session, Exec) {
        let (mut session, operation) = self.accept(Hello::default());
        let Operation::Exec(exec) = operation else {
            panic!("{operation:?}")
        };
        session.send(from_agent::Kind::Started(Started {
            id: 1,
            pid: 2,
            ..Started::default()
        }));
        (session, exec)
    }
}

impl Session {
    fn send(&mut self, kind: from_agent::Kind) {
        let mut bytes = Vec::new();
        frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next message; none where the host has hung up.
    fn receive(&mut self) -> Option<from_host::Kind> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next::<FromHost>().unwrap() {
                return message.kind;
            }
            let len = self.stream.read(&mut chunk).unwrap();
            if len == 0 {
                return None;
            }
            self.decoder.push(&chunk[..len]);
        }
    }
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

fn end(child: Child) -> Output {
    let pid = rustix::process::Pid::from_child(&child);
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || {
        if waiting.recv_timeout(Duration::from_secs(20)).is_err() {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    let _ = done.send(());
    output
}

/// Waits until `child` has taken its signals over.
fn wait_until_signals_are_taken(child: &Child) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let term = 1_u64 << (libc::SIGTERM - 1);
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let blocked = status.lines().find_map(|it| it.strip_prefix("SigBlk:"));
        if u64::from_str_radix(blocked.unwrap().trim(), 16).unwrap() & term != 0 {
            return;
        }
        assert!(Instant::now() < deadline, "signals are not taken over");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn signals_reach_a_command_that_takes_no_input_and_the_third_ends_the_wait() {
    use rustix::process::Signal;
    let guest = Guest::new();
    let mut child = guest.command(&["exec", "-i", "a", "--", "hang"]);
    let mut stdin = child.stdin.take().unwrap();
    // More than the window of input: whoever sends it waits for ever.
    thread::spawn(move || stdin.write_all(&vec![0; 4 << 20]));
    let (mut session, _) = guest.accept_exec();
    wait_until_signals_are_taken(&child);
    for sent in [Signal::TERM, Signal::INT] {
        signal(&child, sent);
        loop {
            match session.receive().expect("it has hung up") {
                from_host::Kind::Signal(got) => break assert_eq!(got, sent.as_raw()),
                from_host::Kind::Stdin(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    signal(&child, Signal::INT);
    let output = end(child);
    assert_eq!(output.status.code(), Some(128 + libc::SIGINT), "{output:?}");
}

#[test]
fn a_guest_that_never_starts_a_command_does_not_keep_its_user() {
    let guest = Guest::new();
    let child = guest.command(&["exec", "a", "true"]);
    let (_session, _) = guest.accept(Hello::default());
    signal(&child, rustix::process::Signal::INT);
    let output = end(child);
    assert_ne!(output.status.code(), Some(0));
}

#[test]
fn a_shell_is_the_user_s_and_older_agents_get_one_too() {
    let guest = Guest::new();
    let child = guest.command(&["shell", "a"]);
    let (session, exec) = guest.accept_exec();
    assert!(exec.login_shell && exec.input && exec.terminal.is_some());
    assert_eq!(exec.command[0], "/bin/sh");
    drop(session);
    assert_eq!(end(child).status.code(), Some(125));
    let child = guest.command(&["shell", "a", "top"]);
    let (_session, exec) = guest.accept_exec();
    assert!(!exec.login_shell);
    drop(_session);
    end(child);
}

#[test]
fn a_command_that_an_older_agent_cannot_take_is_said_to_be_too_long() {
    let guest = Guest::new();
    let mut words = vec!["exec", "a", "echo"];
    let long = "x".repeat(100_000);
    words.extend([long.as_str(); 12]);
    let child = guest.command(&words);
    let (mut stream, _) = guest.listener.accept().unwrap();
    stream.read_exact(&mut [0; 13]).unwrap();
    stream.write_all(b"OK 1\n").unwrap();
    let mut session = Session {
        stream,
        decoder: Decoder::default(),
    };
    session.send(from_agent::Kind::Hello(Hello::default()));
    let output = end(child);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{told}");
    assert!(told.contains("too long"), "{told}");
}

#[test]
fn a_file_out_of_a_guest_goes_through_devices_and_into_directories() {
    let guest = Guest::new();
    let path = |name: &str| guest.folder.path().join(name);
    std::fs::create_dir(path("dir")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), rustix::fs::Mode::RWXU).unwrap();
    let reader = thread::spawn({
        let pipe = path("pipe");
        move || std::fs::read_to_string(pipe).unwrap()
    });
    for target in ["dir", "pipe", "/dev/null", "/dev/stdout"] {
        let child = guest.command(&["cp", "a:/etc/motd", target]);
        let (mut session, operation) = guest.accept(Hello::default());
        assert!(matches!(operation, Operation::Get(_)));
        session.send(from_agent::Kind::File(FileInfo {
            size: 5,
            mode: 0o640,
        }));
        session.send(from_agent::Kind::Data(b"hello".to_vec()));
        session.send(from_agent::Kind::Done(Empty {}));
        let output = end(child);
        assert!(output.status.success(), "{target}: {output:?}");
        if target == "/dev/stdout" {
            assert_eq!(output.stdout, b"hello");
        }
    }
    assert_eq!(std::fs::read(path("dir/motd")).unwrap(), b"hello");
    assert_eq!(reader.join().unwrap(), "hello");
    use std::os::unix::fs::FileTypeExt;
    let kind = |path: &std::path::Path| std::fs::metadata(path).unwrap().file_type();
    assert!(kind(&path("pipe")).is_fifo());
    assert!(kind("/dev/null".as_ref()).is_char_device());
}

#[test]
fn a_file_into_a_guest_takes_its_name_along() {
    let guest = Guest::new();
    std::fs::write(guest.folder.path().join("own"), "x").unwrap();
    for (to, path) in [("a:/etc", "/etc"), ("a:/etc/", "/etc/own")] {
        let child = guest.command(&["cp", "own", to]);
        let (mut session, operation) = guest.accept(Hello::default());
        let Operation::Put(Put {
            path: got, name, ..
        }) = operation
        else {
            panic!("{operation:?}")
        };
        assert_eq!((got.as_str(), name.as_str()), (path, "own"));
        session.send(from_agent::Kind::Done(Empty {}));
        assert!(end(child).status.success());
    }
}
