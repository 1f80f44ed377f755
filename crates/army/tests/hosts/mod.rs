//! A controller in this network, and three hosts in others behind one bridge.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const PATIENCE: Duration = Duration::from_secs(300);
pub const HOSTS: [&str; 3] = ["one", "two", "three"];
pub const BRIDGE: &str = "army-test";
pub const CONTROLLER: &str = "10.77.0.1";

/// A controller in this network, and hosts in others behind one bridge.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub controller: Option<Child>,
    pub nodes: [Option<Child>; 3],
    pub url: String,
    pub key: String,
}

impl Cluster {
    pub fn new() -> Self {
        let mut cluster = Self {
            // Not under the shared target folder, which holds no sockets.
            dir: tempfile::tempdir_in("/run").unwrap(),
            controller: None,
            nodes: [None, None, None],
            url: String::new(),
            key: String::new(),
        };
        remove_networks();
        ip(&format!("link add {BRIDGE} type bridge"));
        ip(&format!("addr add {CONTROLLER}/24 dev {BRIDGE}"));
        ip(&format!("link set {BRIDGE} up"));
        cluster.start_controller();
        for (index, host) in HOSTS.iter().enumerate() {
            ip(&format!("netns add army-{host}"));
            ip(&format!(
                "link add army-{host} type veth peer name eth0 netns army-{host}"
            ));
            ip(&format!("link set army-{host} master {BRIDGE} up"));
            ip(&format!(
                "-n army-{host} addr add 10.77.0.{}/24 dev eth0",
                index + 11
            ));
            ip(&format!("-n army-{host} link set eth0 up"));
            ip(&format!("-n army-{host} link set lo up"));
            let token = cluster.army(&["host", "token"]);
            cluster.start_node(index, token["token"].as_str());
        }
        cluster
    }

    pub fn start_controller(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_army"));
        command.args(["controller", "--listen", "127.0.0.1:0", "--cluster-listen"]);
        command.arg(format!("{CONTROLLER}:7778"));
        command.env("ARMY_STATE", self.dir.path().join("controller"));
        self.controller = Some(start(&mut command, |line| {
            if let Some(words) = line.trim().strip_prefix("export ") {
                self.key = words.split("ARMY_KEY=").nth(1).unwrap().to_owned();
            }
            if let Some(rest) = line.strip_prefix("Army answers at ") {
                self.url = rest.split(';').next().unwrap().to_owned();
                return true;
            }
            false
        }));
    }

    /// Starts a host's node; the first time with a token.
    pub fn start_node(&mut self, index: usize, token: Option<&str>) {
        let host = HOSTS[index];
        let mut command = self.on(host, Path::new(env!("CARGO_BIN_EXE_army")));
        command.args(["node", "--name", host]);
        if let Some(token) = token {
            command.args(["--controller", &format!("{CONTROLLER}:7778")]);
            command.env("ARMY_TOKEN", token);
        }
        self.nodes[index] = Some(start(&mut command, |line| line.starts_with("The node of")));
    }

