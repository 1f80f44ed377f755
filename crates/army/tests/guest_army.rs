//! `army dev` with real guests: what the API promises, seen from inside them.
#![allow(clippy::unwrap_used)]

mod rig;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use serde_json::json;

use rig::Host;

#[test]
fn vms_are_made_used_forked_and_destroyed_through_the_api() {
    let host = Host::new("4711-nonce");
    let template = host.army(&["template", "register", "tiny", "--standbys", "2"]);
    assert_eq!(template["vcpus"], 2);
    let created = host.army(&[
        "vm",
        "create",
        "tiny",
        "-n",
        "c",
        "--count",
        "3",
        "-l",
        "team=red",
        "-e",
        "GREETING=hi",
    ]);
    let vms = created["vms"].as_array().unwrap();
    assert_eq!(vms.len(), 3, "{created}");
    assert!(
        vms.iter()
            .all(|vm| vm["fork"]["total_us"].as_u64() > Some(0))
    );
    // Each has the template's memory and a name of its own, and its output comes apart.
    let script = "cat /run/nonce; hostname; echo $GREETING; echo wrong >&2; exit 3";
    for vm in ["c-1", "c-2", "c-3"] {
        let output = host.run(&["exec", vm, "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let expected = format!("4711-nonce\n{vm}\nhi\n");
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "wrong\n");
    }
    let red = host.army(&["vm", "ls", "-l", "team=red"]);
    assert_eq!(red.as_array().unwrap().len(), 3);
    assert_eq!(host.army(&["vm", "ls", "-l", "team=blue"]), json!([]));
    bytes_go_in_and_out(&host);
    commands_go_on_without_anybody(&host);
    // The balloon takes memory from the guest.
    host.army(&["vm", "balloon", "c-3", "64M"]);
    host.wait("the balloon", |host| {
        host.army(&["vm", "balloon", "c-3"])["actual_bytes"] == 64 << 20
    });
    // A fork of a running VM has its memory of that instant, and both go on.
    host.guest("c-2", "echo later > /run/later");
    host.army(&["vm", "fork", "c-2", "-n", "d"]);
    assert_eq!(host.guest("d", "cat /run/later; hostname"), "later\nd");
    assert_eq!(host.guest("c-2", "hostname"), "c-2");
    // Who paused a VM is told so, and does not wait for its agent.
    host.army(&["vm", "pause", "d"]);
    let refused = host.run(&["exec", "d", "true"]);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("the VM is paused"), "{said}");
    host.army(&["vm", "resume", "d"]);
    assert_eq!(host.guest("d", "hostname"), "d");
    // Times to live and idleness are seen to.
    host.army(&["vm", "create", "tiny", "-n", "short", "--ttl", "1"]);
    host.army(&["vm", "create", "tiny", "-n", "idle", "--pause-idle", "1"]);
    assert_eq!(host.end_of("short"), "its time to live was over");
    host.wait("an idle VM's pause", |host| {
        host.army(&["vm", "inspect", "idle"])["state"] == "paused"
    });
    assert_eq!(host.guest("idle", "cat /run/nonce"), "4711-nonce");
    // A template in use stays; then everything goes.
    assert!(!host.run(&["template", "rm", "tiny"]).status.success());
    for vm in host.army(&["vm", "ls"]).as_array().unwrap() {
        host.army(&["vm", "rm", vm["id"].as_str().unwrap()]);
    }
    assert_eq!(host.there(), [""; 0]);
    // It leaves as a file and comes back under another name, which a tag then stands for.
    let file = host.dir.path().join("tiny.template");
    let file = file.to_str().unwrap();
    host.army(&["template", "export", "tiny", file]);
    host.army(&["template", "rm", "tiny"]);
    let back = host.army(&["template", "import", "again", file]);
    assert_eq!(back["id"], template["id"]);
    host.army(&["template", "tag", "again", "latest"]);
    host.army(&["vm", "create", "latest", "-n", "tagged"]);
    let vm = host.army(&["vm", "inspect", "tagged"]);
    assert_eq!(vm["template"], "again");
    assert_eq!(host.guest("tagged", "cat /run/nonce"), "4711-nonce");
    host.army(&["vm", "rm", "tagged"]);
    host.army(&["template", "untag", "latest"]);
    host.army(&["template", "rm", "again"]);
    assert!(!host.dir.path().join("templates/tiny").exists());
}

