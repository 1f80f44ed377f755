//! `army dev` with real guests: what the API promises, seen from inside them.
#![allow(clippy::unwrap_used)]

mod rig;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::json;

use rig::{Forwarded, Host};

#[test]
fn vms_are_made_used_forked_and_destroyed_through_the_api() {
    let host = Host::with("4711-nonce", &["--net", "nat"]);
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
    ports_lead_into_vms(&host);
    networks_are_held_to_what_was_said(&host);
    templates_are_built_of_others(&host);
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
    vms_sleep_on_disk(&host);
    vms_go_back_to_checkpoints(&host);
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

/// A command is started, read twice from where the first reader stopped, and ended by a signal.
/// A suspended VM has no process and uses no memory, and whatever is asked of it wakes it.
fn vms_sleep_on_disk(host: &Host) {
    host.army(&[
        "vm",
        "create",
        "tiny",
        "-n",
        "sleeper",
        "--suspend-idle",
        "1",
    ]);
    host.guest(
        "sleeper",
        "echo mine > /run/mine; cat /proc/sys/kernel/random/boot_id > /run/boot",
    );
    let is_suspended =
        |host: &Host| host.army(&["vm", "inspect", "sleeper"])["state"] == "suspended";
    host.wait("an idle VM's suspension", is_suspended);
    let id = host.army(&["vm", "inspect", "sleeper"])["id"].clone();
    let directory = format!("army-{}", id.as_str().unwrap());
    assert!(!host.there().contains(&directory), "its process is gone");
    let here =
        "cat /run/nonce /run/mine; cmp /run/boot /proc/sys/kernel/random/boot_id && hostname";
    assert_eq!(host.guest("sleeper", here), "4711-nonce\nmine\nsleeper");
    assert!(host.there().contains(&directory));
    // By its user's word, and a file wakes it, too.
    host.army(&["vm", "set", "sleeper", "--no-idle"]);
    let suspended = host.army(&["vm", "suspend", "sleeper"]);
    assert_eq!(suspended["state"], "suspended");
    let copy = host.dir.path().join("mine");
    host.army(&["cp", "sleeper:/run/mine", copy.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(copy).unwrap(), "mine\n");
    assert_eq!(host.army(&["vm", "inspect", "sleeper"])["state"], "running");
    // One that is destroyed leaves nothing.
    host.army(&["vm", "suspend", "sleeper"]);
    host.army(&["vm", "rm", "sleeper"]);
    let left = std::fs::read_dir(host.suspended()).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| !name.starts_with('.')).collect();
    assert_eq!(left, [""; 0]);
}

/// A VM is set back with its memory and files, is paused and not suspended while it has checkpoints,
/// and its commands end with a reason.
fn vms_go_back_to_checkpoints(host: &Host) {
    host.army(&["vm", "create", "tiny", "-n", "trier"]);
    host.guest("trier", "echo before > /run/mine");
    let taken = host.army(&["vm", "checkpoint", "trier", "start"]);
    assert_eq!(taken["name"], "start");
    host.guest(
        "trier",
        "rm -rf /run/mine /usr; echo gone > /run/other; true",
    );
    let rewound = host.army(&["vm", "rewind", "trier", "start"]);
    assert_eq!(rewound["running"], true, "{rewound}");
    assert!(rewound["clock_us"].as_u64().is_some(), "{rewound}");
    let here = "cat /run/nonce /run/mine; test -e /run/other || echo back; hostname";
    assert_eq!(host.guest("trier", here), "4711-nonce\nbefore\nback\ntrier");
    let listed = host.army(&["vm", "checkpoint", "ls", "trier"]);
    assert_eq!(listed["present"], "start", "{listed}");
    let refused = host.run(&["vm", "suspend", "trier"]);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("checkpoints"), "{said}");
    host.army(&["vm", "set", "trier", "--suspend-idle", "1"]);
    let is_paused = |host: &Host| host.army(&["vm", "inspect", "trier"])["state"] == "paused";
    host.wait("an idle VM with checkpoints to be paused", is_paused);
    assert_eq!(host.guest("trier", "cat /run/mine"), "before");
    host.army(&["vm", "set", "trier", "--no-idle"]);
    let left = host.army(&["vm", "checkpoint", "rm", "trier", "start"]);
    assert_eq!(left["checkpoints"], serde_json::json!([]));
    host.army(&["vm", "rm", "trier"]);
}

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
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains(&format!("no command {id}")), "{said}");
    // The answer ends with the command: a plain HTTP client needs to know nothing more.
    let started = host.army(&["exec", "--detach", "c-1", "echo", "plain"]);
    let said = host.plain_get(&format!("/v1/vms/c-1/commands/{}/output", started["id"]));
    assert!(
        said.contains("plain") && said.contains(r#""kind":"ended""#),
        "{said}"
    );
    assert_eq!(host.army(&["command", "ls", "c-1"]), json!([]));
}

