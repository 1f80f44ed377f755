//! VMs that move between the nodes of a cluster while they run, each of which proves from inside that it
//! is the same one.
#![allow(clippy::unwrap_used)]

mod hosts;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use hosts::{Cluster, HOSTS};

/// A cluster whose first host has the template `tiny`.
fn cluster() -> Cluster {
    let cluster = Cluster::new();
    cluster.wait("hosts", |it| {
        HOSTS.iter().all(|host| it.host_is(host, "ready"))
    });
    cluster.make_template("one", "4711-nonce");
    cluster.army(&["template", "register", "tiny", "--host", "one"]);
    cluster
}

/// Creates VMs on the first host.
fn create(cluster: &Cluster, name: &str, count: usize) {
    for host in ["two", "three"] {
        cluster.army(&["host", "drain", host]);
    }
    cluster.army(&[
        "vm",
        "create",
        "tiny",
        "-n",
        name,
        "--count",
        &count.to_string(),
    ]);
    for host in ["two", "three"] {
        cluster.army(&["host", "undrain", host]);
    }
}

fn host_of(cluster: &Cluster, vm: &str) -> String {
    cluster.army(&["vm", "inspect", vm])["host"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// What only the same VM can say.
fn identity(cluster: &Cluster, vm: &str) -> String {
    cluster.guest(
        vm,
        "cat /proc/sys/kernel/random/boot_id /etc/hostname /run/nonce /run/mine",
    )
}

/// A command through Army that is not waited for yet.
fn begin(cluster: &Cluster, words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_army"))
        .args(words)
        .env("ARMY_URL", &cluster.url)
        .env("ARMY_KEY", &cluster.key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The number of VM processes on all hosts, by their directories.
fn processes(cluster: &Cluster) -> usize {
    HOSTS.iter().map(|host| cluster.there(host)).sum()
}

/// The lines that a command prints while its VM moves.
const LINES: u32 = 100;

#[test]
fn a_vm_under_load_moves_around_and_hosts_are_evacuated() {
    let cluster = cluster();
    create(&cluster, "mover", 1);
    let begun = "echo only-mine > /run/mine; \
        (while :; do dd if=/dev/urandom of=/run/blob bs=64k count=8 2>/dev/null; \
        md5sum /run/blob > /run/sum; done) </dev/null >/dev/null 2>&1 & \
        (while :; do date +%s >> /run/ticks; sleep 1; done) </dev/null >/dev/null 2>&1 &";
    cluster.guest("mover", begun);
    let before = identity(&cluster, "mover");

    // One command that is collected, and one with input and output as they come.
    let script =
        format!("i=0; while [ $i -lt {LINES} ]; do echo line$i; i=$((i+1)); sleep 0.2; done");
    let collected = begin(
        &cluster,
        &["exec", "--timeout", "600", "mover", "sh", "-c", &script],
    );
    let echo = "while read line; do echo got $line; done; echo end";
    let mut streamed = begin(&cluster, &["exec", "--input", "mover", "sh", "-c", echo]);
    let mut input = streamed.stdin.take().unwrap();
    let mut typed = String::new();
    for (round, to) in ["two", "three", "one"].into_iter().enumerate() {
        let line = format!("round{round}\n");
        std::io::Write::write_all(&mut input, line.as_bytes()).unwrap();
        typed += &format!("got {line}");
        let moved = cluster.army(&["vm", "migrate", "mover", "--to", to]);
        assert_eq!(moved["moved"]["to"], to, "{moved}");
        assert_eq!(host_of(&cluster, "mover"), to);
        assert_eq!(identity(&cluster, "mover"), before);
        assert_eq!(processes(&cluster), 1);
        assert_eq!(cluster.there(to), 1);
    }
    drop(input);
    let streamed = streamed.wait_with_output().unwrap();
    assert!(streamed.status.success(), "{streamed:?}");
    let expected = format!("{typed}end\n");
    assert_eq!(String::from_utf8_lossy(&streamed.stdout), expected);
    let collected = collected.wait_with_output().unwrap();
    assert!(collected.status.success(), "{collected:?}");
    let expected: String = (0..LINES).map(|line| format!("line{line}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&collected.stdout), expected);
    let ticks = |cluster: &Cluster| -> u64 {
        cluster
            .guest("mover", "wc -l < /run/ticks")
            .parse()
            .unwrap()
    };
    let counted = ticks(&cluster);
    cluster.wait("a tick", |it| ticks(it) > counted);

    // Nobody notices where the VM is, but those who ask.
    let refused = cluster.run(&["vm", "migrate", "mover", "--to", "one"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("is on one already"), "{text}");
    cluster.army(&["vm", "checkpoint", "mover", "c"]);
    let refused = cluster.run(&["vm", "migrate", "mover"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("checkpoints"), "{text}");
    cluster.army(&["vm", "checkpoint", "rm", "mover", "c"]);

    suspended_and_paused_vms_leave_a_host(&cluster);
    for vm in cluster.army(&["vm", "ls"]).as_array().unwrap() {
        cluster.army(&["vm", "rm", vm["id"].as_str().unwrap()]);
    }
    assert_eq!(processes(&cluster), 0);
}

/// A host is evacuated of VMs that run, are paused and are suspended.
fn suspended_and_paused_vms_leave_a_host(cluster: &Cluster) {
    create(cluster, "e", 3);
    for vm in ["e-1", "e-2", "e-3"] {
        cluster.guest(vm, &format!("echo {vm} > /run/mine"));
    }
    cluster.army(&["vm", "suspend", "e-1"]);
    cluster.army(&["vm", "pause", "e-2"]);
    let host = cluster.army(&["host", "evacuate", "one"]);
    assert_eq!(
        (&host["vms"], &host["state"]),
        (&Value::from(0), &Value::from("draining"))
    );
    assert_eq!(cluster.there("one"), 0);
    let state = |vm: &str| cluster.state_of(vm);
    assert_eq!(
        (state("e-1"), state("e-2")),
        ("suspended".into(), "paused".into())
    );
    cluster.army(&["vm", "resume", "e-2"]);
    // An exec wakes the one that was suspended, on its new host.
    for vm in ["e-1", "e-2", "e-3"] {
        assert_ne!(host_of(cluster, vm), "one");
        assert_eq!(cluster.guest(vm, "cat /run/mine"), vm);
    }
    let left = cluster.dir.path().join("one/suspended");
    let left = std::fs::read_dir(left).into_iter().flatten().flatten();
    let left: Vec<_> = left
        .filter(|it| !it.file_name().to_string_lossy().starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    cluster.army(&["host", "undrain", "one"]);
    std::thread::sleep(Duration::from_millis(1500));
    for vm in ["e-1", "e-2", "e-3"] {
        assert_eq!(state(vm), "running", "{vm}");
    }
}