/// Input, files both ways, a program with a terminal.
/// A command is started, read twice from where the first reader stopped, and ended by a signal.
fn commands_go_on_without_anybody(host: &Host) {
    let script =
        "echo one; echo apart >&2; until [ -e /run/go ]; do sleep 0.1; done; echo two; exit 5";
    let started = host.run(&["exec", "--detach", "c-1", "sh", "-c", script]);
    let id = String::from_utf8(started.stdout).unwrap();
    let id = id.trim();
    let output = |stdout: &str| {
        let mut command = host.command(&["--json", "command", "output", "c-1", id]);
        command.args(["--stdout", stdout]).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    // A reader that is cut off in the middle.
    let mut first = output("0");
    let mut text = String::new();
    let mut reader = BufReader::new(first.stdout.take().unwrap());
    while !text.contains("one") {
        assert!(reader.read_line(&mut text).unwrap() > 0, "{text}");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    let known = host.army(&["command", "ls", "c-1"]);
    assert_eq!(known[0]["id"].to_string(), id);
    assert!(known[0].get("ended").is_none(), "{known}");
    // Another goes on behind what the first had.
    let second = output("4");
    host.guest("c-1", "touch /run/go");
    let second = second.wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(5), "{second:?}");
    let text = String::from_utf8(second.stdout).unwrap();
    assert!(text.contains("two") && !text.contains("one"), "{text}");
    // One that would never end.
    let started = host.army(&["exec", "--detach", "c-1", "sleep", "1000"]);
    let id = started["id"].to_string();
    host.army(&["command", "signal", "c-1", &id]);
    let ended = host.run(&["command", "output", "c-1", &id]);
    assert_eq!(ended.status.code(), Some(128 + 15), "{ended:?}");
    let refused = host.run(&["command", "signal", "c-1", &id]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("runs no command"));
    // The answer ends with the command: a plain HTTP client needs to know nothing more.
    let started = host.army(&["exec", "--detach", "c-1", "echo", "plain"]);
    let said = host.plain_get(&format!("/v1/vms/c-1/commands/{}/output", started["id"]));
    assert!(
        said.contains("plain") && said.contains(r#""kind":"ended""#),
        "{said}"
    );
    assert_eq!(host.army(&["command", "ls", "c-1"]), json!([]));
}

fn bytes_go_in_and_out(host: &Host) {
    let mut wc = host
        .command(&["exec", "-i", "c-1", "wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wc.stdin
        .take()
        .unwrap()
        .write_all(&[b'x'; 100_000])
        .unwrap();
    let mut counted = String::new();
    wc.stdout
        .take()
        .unwrap()
        .read_to_string(&mut counted)
        .unwrap();
    assert_eq!(
        (counted.trim(), wc.wait().unwrap().success()),
        ("100000", true)
    );
    let file = |name: &str| host.dir.path().join(name).to_str().unwrap().to_owned();
    let (there, back) = (file("there"), file("back"));
    let data: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    std::fs::write(&there, &data).unwrap();
    host.army(&["cp", &there, "c-1:/tmp/data", "--mode", "600"]);
    host.army(&["cp", "c-1:/tmp/data", &back]);
    assert_eq!(std::fs::read(&back).unwrap(), data);
    let shell = host.run(&["shell", "c-2", "tty; exit 7"]);
    assert_eq!(shell.status.code(), Some(7), "{shell:?}");
    assert!(
        String::from_utf8_lossy(&shell.stdout).contains("/dev/pts/"),
        "{shell:?}"
    );
}

#[test]
fn vms_outlive_the_server_and_are_its_own_again() {
    let mut host = Host::new("outlived");
    host.army(&["template", "register", "tiny"]);
    let create = [
        "vm",
        "create",
        "tiny",
        "-n",
        "v",
        "--count",
        "2",
        "--idempotency-key",
        "k",
    ];
    let first = host.army(&create);
    assert_eq!(host.army(&create), first, "the same request twice");
    assert_eq!(host.there().len(), 2);
    host.guest("v-1", "echo before > /run/before");
    host.kill_server();
    host.start();
    assert_eq!(
        host.guest("v-1", "cat /run/nonce /run/before"),
        "outlived\nbefore"
    );
    assert_eq!(
        host.army(&create),
        first,
        "the same request after a restart"
    );
    // One that ends by itself is told of, with the reason.
    host.run(&["exec", "v-2", "poweroff", "-f"]);
    assert_eq!(host.end_of("v-2"), "its guest ended it");
    // Other tenants see nothing of it, and have what their quota says.
    let other = host.army(&["key", "create", "other", "--max-vms", "1"]);
    let other = other["secret"].as_str().unwrap().to_owned();
    let as_other = |words: &[&str]| {
        let output = host.run(&[&["--key", &other], words].concat());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let hidden = as_other(&["exec", "v-1", "true"]);
    assert!(hidden.contains("there is no VM `v-1`"), "{hidden}");
    let many = as_other(&["vm", "create", "tiny", "--count", "2"]);
    assert!(many.contains("has 0 of the 1 VMs"), "{many}");
    host.army(&["vm", "rm", "v-1"]);
    assert_eq!(host.there(), [""; 0]);
}
