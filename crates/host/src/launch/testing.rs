//! Test support: a VM without a guest, with an agent that a test controls.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use agent_proto::frame::encode;
use agent_proto::messages::{FromAgent, Hello, from_agent};
use clone_api::VmConfig;
use clone_start::Process;

use crate::runtime::{RunningVm, Runtime};

/// The agent's actions after its greeting, until the host closes the connection.
pub(super) type Act = fn(&mut UnixStream) -> io::Result<()>;

/// The VM; its process is the test's process.
pub(super) struct FakeVm {
    _root: tempfile::TempDir,
    runtime: Runtime,
}

impl FakeVm {
    /// Makes a VM whose agent greets, sends `first`, and then runs `act`.
    pub(super) fn new(first: Vec<u8>, act: Act) -> Self {
        let root = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(root.path()).unwrap();
        let config = VmConfig {
            name: "a".into(),
            kernel: "k".into(),
            ..VmConfig::default()
        };
        let vm = runtime.create(&config).unwrap();
        vm.dir.write_config(&config).unwrap();
        vm.dir.write_guest_network(&[]).unwrap();
        vm.dir
            .write_process(Process::of(std::process::id()).unwrap())
            .unwrap();
        let listener = UnixListener::bind(vm.dir.vsock_socket()).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let first = first.clone();
                std::thread::spawn(move || talk(&mut stream.unwrap(), &first, act));
            }
        });
        Self {
            _root: root,
            runtime,
        }
    }

    pub(super) fn running(&self) -> RunningVm {
        self.runtime.find("a").unwrap()
    }
}

fn talk(stream: &mut UnixStream, first: &[u8], act: Act) -> io::Result<()> {
    let mut connect = String::new();
    BufReader::new(&*stream).read_line(&mut connect)?;
    let mut greeting = b"OK 1\n".to_vec();
    let hello = FromAgent {
        kind: Some(from_agent::Kind::Hello(Hello::default())),
    };
    encode(&hello, &mut greeting).unwrap();
    stream.write_all(&greeting)?;
    stream.write_all(first)?;
    loop {
        act(stream)?;
    }
}