    /// A program on a host: in its network, with its directories.
    pub fn on(&self, host: &str, program: &Path) -> Command {
        let dir = self.dir.path().join(host);
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/army-{host}"))
            .arg(program)
            .env("CLONE_RUNTIME_DIR", dir.join("run"))
            .env("CLONE_TEMPLATE_DIR", dir.join("templates"))
            .env("CLONE_SUSPENDED_DIR", dir.join("suspended"))
            .env("ARMY_STATE", dir.join("state"))
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::null());
        command
    }

    /// Makes the template `tiny` on a host, of a guest that holds a nonce.
    pub fn make_template(&self, host: &str, nonce: &str) {
        let assets = std::env::var_os("CLONE_TEST_ASSETS")
            .expect("set CLONE_TEST_ASSETS, or run `cargo xtask test --guest`");
        let assets = PathBuf::from(assets);
        let file = |name: &str| assets.join(name).to_str().unwrap().to_owned();
        let kernel = file("guest-kernel/vmlinux");
        let initrd = file("guest-initramfs/initramfs.cpio");
        let program = Path::new(env!("CARGO_BIN_EXE_army")).with_file_name("clone");
        let run = |words: &[&str]| {
            let output = self.on(host, &program).args(words).output().unwrap();
            assert!(output.status.success(), "{words:?}: {output:?}");
        };
        run(&[
            "run", "-d", "-n", "base", "-m", "128M", "-k", &kernel, "-i", &initrd,
        ]);
        let script = format!("echo {nonce} > /run/nonce");
        run(&["exec", "--wait", "300", "base", "sh", "-c", &script]);
        run(&["snapshot", "base", "-o", "tiny"]);
        run(&["kill", "base"]);
    }

    pub fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_army"))
            .args(words)
            .env("ARMY_URL", &self.url)
            .env("ARMY_KEY", &self.key)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    pub fn army(&self, words: &[&str]) -> Value {
        let words = [&["--json"], words].concat();
        let output = self.run(&words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// What a script prints in a VM.
    pub fn guest(&self, vm: &str, script: &str) -> String {
        let result = self.army(&["exec", vm, "sh", "-c", script]);
        assert_eq!(result["exit_code"], 0, "{result}");
        result["stdout"].as_str().unwrap().trim().to_owned()
    }

    /// One of the many VMs, on `host`, awake.
    pub fn vm_on(&self, host: &str) -> String {
        let vms = self.army(&["vm", "ls"]);
        let mut vms = vms.as_array().unwrap().iter();
        let vm = vms.find(|vm| {
            let name = vm["name"].as_str().unwrap();
            vm["host"] == host && name.starts_with("w-")
        });
        let name = vm.unwrap()["name"].as_str().unwrap().to_owned();
        self.army(&["vm", "resume", &name]);
        name
    }

    pub fn state_of(&self, vm: &str) -> Value {
        self.army(&["vm", "inspect", vm])["state"].clone()
    }

    pub fn host_is(&self, host: &str, state: &str) -> bool {
        let hosts = self.army(&["host", "ls"]);
        let mut hosts = hosts.as_array().unwrap().iter();
        hosts.any(|it| it["name"] == host && it["state"] == state)
    }

    pub fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "waited too long: {what}");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Waits until an event of this kind is told.
    pub fn wait_for_event(&self, kind: &str) {
        let mut reader = Command::new(env!("CARGO_BIN_EXE_army"))
            .args(["events", "--after", "0"])
            .env("ARMY_URL", &self.url)
            .env("ARMY_KEY", &self.key)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Where there is none, the test's own limit ends it.
        let lines = BufReader::new(reader.stdout.take().unwrap()).lines();
        let told = lines.map(Result::unwrap).any(|line| line.contains(kind));
        reader.kill().unwrap();
        reader.wait().unwrap();
        assert!(told, "no event {kind}");
    }

    /// VMs that run on a host, by their directories.
    pub fn there(&self, host: &str) -> usize {
        let list = std::fs::read_dir(self.dir.path().join(host).join("run/vms"));
        let names = list.into_iter().flatten().flatten();
        names
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("army-"))
            .count()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let nodes = self.nodes.iter_mut().filter_map(Option::take);
        for mut process in nodes.chain(self.controller.take()) {
            let _ = process.kill().and_then(|()| process.wait());
        }
        // Of a test that failed; VMs outlive their node.
        for host in HOSTS {
            let list = std::fs::read_dir(self.dir.path().join(host).join("run/vms"));
            for entry in list.into_iter().flatten().flatten() {
                if let Ok(text) = std::fs::read_to_string(entry.path().join("pid"))
                    && let Some(pid) = text.split_whitespace().next()
                {
                    let _ = Command::new("kill").args(["-9", pid]).status();
                }
            }
        }
        remove_networks();
    }
}

/// Starts a server, and returns when a line of its output is the one that is waited for.
fn start(command: &mut Command, mut ready: impl FnMut(&str) -> bool) -> Child {
    let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let started = lines.by_ref().any(|line| ready(&line.unwrap()));
    assert!(started, "{command:?} did not start");
    // What it says later is read, so that it never waits for us.
    std::thread::spawn(move || lines.for_each(drop));
    server
}

pub fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

fn remove_networks() {
    let quiet = |words: &str| {
        let mut command = Command::new("ip");
        let _ = command
            .args(words.split(' '))
            .stderr(Stdio::null())
            .status();
    };
    for host in HOSTS {
        quiet(&format!("netns del army-{host}"));
    }
    quiet(&format!("link del {BRIDGE}"));
}
