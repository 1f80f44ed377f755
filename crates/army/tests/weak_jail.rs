//! `army dev` on a host that cannot provide every layer of the jail around VMs. Needs root: the
//! host is this one with its cgroups hidden.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// `army dev` where there is no cgroup v2.
fn army_without_cgroups(state: &Path, more: &str) -> Command {
    let script = format!(
        "mount -t tmpfs none /sys/fs/cgroup && exec {} dev --listen 127.0.0.1:0 --host-name here {more}",
        env!("CARGO_BIN_EXE_army")
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script])
        .env("CLONE_RUNTIME_DIR", state.join("run"))
        .env("CLONE_TEMPLATE_DIR", state.join("templates"))
        .env("ARMY_STATE", state.join("state"))
        .env_remove("ARMY_ALLOW_WEAK_JAIL")
        .stdin(Stdio::null());
    command
}

/// A server that is killed with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn a_node_that_requires_a_whole_jail_is_refused_where_a_layer_is_missing() {
    let state = tempfile::tempdir().unwrap();
    let output = army_without_cgroups(state.path(), "").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{output:?}");
    assert!(told.contains("cgroup: cannot find cgroup v2"), "{told}");
    assert!(told.contains("--allow-weak-jail"), "{told}");
}

#[test]
fn a_missing_layer_of_the_jail_is_shown_with_its_host() {
    let state = tempfile::tempdir().unwrap();
    let mut command = army_without_cgroups(state.path(), "--allow-weak-jail");
    let mut server = Served(command.stdout(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(server.0.stdout.take().unwrap()).lines();
    let (mut key, mut url) = (String::new(), String::new());
    for line in lines.map(Result::unwrap) {
        if let Some((_, told)) = line.split_once("ARMY_KEY=") {
            key = told.trim().to_owned();
        }
        if let Some(rest) = line.strip_prefix("Army answers at ") {
            url = rest.split(';').next().unwrap().to_owned();
            break;
        }
    }
    let hosts = |json: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_army"));
        let command = command.args(json).args(["host", "ls"]);
        let output = command.env("ARMY_URL", &url).env("ARMY_KEY", &key).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    // The first report of the host comes within its first seconds.
    let found = (0..100).find_map(|_| {
        let hosts: serde_json::Value = serde_json::from_str(&hosts(&["--json"])).unwrap();
        let missing = hosts[0]["missing_jail_layers"].as_array().cloned();
        std::thread::sleep(std::time::Duration::from_millis(100));
        missing
    });
    let found = found.expect("the host lacks a layer");
    assert!(
        found.iter().any(|missing| missing["layer"] == "cgroup"),
        "{found:?}"
    );
    let table = hosts(&[]);
    assert!(
        table.contains("warning: the jail of VMs on here lacks a layer: cgroup: cannot find"),
        "{table}"
    );
}
