//! A host with a template and `army dev`, in a place of its own.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A host with a template, and a server on it.
pub struct Host {
    pub dir: tempfile::TempDir,
    pub server: Option<Child>,
    pub url: String,
    pub key: String,
}

impl Host {
    /// With the template `tiny`, of a guest that holds a nonce.
    pub fn new(nonce: &str) -> Self {
        Self::with(nonce, &[])
    }

    /// The same, of a machine with more of what `clone run` gives.
    pub fn with(nonce: &str, more: &[&str]) -> Self {
        let assets = std::env::var_os("CLONE_TEST_ASSETS")
            .expect("set CLONE_TEST_ASSETS, or run `cargo xtask test --guest`");
        let assets = PathBuf::from(assets);
        let mut host = Self {
            // Not under the shared target folder, which holds no sockets.
            dir: tempfile::tempdir_in("/run").unwrap(),
            server: None,
            url: String::new(),
            key: String::new(),
        };
        let file = |name: &str| assets.join(name).to_str().unwrap().to_owned();
        let kernel = file("guest-kernel/vmlinux");
        let initrd = file("guest-initramfs/initramfs.cpio");
        let run = [
            "run", "-d", "-n", "base", "-c", "2", "-m", "256M", "-k", &kernel, "-i", &initrd,
        ];
        host.clone(&[&run, more].concat());
        let script = format!("echo {nonce} > /run/nonce");
        host.clone(&["exec", "--wait", "300", "base", "sh", "-c", &script]);
        host.clone(&["snapshot", "base", "-o", "tiny"]);
        host.clone(&["kill", "base"]);
        host.start();
        host
    }

    pub fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("CLONE_RUNTIME_DIR", self.dir.path().join("run"))
            .env("CLONE_TEMPLATE_DIR", self.dir.path().join("templates"))
            .env("CLONE_SUSPENDED_DIR", self.suspended())
            .env("ARMY_STATE", self.dir.path().join("state"))
            .env("ARMY_URL", &self.url)
            .env("ARMY_KEY", &self.key)
            .env("ARMY_ALLOW_PLAIN_HTTP", "true")
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::null())
    }

    /// Where its suspended VMs are.
    pub fn suspended(&self) -> std::path::PathBuf {
        self.dir.path().join("suspended")
    }

    pub fn clone(&self, words: &[&str]) {
        let army = Path::new(env!("CARGO_BIN_EXE_army"));
        let mut command = Command::new(army.with_file_name("clone"));
        let output = self.environment(command.args(words)).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    }

    /// Starts the server, and takes its first key.
    pub fn start(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_army"));
        // Another address is where a browser outside of the testbed gets in.
        let listen = std::env::var("CLONE_TEST_LISTEN");
        let listen = listen.as_deref().unwrap_or("127.0.0.1:0");
        command.args(["dev", "--listen", listen, "--host-name", "here"]);
        command.arg("--serve-plain-http");
        let mut server = self
            .environment(&mut command)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        self.server = Some(server);
        for line in lines.by_ref() {
            let line = line.unwrap();
            if let Some(words) = line.trim().strip_prefix("export ") {
                self.key = words.split("ARMY_KEY=").nth(1).unwrap().to_owned();
            }
            if let Some(rest) = line.strip_prefix("Army answers at ") {
                self.url = rest.split(';').next().unwrap().to_owned();
                break;
            }
        }
        assert!(self.url.starts_with("http://"), "the server did not start");
        // What it says later is read, so that it never waits for us.
        std::thread::spawn(move || lines.for_each(drop));
    }

    pub fn kill_server(&mut self) {
        let mut server = self.server.take().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_army"));
        self.environment(command.args(words));
        command
    }

    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    pub fn army(&self, words: &[&str]) -> Value {
        let words = [&["--json"], words].concat();
        let output = self.run(&words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// An answer as it is on the wire, to its end.
    pub fn plain_get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let key = &self.key;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: army\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// What a script prints in a VM.
    pub fn guest(&self, vm: &str, script: &str) -> String {
        let result = self.army(&["exec", vm, "sh", "-c", script]);
        assert_eq!(result["exit_code"], 0, "{result}");
        result["stdout"].as_str().unwrap().trim().to_owned()
    }

    pub fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "waited too long: {what}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until a VM is over, and tells why.
    pub fn end_of(&self, name: &str) -> String {
        let mut reason = String::new();
        self.wait(name, |host| {
            let all = host.army(&["vm", "ls", "--all"]);
            let vm = all.as_array().unwrap().iter().find(|vm| vm["name"] == name);
            let vm = vm.unwrap();
            reason = vm["reason"].as_str().unwrap_or_default().to_owned();
            vm["state"] == "ended"
        });
        reason
    }

    /// VMs that run on the host, by their directories.
    pub fn there(&self) -> Vec<String> {
        let list = std::fs::read_dir(self.dir.path().join("run/vms")).unwrap();
        let names = list.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("army-")).collect()
    }
}

/// A port of a VM, under one of this host while this lives.
pub struct Forwarded {
    process: Child,
    pub local: String,
}

impl Forwarded {
    /// By a command that forwards one port.
    pub fn new(command: &mut Command) -> Self {
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut lines = BufReader::new(process.stdout.take().unwrap());
        lines.read_line(&mut line).unwrap();
        let local = line.split(' ').next().unwrap().to_owned();
        Self { process, local }
    }

    /// What is answered to a request for a page.
    pub fn page(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.local).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        match stream.read_to_string(&mut answer) {
            // Where nobody is at the port, the request was not read when the connection ended.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            read => {
                read.unwrap();
            }
        }
        answer
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.server.is_some() {
            self.kill_server();
        }
        // Of a test that failed; its VMs outlive their server.
        let list = std::fs::read_dir(self.dir.path().join("run/vms"));
        for entry in list.into_iter().flatten().flatten() {
            if let Ok(text) = std::fs::read_to_string(entry.path().join("pid"))
                && let Some(pid) = text.split_whitespace().next()
            {
                let _ = Command::new("kill").args(["-9", pid]).status();
            }
        }
    }
}
