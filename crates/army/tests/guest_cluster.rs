//! A controller and three nodes, each in a network of its own, with real guests.
#![allow(clippy::unwrap_used)]

mod hosts;
mod rig;

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::json;

use hosts::{Cluster, HOSTS, ip};
use rig::Forwarded;

const VMS: usize = 30;

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
