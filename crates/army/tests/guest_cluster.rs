//! A controller and three nodes, each in a network of its own, with real guests.
#![allow(clippy::unwrap_used)]

mod rig;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use rig::Forwarded;

const PATIENCE: Duration = Duration::from_secs(300);
const HOSTS: [&str; 3] = ["one", "two", "three"];
const BRIDGE: &str = "army-test";
const CONTROLLER: &str = "10.77.0.1";
const VMS: usize = 30;

/// A controller in this network, and hosts in others behind one bridge.
struct Cluster {
    dir: tempfile::TempDir,
    controller: Option<Child>,
    nodes: [Option<Child>; 3],
    url: String,
    key: String,
}

impl Cluster {
    fn new() -> Self {
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

    fn start_controller(&mut self) {
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
    fn start_node(&mut self, index: usize, token: Option<&str>) {
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
    fn on(&self, host: &str, program: &Path) -> Command {
        let dir = self.dir.path().join(host);
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/army-{host}"))
            .arg(program)
            .env("CLONE_RUNTIME_DIR", dir.join("run"))
            .env("CLONE_TEMPLATE_DIR", dir.join("templates"))
            .env("ARMY_STATE", dir.join("state"))
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::null());
        command
    }

    /// Makes the template `tiny` on a host, of a guest that holds a nonce.
    fn make_template(&self, host: &str, nonce: &str) {
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

    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_army"))
            .args(words)
            .env("ARMY_URL", &self.url)
            .env("ARMY_KEY", &self.key)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn army(&self, words: &[&str]) -> Value {
        let words = [&["--json"], words].concat();
        let output = self.run(&words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// What a script prints in a VM.
    fn guest(&self, vm: &str, script: &str) -> String {
        let result = self.army(&["exec", vm, "sh", "-c", script]);
        assert_eq!(result["exit_code"], 0, "{result}");
        result["stdout"].as_str().unwrap().trim().to_owned()
    }

    /// One of the many VMs, on `host`, awake.
    fn vm_on(&self, host: &str) -> String {
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

    fn state_of(&self, vm: &str) -> Value {
        self.army(&["vm", "inspect", vm])["state"].clone()
    }

    fn host_is(&self, host: &str, state: &str) -> bool {
        let hosts = self.army(&["host", "ls"]);
        let mut hosts = hosts.as_array().unwrap().iter();
        hosts.any(|it| it["name"] == host && it["state"] == state)
    }

    fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "waited too long: {what}");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Waits until an event of this kind is told.
    fn wait_for_event(&self, kind: &str) {
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
    fn there(&self, host: &str) -> usize {
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

fn ip(words: &str) {
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

#[test]
fn vms_spread_over_hosts_that_come_and_go() {
    let mut cluster = Cluster::new();
    cluster.wait("hosts", |it| {
        HOSTS.iter().all(|host| it.host_is(host, "ready"))
    });
    cluster.make_template("one", "4711-nonce");
    cluster.army(&["template", "register", "tiny", "--host", "one"]);
    // It is taken to one host on demand of a person, and to the other on demand of a VM.
    cluster.army(&["template", "copy", "tiny", "two"]);
    for host in ["one", "two"] {
        cluster.army(&["host", "drain", host]);
    }
    let created = cluster.army(&["vm", "create", "tiny", "-n", "first"]);
    assert_eq!(created["vms"][0]["host"], "three");
    for host in ["one", "two"] {
        cluster.army(&["host", "undrain", host]);
    }
    let template = &cluster.army(&["template", "ls"])[0];
    assert_eq!(template["hosts"], json!(["one", "three", "two"]));

    let count = VMS.to_string();
    let created = cluster.army(&["vm", "create", "tiny", "-n", "w", "--count", &count]);
    let vms = created["vms"].as_array().unwrap();
    assert_eq!(vms.len(), VMS, "{created}");
    let hosts: BTreeSet<&str> = vms.iter().map(|vm| vm["host"].as_str().unwrap()).collect();
    assert_eq!(hosts, BTreeSet::from(HOSTS));
    for vm in vms {
        let name = vm["name"].as_str().unwrap();
        let output = cluster.run(&[
            "exec",
            name,
            "sh",
            "-c",
            "cat /run/nonce; hostname; echo no >&2; exit 4",
        ]);
        assert_eq!(output.status.code(), Some(4), "{name}: {output:?}");
        let expected = format!("4711-nonce\n{name}\n");
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "no\n");
        // Where guests are emulated, thirty that idle take most of the processor.
        cluster.army(&["vm", "pause", name]);
    }
    cluster.army(&["vm", "resume", "w-3"]);
    cluster.army(&["vm", "balloon", "w-3", "32M"]);
    cluster.wait("the balloon", |it| {
        it.army(&["vm", "balloon", "w-3"])["actual_bytes"] == 32 << 20
    });

    a_port_leads_through_controller_and_node(&cluster);
    a_node_is_killed(&mut cluster);
    a_host_is_cut_off(&cluster);

    // A host that is drained gets nothing new, and keeps what it has.
    cluster.army(&["host", "drain", "one"]);
    let before = cluster.there("one");
    let created = cluster.army(&["vm", "create", "tiny", "-n", "late", "--count", "4"]);
    let mut hosts = created["vms"].as_array().unwrap().iter();
    assert!(hosts.all(|vm| vm["host"] != "one"), "{created}");
    assert_eq!(cluster.there("one"), before);
    let kept = cluster.vm_on("one");
    assert_eq!(cluster.guest(&kept, "cat /run/nonce"), "4711-nonce");

    for vm in cluster.army(&["vm", "ls"]).as_array().unwrap() {
        cluster.army(&["vm", "rm", vm["id"].as_str().unwrap()]);
    }
    // A template leaves as a file, and comes to another host than it left from.
    let file = cluster.dir.path().join("tiny.template");
    let file = file.to_str().unwrap();
    cluster.army(&["template", "export", "tiny", file]);
    cluster.army(&["template", "rm", "tiny"]);
    cluster.army(&["template", "import", "tiny", file, "--host", "three"]);
    cluster.army(&["host", "label", "two", "disk=fast"]);
    cluster.army(&["vm", "create", "tiny", "-n", "there", "--on", "disk=fast"]);
    let vm = cluster.army(&["vm", "inspect", "there"]);
    assert_eq!(vm["host"], "two");
    assert_eq!(cluster.guest("there", "cat /run/nonce"), "4711-nonce");
    cluster.army(&["vm", "rm", "there"]);
    cluster.army(&["template", "rm", "tiny"]);
    for host in HOSTS {
        assert_eq!(cluster.there(host), 0, "{host}");
        let template = cluster.dir.path().join(host).join("templates/tiny");
        assert!(!template.exists(), "{host}");
    }
}

/// A connection to a program in a guest on another host.
fn a_port_leads_through_controller_and_node(cluster: &Cluster) {
    let vm = cluster.vm_on("two");
    let serve = "mkdir -p /run/www; echo there > /run/www/page; \
                 httpd -p 127.0.0.1:80 -h /run/www";
    cluster.guest(&vm, serve);
    let mut command = Command::new(env!("CARGO_BIN_EXE_army"));
    command
        .args(["port-forward", &vm, "0:80"])
        .env("ARMY_URL", &cluster.url)
        .env("ARMY_KEY", &cluster.key);
    let answer = Forwarded::new(&mut command).page("/page");
    assert!(answer.ends_with("there\n"), "{answer}");
}

/// A node's process is killed: its VMs go on, and answer when it is back.
fn a_node_is_killed(cluster: &mut Cluster) {
    let vm = cluster.vm_on("two");
    cluster.guest(&vm, "echo kept > /run/kept");
    let mut node = cluster.nodes[1].take().unwrap();
    node.kill().unwrap();
    node.wait().unwrap();
    let refused = cluster.run(&["exec", &vm, "true"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("the host two does not answer"), "{said}");
    cluster.start_node(1, None);
    assert_eq!(cluster.guest(&vm, "cat /run/kept"), "kept");
}

/// A host loses its link: what runs there goes on, everybody is told, and what was asked for in
/// the meantime is done when it is back.
fn a_host_is_cut_off(cluster: &Cluster) {
    let vm = cluster.vm_on("three");
    cluster.guest(
        &vm,
        "(while :; do date +%s >> /run/ticks; sleep 1; done) </dev/null >/dev/null 2>&1 &",
    );
    let ticks = |cluster: &Cluster| -> u64 {
        let lines = cluster.guest(&vm, "wc -l < /run/ticks");
        lines.parse().unwrap()
    };
    ip("link set army-three down");
    cluster.wait("a silent host", |it| it.host_is("three", "unreachable"));
    cluster.wait("its VMs", |it| it.state_of(&vm) == "unreachable");
    cluster.wait_for_event("host.unreachable");
    // Nobody is placed there, and who is to go is remembered.
    let created = cluster.army(&["vm", "create", "tiny", "-n", "elsewhere"]);
    assert_ne!(created["vms"][0]["host"], "three");
    cluster.army(&["vm", "rm", "first"]);
    ip("link set army-three up");
    cluster.wait("its return", |it| it.state_of(&vm) == "running");
    let before = ticks(cluster);
    assert!(before > 10, "the guest stood still: {before} ticks");
    cluster.wait("a tick", |it| ticks(it) > before);
    // What is over has no name any more.
    cluster.wait("the one that was to go", |it| {
        !it.run(&["vm", "inspect", "first"]).status.success()
    });
}