/// Input, files both ways, a program with a terminal.
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

/// A server in a guest is reached from here, whatever its network.
fn ports_lead_into_vms(host: &Host) {
    let serve = "mkdir -p /run/www; echo 4711-page > /run/www/page; head -c 3000000 /dev/zero \
                 > /run/www/large; httpd -p 127.0.0.1:8080 -h /run/www";
    host.guest("c-1", serve);
    let forwarded = Forwarded::new(&mut host.command(&["port-forward", "c-1", "0:8080"]));
    assert!(forwarded.page("/page").ends_with("4711-page\n"));
    assert!(forwarded.page("/large").len() > 3_000_000);
    let nobody = Forwarded::new(&mut host.command(&["port-forward", "c-1", "0:9"]));
    assert_eq!(nobody.page("/"), "");
    let refused = host.run(&["port-forward", "none", "0:80"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("VM `none` not found"), "{said}");
}

/// Commands and files make a template of another one; what fails leaves nothing.
fn templates_are_built_of_others(host: &Host) {
    let script = host.dir.path().join("script");
    std::fs::write(&script, "echo $WORD >> /run/built\n").unwrap();
    let script = format!("{}:/run/script", script.display());
    let before = host.there().len();
    let build = |name: &str, steps: &[&str]| {
        let words = [
            "template",
            "build",
            name,
            "--from",
            "tiny",
            "--env",
            "WORD=4711",
        ];
        host.run(&[&words, steps].concat())
    };
    let steps = [
        "--run",
        "echo first > /run/built; hostname >&2",
        "--write",
        &script,
        "--run",
        "sh /run/script; sleep 1000 >/dev/null 2>&1 & echo done",
    ];
    let built = build("made", &steps);
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}");
    assert!(
        said.contains("step 3 of 3: sh") && said.contains("done\n"),
        "{said}"
    );
    host.army(&["vm", "create", "made", "-n", "m"]);
    // What a step left running runs; what the build was told is its own.
    let seen = host.guest(
        "m",
        "cat /run/built /run/nonce; pidof sleep >/dev/null && hostname; echo $WORD",
    );
    assert_eq!(seen, "first\n4711\n4711-nonce\nm");
    host.army(&["vm", "rm", "m"]);
    let listed = host.army(&["template", "ls"]);
    let made = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|it| it["name"] == "made");
    assert!(made.unwrap()["parent"].is_string(), "{listed}");
    host.army(&["template", "rm", "made"]);
    // A step that fails, a name that is taken, a client that goes away.
    let failed = build("other", &["--run", "echo why; exit 3", "--run", "true"]);
    let said = String::from_utf8_lossy(&failed.stderr);
    assert!(
        said.contains("why") && said.contains("step 1 of 2: the command exited with 3"),
        "{said}"
    );
    let taken = build("tiny", &["--run", "true"]);
    assert!(
        String::from_utf8_lossy(&taken.stderr).contains("already"),
        "{taken:?}"
    );
    let words = [
        "template",
        "build",
        "other",
        "--from",
        "tiny",
        "--run",
        "echo here; sleep 3",
    ];
    let mut left = host.command(&words).stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(left.stderr.take().unwrap());
    let mut text = String::new();
    while !text.ends_with("here\n") {
        assert!(reader.read_line(&mut text).unwrap() > 0, "{text}");
    }
    left.kill().unwrap();
    left.wait().unwrap();
    // The build goes on, and ends with its template and without its VM.
    host.wait("the template", |host| {
        let names = host.army(&["template", "ls"]);
        names
            .as_array()
            .unwrap()
            .iter()
            .any(|it| it["name"] == "other")
    });
    host.wait("the builder's end", |host| host.there().len() == before);
    host.army(&["template", "rm", "other"]);
    let names = host.army(&["template", "ls"]);
    assert_eq!(names.as_array().unwrap().len(), 1, "{names}");
}

