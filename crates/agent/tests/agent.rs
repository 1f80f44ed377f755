//! The agent through its public door, on this host over a Unix socket.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::client::{ByteLimit, ClientError, Collected, Connection, Deadline, Event};
use agent_proto::messages::{Acknowledge, ErrorCode, Exec, Put, Stream, TerminalSize};

struct Agent {
    process: Child,
    folder: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_clone-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", folder.path().join("agent").display()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Its first line says that it listens.
        let mut line = [0; 20];
        process
            .stderr
            .take()
            .unwrap()
            .read_exact(&mut line)
            .unwrap();
        Self { process, folder }
    }

    fn raw(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("agent")).unwrap()
    }

    fn connect(&self) -> Connection {
        Connection::greet(self.raw(), soon()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn resident_kib(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn shell(script: &str) -> Exec {
    let command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    Exec {
        command,
        directory: "/".to_owned(),
        user: user(),
        ..Default::default()
    }
}

/// Ourselves: only root can be somebody else.
/// The most that a test reads from a guest.
const MOST: ByteLimit = ByteLimit::new(64 << 20);

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(120))
}

fn user() -> String {
    rustix::process::getuid().as_raw().to_string()
}

fn run(agent: &Agent, script: &str) -> (Option<i32>, String, String) {
    let running = agent.connect().exec(shell(script)).unwrap();
    let collected = running.collect(MOST).unwrap();
    (
        collected.exited.code,
        String::from_utf8(collected.stdout).unwrap(),
        String::from_utf8(collected.stderr).unwrap(),
    )
}

fn refusal<T>(result: Result<T, ClientError>) -> (ErrorCode, String) {
    match result {
        Err(ClientError::Refused(error)) => (error.code(), error.message),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn outputs_are_apart_and_the_exit_status_is_the_command_s() {
    let agent = Agent::start();
    let result = run(&agent, "echo out; echo err >&2; exit 7");
    assert_eq!(result, (Some(7), "out\n".to_owned(), "err\n".to_owned()));
}

#[test]
fn a_hundred_mebibytes_arrive_intact() {
    let agent = Agent::start();
    let mut running = agent
        .connect()
        .exec(shell(
            "head -c 104857600 /dev/urandom | tee /proc/self/fd/2 | cat; exit 3",
        ))
        .unwrap();
    let mut hashes = [blake3::Hasher::new(), blake3::Hasher::new()];
    let mut sizes = [0, 0];
    loop {
        match running.next_event().unwrap() {
            Event::Output(stream, data) => {
                hashes[stream as usize].update(&data);
                sizes[stream as usize] += data.len();
            }
            Event::Exited(exited) => break assert_eq!(exited.code, Some(3)),
            Event::Lost(..) => panic!("lost output"),
        }
    }
    assert_eq!(sizes, [104_857_600, 104_857_600]);
    assert_eq!(hashes[0].finalize(), hashes[1].finalize());
}

#[test]
fn input_of_any_size_comes_back_through_cat() {
    let agent = Agent::start();
    let mut running = agent
        .connect()
        .exec(Exec {
            input: true,
            ..shell("cat")
        })
        .unwrap();
    let input = running.input();
    let sent: Vec<u8> = (0..3_000_000u32)
        .map(|i| (i * 7 + i / 1000) as u8)
        .collect();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        input.write(&copy).unwrap();
        input.end().unwrap();
    });
    let mut received = Vec::new();
    loop {
        match running.next_event().unwrap() {
            Event::Output(Stream::Stdout, data) => received.extend(data),
            Event::Exited(exited) => break assert_eq!(exited.code, Some(0)),
            other => panic!("{other:?}"),
        }
    }
    writer.join().unwrap();
    assert!(sent == received);
}

#[test]
fn input_that_is_never_read_does_not_keep_the_end_from_being_told() {
    let agent = Agent::start();
    let exec = Exec {
        input: true,
        ..shell("exec 0<&-; head -c 1000000 /dev/zero; exit 4")
    };
    let running = agent.connect().exec(exec).unwrap();
    let input = running.input();
    let writer = thread::spawn(move || {
        // Ends with an error or not, but ends.
        let _ = input.write(&vec![0; 2 << 20]);
    });
    let collected = running.collect(MOST).unwrap();
    let code = collected.exited.code;
    assert_eq!((code, collected.stdout.len()), (Some(4), 1_000_000));
    writer.join().unwrap();
}

#[test]
fn fifty_commands_run_side_by_side() {
    let agent = Agent::start();
    let running: Vec<_> = (0..50)
        .map(|i| {
            agent
                .connect()
                .exec(shell(&format!("sleep 0.3; echo {i}")))
                .unwrap()
        })
        .collect();
    for (i, running) in running.into_iter().enumerate() {
        let stdout = running.collect(MOST).unwrap().stdout;
        assert_eq!(stdout, format!("{i}\n").into_bytes());
    }
}

#[test]
fn what_many_commands_needed_is_given_back_after_them() {
    let agent = Agent::start();
    let burst = || {
        thread::scope(|scope| {
            for _ in 0..50 {
                scope.spawn(|| run(&agent, "head -c 300000 /dev/zero; sleep 0.2"));
            }
        });
    };
    let before = agent.resident_kib();
    burst();
    let deadline = Instant::now() + Duration::from_secs(20);
    // Pages of the program itself that it had not touched yet, and of few threads' stacks, stay.
    while agent.resident_kib() > before + (4 << 10) {
        assert!(Instant::now() < deadline, "{} KiB", agent.resident_kib());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn signals_reach_the_command_and_its_children() {
    let agent = Agent::start();
    let mut running = agent
        .connect()
        .exec(shell("sleep 1000 & echo go; wait"))
        .unwrap();
    assert!(matches!(running.next_event().unwrap(), Event::Output(..)));
    running.input().signal(libc::SIGKILL).unwrap();
    let exited = running.collect(MOST).unwrap().exited;
    assert_eq!((exited.code, exited.signal), (None, Some(libc::SIGKILL)));
}

#[test]
fn a_command_over_its_time_ends_with_all_its_children() {
    let agent = Agent::start();
    let marker = agent.path("marker");
    let script = format!("(sleep 4; touch {}) & sleep 100", marker.display());
    let start = Instant::now();
    let exec = Exec {
        timeout_ms: 200,
        ..shell(&script)
    };
    let running = agent.connect().exec(exec).unwrap();
    let exited = running.collect(MOST).unwrap().exited;
    assert!(exited.timed_out);
    assert!(start.elapsed() < Duration::from_secs(4));
    thread::sleep(Duration::from_millis(4300));
    assert!(!marker.exists(), "a child outlived the command");
}

#[test]
fn a_terminal_has_the_size_that_it_is_given() {
    let agent = Agent::start();
    let terminal = Some(TerminalSize {
        rows: 24,
        columns: 80,
    });
    let exec = Exec {
        terminal,
        input: true,
        ..shell("stty size; read x; stty size; tty")
    };
    let running = agent.connect().exec(exec).unwrap();
    let input = running.input();
    // Whenever it is applied before the read ends, the second answer tells.
    input
        .resize(TerminalSize {
            rows: 50,
            columns: 132,
        })
        .unwrap();
    thread::sleep(Duration::from_millis(300));
    input.write(b"\n").unwrap();
    let text = String::from_utf8(running.collect(MOST).unwrap().stdout).unwrap();
    assert!(text.contains("50 132"), "{text:?}");
    assert!(text.contains("/dev/pts/"), "{text:?}");
}

#[test]
fn a_lost_connection_loses_no_output() {
    let agent = Agent::start();
    let script = "i=0; while [ $i -lt 40000 ]; do echo line $i; i=$((i+1)); done";
    let mut running = agent.connect().exec(shell(script)).unwrap();
    let id = running.started().id;
    let mut text = Vec::new();
    loop {
        for _ in 0..3 {
            match running.next_event() {
                Ok(Event::Output(_, data)) => text.extend(data),
                Ok(Event::Exited(_)) => {
                    let expected: String = (0..40_000).map(|i| format!("line {i}\n")).collect();
                    assert!(text == expected.into_bytes());
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
        let arrived = running.arrived();
        drop(running);
        running = agent.connect().attach(id, arrived).unwrap();
    }
}

#[test]
fn a_detached_command_goes_on_alone_and_keeps_its_newest_output() {
    let agent = Agent::start();
    let script = "head -c 3000000 /dev/zero | tr '\\0' x; echo the end";
    let running = agent
        .connect()
        .exec(Exec {
            detached: true,
            ..shell(script)
        })
        .unwrap();
    let id = running.started().id;
    drop(running);
    let deadline = Instant::now() + Duration::from_secs(20);
    while agent
        .connect()
        .commands()
        .unwrap()
        .iter()
        .any(|c| c.id == id && c.exited.is_none())
    {
        assert!(
            Instant::now() < deadline,
            "the detached command was held up"
        );
        thread::sleep(Duration::from_millis(20));
    }
    let running = agent.connect().attach(id, Acknowledge::default()).unwrap();
    let Collected { exited, stdout, .. } = running.collect(MOST).unwrap();
    assert_eq!(exited.code, Some(0));
    assert!(stdout.ends_with(b"the end\n"));
    // It is forgotten when the agent has read that all has arrived, which nobody waits for.
    while let Ok(running) = agent.connect().attach(id, Acknowledge::default()) {
        assert!(Instant::now() < deadline, "the command is not forgotten");
        drop(running);
        thread::sleep(Duration::from_millis(20));
    }
    let (code, message) = refusal(agent.connect().attach(id, Acknowledge::default()));
    assert_eq!(
        (code, message.contains("no command")),
        (ErrorCode::NotFound, true)
    );
}

#[test]
fn a_reader_that_does_not_read_costs_the_agent_little_memory() {
    let agent = Agent::start();
    let before = agent.resident_kib();
    let _running = agent
        .connect()
        .exec(shell("head -c 500000000 /dev/zero"))
        .unwrap();
    thread::sleep(Duration::from_millis(800));
    let grown = agent.resident_kib() - before;
    assert!(grown < 4096, "{grown} KiB");
}

#[test]
fn what_cannot_run_says_why() {
    let agent = Agent::start();
    let exec = |command: &[&str]| Exec {
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        user: user(),
        ..Default::default()
    };
    let (code, message) = refusal(agent.connect().exec(exec(&["/no/such/program"])));
    assert_eq!(code, ErrorCode::NotFound);
    assert!(message.contains("/no/such/program"), "{message}");
    assert_eq!(
        refusal(agent.connect().exec(exec(&[]))).0,
        ErrorCode::Invalid
    );
    let nowhere = Exec {
        directory: "/no/such/folder".to_owned(),
        ..exec(&["true"])
    };
    assert!(
        refusal(agent.connect().exec(nowhere))
            .1
            .contains("/no/such/folder")
    );
    let nobody = Exec {
        user: "no-such-user".to_owned(),
        ..exec(&["true"])
    };
    assert_eq!(refusal(agent.connect().exec(nobody)).0, ErrorCode::NotFound);
    let odd = Exec {
        environment: vec!["=x".to_owned()],
        ..exec(&["true"])
    };
    assert_eq!(refusal(agent.connect().exec(odd)).0, ErrorCode::Invalid);
}

fn put(path: &Path, mode: u32) -> Put {
    Put {
        path: path.display().to_string(),
        mode,
        user: user(),
        ..Put::default()
    }
}

#[test]
fn a_seed_goes_into_the_kernel_and_only_root_may_credit_it() {
    let agent = Agent::start();
    let identity = agent_proto::messages::Identity {
        seed: (0..=200).collect(),
        ..Default::default()
    };
    let result = agent.connect().set_identity(identity);
    if rustix::process::geteuid().is_root() {
        result.unwrap();
    } else {
        assert_eq!(refusal(result).0, ErrorCode::Denied);
    }
}

#[test]
fn a_put_does_not_replace_what_is_no_file() {
    let agent = Agent::start();
    let socket = agent.path("agent");
    for path in [socket.as_path(), Path::new("/dev/null")] {
        let (code, message) = refusal(agent.connect().put(put(path, 0o644), &mut &b"x"[..]));
        assert_eq!(code, ErrorCode::Invalid);
        assert!(message.contains(path.to_str().unwrap()), "{message}");
    }
    assert!(agent.connect().info().is_ok());
}

#[test]
fn commands_do_not_inherit_what_the_agent_alone_is_allowed() {
    let agent = Agent::start();
    let own = |path: &str| std::fs::read_to_string(path).unwrap().trim().to_owned();
    let limit = |limits: &str| {
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        line.unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let (_, score, _) = run(&agent, "cat /proc/self/oom_score_adj");
    assert_eq!(score.trim(), "0");
    let (_, limits, _) = run(&agent, "cat /proc/self/limits");
    // The test was started with the same limits as the agent.
    assert_eq!(limit(&limits), limit(&own("/proc/self/limits")));
}

#[test]
fn an_agent_without_free_descriptors_keeps_its_commands_and_comes_back() {
    let agent = Agent::start();
    let mut running = agent
        .connect()
        .exec(shell("read line; echo $line"))
        .unwrap();
    let limit = |files: Option<u64>| {
        let pid = rustix::process::Pid::from_child(&agent.process);
        let resource = rustix::process::Resource::Nofile;
        let maximum = rustix::process::getrlimit(resource).maximum;
        let limit = rustix::process::Rlimit {
            current: files.or(maximum),
            maximum,
        };
        rustix::process::prlimit(Some(pid), resource, limit).unwrap()
    };
    limit(Some(4));
    // The first gets the descriptor that the waiting agent has reserved, and has none to work with.
    let _first = agent.raw();
    let starved = agent.raw();
    // Longer than the agent's pause: it tries, fails, and tries again.
    thread::sleep(Duration::from_millis(300));
    limit(None);
    assert!(Connection::greet(starved, soon()).unwrap().info().is_ok());
    running.input().end().unwrap();
    while !matches!(running.next_event().unwrap(), Event::Exited(_)) {}
}

#[test]
fn only_the_agent_s_own_user_may_connect_to_its_socket() {
    use std::os::unix::fs::PermissionsExt;
    let agent = Agent::start();
    let mode = std::fs::metadata(agent.path("agent"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn files_go_in_and_out_with_their_modes() {
    let agent = Agent::start();
    let content: Vec<u8> = (0..500_000u32).map(|i| (i / 3) as u8).collect();
    let path = agent.path("a file with 'odd' \n name");
    agent
        .connect()
        .put(put(&path, 0o640), &mut content.as_slice())
        .unwrap();
    let mut back = Vec::new();
    let info = agent
        .connect()
        .get(path.to_str().unwrap(), &mut back, MOST)
        .unwrap();
    assert_eq!(
        (info.mode, info.size, back == content),
        (0o640, 500_000, true)
    );
}

#[test]
fn a_put_that_fails_leaves_nothing_and_says_why() {
    let agent = Agent::start();
    let folder = agent.path("folder");
    std::fs::create_dir(&folder).unwrap();
    for (path, expected) in [
        (folder.clone(), ErrorCode::Invalid),
        (agent.path("missing/file"), ErrorCode::NotFound),
        (PathBuf::from("relative"), ErrorCode::Invalid),
    ] {
        let content = vec![0; 1 << 20];
        let (code, _) = refusal(
            agent
                .connect()
                .put(put(&path, 0o600), &mut content.as_slice()),
        );
        assert_eq!(code, expected, "{}", path.display());
    }
    assert_eq!(
        refusal(agent.connect().get("/dev/zero", &mut Vec::new(), MOST)).0,
        ErrorCode::Invalid
    );
    // A connection lost in the middle.
    let mut raw = agent.raw();
    let request = agent_proto::messages::Request {
        operation: Some(agent_proto::messages::request::Operation::Put(put(
            &folder.join("x"),
            0,
        ))),
    };
    let mut bytes = Vec::new();
    let message = agent_proto::messages::FromHost {
        kind: Some(agent_proto::messages::from_host::Kind::Request(request)),
    };
    agent_proto::frame::encode(&message, &mut bytes).unwrap();
    raw.write_all(&bytes).unwrap();
    drop(raw);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn hostile_bytes_end_their_connection_and_nothing_else() {
    let agent = Agent::start();
    for bytes in [
        &[0xFF; 64][..],
        b"GET / HTTP/1.1\r\n\r\n",
        &[4, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF],
    ] {
        let mut raw = agent.raw();
        raw.write_all(bytes).unwrap();
        raw.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut rest = Vec::new();
        raw.read_to_end(&mut rest).unwrap();
    }
    assert_eq!(run(&agent, "echo alive").1, "alive\n");
}

#[test]
fn the_guest_tells_about_itself() {
    let agent = Agent::start();
    let info = agent.connect().info().unwrap();
    assert!(info.memory_total > info.memory_available && info.uptime_ms > 0);
    assert!(!info.kernel.is_empty() && info.clock_ns > 0);
}

/// A server on the loopback, which is the agent's, too: sends back what it gets, and `end` when its
/// client has ended.
fn echo_server() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut back = stream.try_clone().unwrap();
                std::io::copy(&mut stream, &mut back).unwrap();
                back.write_all(b"end").unwrap();
            });
        }
    });
    port
}

#[test]
fn a_connection_to_a_port_carries_bytes_both_ways_and_each_end_by_itself() {
    let agent = Agent::start();
    let port = echo_server();
    let (mut out, into) = agent.connect().connect(port).unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    let writer = thread::spawn({
        let sent = sent.clone();
        move || {
            into.write(&sent).unwrap();
            into.end().unwrap();
            into
        }
    });
    let mut came = Vec::new();
    while let Some(bytes) = out.read().unwrap() {
        came.extend(bytes);
    }
    let into = writer.join().unwrap();
    assert_eq!(came.len(), sent.len() + 3);
    assert!(came.starts_with(&sent) && came.ends_with(b"end"));
    // Who hangs up ends it for all.
    into.disconnect();
    assert!(out.read().is_err());
}

#[test]
fn a_server_learns_that_its_client_went() {
    let agent = Agent::start();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (out, into) = agent.connect().connect(port).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    into.write(b"hello").unwrap();
    let mut text = [0; 5];
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    drop((out, into));
    assert_eq!(server.read(&mut text).unwrap(), 0);
}

#[test]
fn nobody_at_a_port_is_told_apart_from_a_port_that_is_none() {
    let agent = Agent::start();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let (code, message) = refusal(agent.connect().connect(port));
    assert_eq!(code, ErrorCode::NotFound);
    assert!(message.contains(&port.to_string()), "{message}");
    assert_eq!(refusal(agent.connect().connect(0)).0, ErrorCode::Invalid);
}