/// Guests send to whom they may, and their forks likewise.
fn networks_are_held_to_what_was_said(host: &Host) {
    let ping = |vm: &str, whom: &str| {
        let script = format!(
            "gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); \
             ping -c 1 -W 2 {whom} >/dev/null && echo yes || echo no"
        );
        host.guest(vm, &script)
    };
    let create = |name: &str, egress: &str| {
        let created = host.army(&["vm", "create", "tiny", "-n", name, "--egress", egress]);
        created["vms"][0].clone()
    };
    // An address of the host's beside the guests' gateway.
    let address = |verb: &str| {
        let mut ip = std::process::Command::new("ip");
        let status = ip.args(["address", verb, "192.0.2.7/32", "dev", "lo"]);
        assert!(status.status().unwrap().success());
    };
    address("add");
    assert_eq!(ping("c-1", "$gateway"), "yes");
    assert_eq!(ping("c-1", "192.0.2.7"), "yes");
    // One that is taken from the standbys is held before it runs.
    let ready = |host: &Host| host.army(&["template", "ls"])[0]["ready"].as_u64() > Some(0);
    host.wait("a standby", ready);
    let none = create("n", "none");
    assert_eq!(none["network"], json!({"egress": "none"}));
    assert_eq!(none["fork"]["warm"], true);
    assert_eq!(ping("n", "$gateway"), "no");
    let some = create("s", "192.0.2.0/24,198.51.100.0/24");
    assert_eq!(some["network"]["egress"]["allow"][0], "192.0.2.0/24");
    assert_eq!(ping("s", "192.0.2.7"), "yes");
    assert_eq!(ping("s", "$gateway"), "no");
    host.army(&["vm", "fork", "s", "-n", "t"]);
    assert_eq!(ping("t", "192.0.2.7"), "yes");
    assert_eq!(ping("t", "$gateway"), "no");
    assert_eq!(
        host.army(&["vm", "inspect", "t"])["network"],
        some["network"]
    );
    let refused = host.run(&["vm", "create", "tiny", "--egress", "example.org"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("not an IPv4 network"), "{said}");
    address("del");
    host.army(&["vm", "rm", "n", "s", "t"]);
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
    // The answer tells of the VMs as they are now: their figures change.
    let ids = |host: &Host| -> Vec<serde_json::Value> {
        let created = host.army(&create);
        let vms = created["vms"].as_array().unwrap().iter();
        vms.map(|vm| vm["id"].clone()).collect()
    };
    let first = ids(&host);
    assert_eq!(ids(&host), first, "the same request twice");
    assert_eq!(host.there().len(), 2);
    host.guest("v-1", "echo before > /run/before");
    host.kill_server();
    host.start();
    assert_eq!(
        host.guest("v-1", "cat /run/nonce /run/before"),
        "outlived\nbefore"
    );
    assert_eq!(ids(&host), first, "the same request after a restart");
    // A suspended VM outlives the server, too.
    host.army(&["vm", "suspend", "v-1"]);
    host.kill_server();
    host.start();
    assert_eq!(
        host.guest("v-1", "cat /run/nonce /run/before"),
        "outlived\nbefore"
    );
    a_client_that_went_away_finds_its_vm_when_it_is_back(&host);
    whenever_it_is_killed_each_vm_is_there_once_or_not_at_all(&mut host);
    a_full_disk_is_told_and_harms_no_vm(&mut host);
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
    assert!(hidden.contains("VM `v-1` not found"), "{hidden}");
    let many = as_other(&["vm", "create", "tiny", "--count", "2"]);
    assert!(many.contains("has 0 of the 1 VMs"), "{many}");
    host.army(&["vm", "rm", "v-1"]);
    assert_eq!(host.there(), [""; 0]);
}

/// Starts a command whose answer nobody waits for.
fn begin(host: &Host, words: &[&str]) -> Child {
    let mut command = host.command(words);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Its request is done to its end, and answered to who asks again with the same key.
fn a_client_that_went_away_finds_its_vm_when_it_is_back(host: &Host) {
    let create = ["vm", "create", "tiny", "-n", "g", "--idempotency-key", "g"];
    for moment in [10, 60, 200] {
        let mut asked = begin(host, &create);
        std::thread::sleep(Duration::from_millis(moment));
        let _ = asked.kill();
        asked.wait().unwrap();
    }
    host.wait("the answer", |host| host.run(&create).status.success());
    let all = host.army(&["vm", "ls", "--all"]);
    let made = all
        .as_array()
        .unwrap()
        .iter()
        .filter(|vm| vm["name"] == "g");
    assert_eq!(made.count(), 1, "{all}");
    assert_eq!(host.guest("g", "hostname"), "g");
    host.army(&["vm", "rm", "g"]);
}

/// The server is killed at several moments of making VMs, asked for with a key. Whoever asks again
/// gets those VMs, of which each runs or is said to have failed, and the host has no others.
fn whenever_it_is_killed_each_vm_is_there_once_or_not_at_all(host: &mut Host) {
    let mut finished = 0;
    for moment in [20, 150, 400, 900, 1800] {
        let name = format!("k{moment}");
        let create = [
            "vm",
            "create",
            "tiny",
            "-n",
            &name,
            "--count",
            "3",
            "--idempotency-key",
            &name,
        ];
        let mut asked = begin(host, &create);
        std::thread::sleep(Duration::from_millis(moment));
        host.kill_server();
        asked.wait().unwrap();
        host.start();
        // What came to nothing is made now, and the rest is not made again.
        host.run(&create);
        let mut vms = Vec::new();
        host.wait("an end of making", |host| {
            let all = host.army(&["vm", "ls", "--all"]);
            let all = all.as_array().unwrap().iter();
            let ours = all.filter(|vm| vm["name"].as_str().unwrap().starts_with(&name));
            vms = ours.cloned().collect();
            vms.iter().all(|vm| vm["state"] != "creating")
        });
        // Those of a first attempt of which nothing was left, and those of the second.
        assert!(matches!(vms.len(), 3 | 6), "{moment} ms: {vms:?}");
        let (alive, over): (Vec<_>, Vec<_>) = vms.iter().partition(|vm| vm["state"] == "running");
        assert!(over.iter().all(|vm| vm["reason"].is_string()), "{over:?}");
        let names: std::collections::BTreeSet<_> =
            alive.iter().map(|vm| vm["name"].to_string()).collect();
        assert_eq!(names.len(), alive.len(), "{moment} ms: {alive:?}");
        for vm in &alive {
            let vm = vm["name"].as_str().unwrap();
            assert_eq!(
                host.guest(vm, "cat /run/nonce; hostname"),
                format!("outlived\n{vm}")
            );
        }
        // These and the two of before.
        assert_eq!(host.there().len(), alive.len() + 2, "{moment} ms");
        finished += alive.len();
        for vm in alive {
            host.army(&["vm", "rm", vm["id"].as_str().unwrap()]);
        }
    }
    assert!(finished > 0, "no VM was made at all");
}

/// What the server keeps is on a disk that is full: VMs go on and are used, new ones are refused
/// with the reason, and all is well again when there is room.
fn a_full_disk_is_told_and_harms_no_vm(host: &mut Host) {
    let shell = |host: &Host, script: &str| {
        let mut sh = std::process::Command::new("sh");
        let status = sh.args(["-ec", script]).current_dir(host.dir.path());
        assert!(status.status().unwrap().success(), "{script}");
    };
    host.kill_server();
    shell(
        host,
        "cp -a state kept; mount -t tmpfs -o size=8M small state; cp -a kept/. state",
    );
    host.start();
    shell(
        host,
        "dd if=/dev/zero of=state/filler bs=64k 2>/dev/null || true",
    );
    let create = ["vm", "create", "tiny", "-n", "full"];
    let refused = host.run(&create);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("full") || said.contains("No space"), "{said}");
    assert_eq!(host.guest("v-1", "cat /run/before"), "before");
    assert_eq!(host.army(&["host", "ls"])[0]["state"], "ready");
    assert_eq!(host.there().len(), 2);
    shell(host, "rm state/filler");
    host.wait("room", |host| host.run(&create).status.success());
    assert_eq!(host.guest("full", "hostname"), "full");
    host.army(&["vm", "rm", "full"]);
    host.kill_server();
    shell(
        host,
        "rm -r kept; cp -a state kept; umount state; cp -a kept/. state; rm -r kept",
    );
    host.start();
}
