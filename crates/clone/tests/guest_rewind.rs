//! VMs that are set back to checkpoints: each proves from inside that it is where it was.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest_bench::{Bench, PATIENCE, With, bench_with_template, proves_itself};

/// Writes `text` to RAM and to the disk.
fn mark(bench: &Bench, vm: &str, text: &str) {
    let script = format!(
        "echo {text} > /run/mark; printf %-64s {text} | dd of=/dev/vda bs=4096 seek=9 conv=fsync; \
         dd if=/dev/urandom of=/run/noise bs=4096 count=64"
    );
    bench.guest(vm, &format!("({script}) 2>/dev/null"));
}

/// What [`mark`] wrote last, as RAM and disk have it.
fn marked(bench: &Bench, vm: &str) -> (String, String) {
    let disk = "dd if=/dev/vda bs=4096 skip=9 count=1 iflag=direct 2>/dev/null | tr -d ' \\0'";
    // What the page cache has of the disk is what it had at the checkpoint, and so is the disk.
    let plain = "dd if=/dev/vda bs=4096 skip=9 count=1 2>/dev/null | tr -d ' \\0'";
    let both = bench.guest(vm, &format!("cat /run/mark; {disk} || {plain}"));
    let (ram, disk) = both.split_once('\n').unwrap_or((&both, ""));
    (ram.to_owned(), disk.to_owned())
}

fn is_at(bench: &Bench, vm: &str, text: &str) {
    assert_eq!(marked(bench, vm), (text.to_owned(), text.to_owned()));
}

fn refusal(bench: &Bench, words: &[&str]) -> String {
    let output = bench.run(words);
    assert!(!output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A clone with an ephemeral disk, of a template with two CPUs, a nonce and a counter.
fn bench_with_clone() -> Bench {
    let bench = bench_with_template(With::NetAndDisk);
    bench.done(&["fork", "t", "-n", "vm"]);
    bench
}

fn knows_the_time(bench: &Bench, vm: &str) {
    let clock: u64 = bench.guest(vm, "date +%s").parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let off = now.as_secs().abs_diff(clock);
    assert!(off <= 5, "the guest's clock is {off} s off");
}

#[test]
fn a_tree_of_checkpoints_is_walked_in_any_order() {
    let bench = bench_with_clone();
    let identity = "cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id; \
                    cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 | awk '{print $4}'";
    let before = bench.guest("vm", identity);
    mark(&bench, "vm", "a");
    let count = || -> u64 { bench.guest("vm", "cat /run/count").parse().unwrap() };
    let taken = bench.json(&["checkpoint", "vm", "a", "--json"]);
    assert!(taken["times"]["pause_us"].as_u64().unwrap() > 0, "{taken}");
    assert!(refusal(&bench, &["checkpoint", "vm", "a"]).contains("already"));
    let counted = count();
    mark(&bench, "vm", "b");
    bench.done(&["checkpoint", "vm", "b"]);
    // A command that runs in the guest, and one that is attached to its console.
    let mut session = bench.command(&["exec", "vm", "sleep", "100000"]);
    let session = session.stderr(Stdio::piped()).spawn().unwrap();
    bench.guest("vm", "while ! pidof sleep; do usleep 10000; done");
    std::thread::sleep(Duration::from_secs(3));
    let later = count();
    let drawn = |vm: &str| bench.guest(vm, "od -An -N16 -tx1 /dev/urandom");
    let back = bench.json(&["rewind", "vm", "a", "--json"]);
    assert!(back["clock_us"].as_u64().is_some(), "{back}");
    assert!(count() < later, "{counted}, {later}");
    is_at(&bench, "vm", "a");
    proves_itself(&bench, "vm");
    knows_the_time(&bench, "vm");
    assert_eq!(bench.guest("vm", identity), before);
    let first = drawn("vm");
    let ended = session.wait_with_output().unwrap();
    let told = String::from_utf8(ended.stderr).unwrap();
    assert!(told.contains("was rewound to the checkpoint `a`"), "{told}");
    let log = String::from_utf8(bench.run(&["logs", "vm"]).stdout).unwrap();
    assert!(log.contains("rewound to the checkpoint `a`"), "{log}");

    bench.done(&["rewind", "vm", "a"]);
    assert_ne!(drawn("vm"), first, "its random numbers repeat");
    mark(&bench, "vm", "c");
    bench.done(&["checkpoint", "vm", "c"]);
    mark(&bench, "vm", "lost");
    for name in ["b", "c", "a", "c", "c", "b", "a", "b"] {
        bench.done(&["rewind", "vm", name]);
        is_at(&bench, "vm", name);
        proves_itself(&bench, "vm");
    }
    let listed = bench.json(&["checkpoint", "ls", "vm", "--json"]);
    assert_eq!(listed["present"], "b");
    let checkpoints = listed["checkpoints"].as_array().unwrap().iter();
    let parents: Vec<_> = checkpoints.map(|it| (&it["name"], &it["parent"])).collect();
    let null = &serde_json::Value::Null;
    let [a, b, c] = ["a", "b", "c"].map(serde_json::Value::from);
    assert_eq!(parents, [(&a, null), (&b, &a), (&c, &a)]);
    assert!(listed["used_bytes"].as_u64().unwrap() > 0);

    // A difference to the template is of the present state, and so is a live fork.
    bench.done(&["rewind", "vm", "c"]);
    bench.done(&["snapshot", "vm", "--diff", "-o", "diff"]);
    bench.done(&["fork", "diff", "-n", "of-diff"]);
    bench.done(&["fork", "--from", "vm", "-n", "live"]);
    for vm in ["of-diff", "live"] {
        is_at(&bench, vm, "c");
        proves_itself(&bench, vm);
        bench.done(&["kill", vm]);
    }
    // The snapshot is not in the way of a checkpoint from before it.
    bench.done(&["rewind", "vm", "a"]);
    mark(&bench, "vm", "d");
    bench.done(&["snapshot", "vm", "--diff", "-o", "diff2"]);
    bench.done(&["fork", "diff2", "-n", "of-diff"]);
    is_at(&bench, "of-diff", "d");

    // What would lose them is refused, and a parent can go without its children.
    assert!(refusal(&bench, &["suspend", "vm"]).contains("checkpoints"));
    is_at(&bench, "vm", "d");
    bench.done(&["checkpoint", "rm", "vm", "a"]);
    assert!(refusal(&bench, &["rewind", "vm", "a"]).contains("no checkpoint"));
    is_at(&bench, "vm", "d");
    bench.done(&["rewind", "vm", "b"]);
    is_at(&bench, "vm", "b");
    bench.done(&["checkpoint", "rm", "vm", "b"]);
    bench.done(&["rewind", "vm", "c"]);
    is_at(&bench, "vm", "c");
    bench.done(&["checkpoint", "rm", "vm", "c"]);
    bench.done(&["suspend", "vm"]);
    bench.done(&["resume", "vm"]);
    is_at(&bench, "vm", "c");
    proves_itself(&bench, "vm");
}

/// Fills a file in memory, and gives its checksum.
fn fill(bench: &Bench, vm: &str) -> String {
    let script = "dd if=/dev/urandom of=/run/big bs=1M count=48 2>/dev/null; sync";
    bench.guest(vm, script);
    sum(bench, vm)
}

fn sum(bench: &Bench, vm: &str) -> String {
    bench.guest(vm, "md5sum < /run/big")
}

fn reboot(bench: &Bench, vm: &str) {
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let before = bench.guest(vm, boot);
    let _ = bench.run(&["exec", vm, "reboot", "-f"]);
    let asked = Instant::now();
    loop {
        let output = bench.run(&["exec", "--wait", "5", vm, "sh", "-c", boot]);
        let now = String::from_utf8(output.stdout).unwrap();
        if output.status.success() && now.trim() != before {
            return;
        }
        assert!(asked.elapsed() < Duration::from_secs(PATIENCE), "{now}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn what_the_balloon_took_and_a_reboot_wiped_comes_back() {
    let bench = bench_with_clone();
    let full = fill(&bench, "vm");
    mark(&bench, "vm", "full");
    bench.done(&["checkpoint", "vm", "full"]);
    // Pages that the guest reports as free, or puts into the balloon, are taken from it.
    let private = || {
        let stat = bench.json(&["stat", "vm", "--json"]);
        let guest = &stat["stats"]["memory"]["guest"];
        guest["private_bytes"].as_u64().unwrap()
    };
    let had = private();
    bench.guest("vm", "rm /run/big");
    bench.done(&["balloon", "vm", "160M"]);
    let asked = Instant::now();
    while private() + (32 << 20) > had {
        assert!(asked.elapsed() < Duration::from_secs(PATIENCE), "{had}");
        std::thread::sleep(Duration::from_millis(200));
    }
    bench.done(&["rewind", "vm", "full"]);
    assert_eq!(sum(&bench, "vm"), full);
    proves_itself(&bench, "vm");
    assert_eq!(bench.json(&["balloon", "vm", "--json"])["target_bytes"], 0);
    bench.guest(
        "vm",
        "rm /run/big; dd if=/dev/zero of=/run/other bs=1M count=16 2>/dev/null",
    );
    bench.done(&["checkpoint", "vm", "empty"]);

    reboot(&bench, "vm");
    bench.guest("vm", "! test -e /run/mark");
    bench.done(&["checkpoint", "vm", "rebooted"]);
    bench.guest("vm", "echo new > /run/mark");
    for _ in 0..2 {
        bench.done(&["rewind", "vm", "full"]);
        assert_eq!(sum(&bench, "vm"), full);
        is_at(&bench, "vm", "full");
        proves_itself(&bench, "vm");
        bench.done(&["rewind", "vm", "rebooted"]);
        bench.guest("vm", "! test -e /run/mark && ! test -e /run/big");
    }
    bench.done(&["rewind", "vm", "empty"]);
    bench.guest("vm", "! test -e /run/big && test -e /run/other");
    is_at(&bench, "vm", "full");
    bench.done(&["snapshot", "vm", "--diff", "-o", "diff"]);
    bench.done(&["fork", "diff", "-n", "of-diff"]);
    is_at(&bench, "of-diff", "full");
    proves_itself(&bench, "of-diff");
}

#[test]
fn a_vm_that_was_booted_goes_back_and_forth_many_times_and_leaves_nothing() {
    let bench = Bench::new();
    let disk = bench.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let in_place = bench.boot("kept", &["--detach", "--disk", &disk]);
    assert!(in_place.status.success(), "{in_place:?}");
    let told = refusal(&bench, &["checkpoint", "kept", "a"]);
    assert!(told.contains("in place"), "{told}");
    bench.done(&["kill", "kept"]);
    let ephemeral = format!("{disk},overlay=ephemeral");
    let started = bench.boot("vm", &["--detach", "--disk", &ephemeral]);
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("vm");
    mark(&bench, "vm", "0");
    bench.done(&["checkpoint", "vm", "c0"]);
    // Each is based on the one before, which is removed: layers must not pile up without end.
    for number in 1..40 {
        let (text, name) = (number.to_string(), format!("c{number}"));
        mark(&bench, "vm", &text);
        bench.done(&["checkpoint", "vm", &name]);
        mark(&bench, "vm", "lost");
        if number > 1 {
            bench.done(&["checkpoint", "rm", "vm", &format!("c{}", number - 1)]);
        }
        bench.done(&["rewind", "vm", &name]);
        if number % 10 == 0 {
            is_at(&bench, "vm", &text);
        }
    }
    let listed = bench.json(&["checkpoint", "ls", "vm", "--json"]);
    assert_eq!(listed["checkpoints"].as_array().unwrap().len(), 2);
    reboot(&bench, "vm");
    bench.done(&["rewind", "vm", "c0"]);
    is_at(&bench, "vm", "0");
    bench.done(&["rewind", "vm", "c39"]);
    is_at(&bench, "vm", "39");
    // A command that is killed leaves the VM at one of its states, and running.
    for delay_ms in [1_u64, 3, 8, 20, 60] {
        let mut rewind = bench.command(&["rewind", "vm", "c0"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        let _ = rewind.kill();
        let _ = rewind.wait().unwrap();
        let (ram, disk) = marked(&bench, "vm");
        assert!(ram == disk && ["0", "39"].contains(&&*ram), "{ram}, {disk}");
        bench.done(&["rewind", "vm", "c39"]);
        is_at(&bench, "vm", "39");
    }
    // One that is paused stays so.
    bench.done(&["pause", "vm"]);
    let back = bench.json(&["rewind", "vm", "c0", "--json"]);
    assert_eq!(back["running"], false, "{back}");
    bench.done(&["resume", "vm"]);
    is_at(&bench, "vm", "0");
    for number in 2..33 {
        bench.done(&["checkpoint", "vm", &format!("n{number}")]);
        if number == 31 {
            break;
        }
    }
    let told = refusal(&bench, &["checkpoint", "vm", "one-more"]);
    assert!(told.contains("32"), "{told}");
    bench.done(&["kill", "vm"]);
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn a_debian_that_lost_usr_has_it_again() {
    let bench = Bench::new();
    let root = format!("{},overlay=ephemeral", bench.debian().display());
    let words = [
        "--detach", "-c", "2", "-m", "512M", "--disk", &root, "--net", "nat",
    ];
    let started = bench.boot("vm", &words);
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("vm");
    bench.guest("vm", "systemctl is-system-running --wait; true");
    bench.done(&["checkpoint", "vm", "whole"]);
    bench.guest("vm", "rm -rf /usr/bin /usr/lib /usr/share; sync; true");
    assert!(
        !bench
            .run(&["exec", "vm", "python3", "-c", "1"])
            .status
            .success()
    );
    bench.done(&["rewind", "vm", "whole"]);
    let sum = bench.guest("vm", "python3 -c 'import hashlib; print(sum(range(10)))'");
    assert_eq!(sum, "45");
    bench.guest(
        "vm",
        "dpkg --verify coreutils dpkg; systemctl --no-pager status >/dev/null",
    );
    knows_the_time(&bench, "vm");
    // It can be used, and set back again.
    bench.guest("vm", "mv /usr /gone || true");
    bench.done(&["rewind", "vm", "whole"]);
    bench.guest("vm", "ls /usr/bin/env");
}

#[test]
fn a_checkpoint_of_a_template_with_a_counter_is_small() {
    let bench = bench_with_template(With::Nothing);
    bench.done(&["fork", "t", "-n", "vm"]);
    bench.guest("vm", "true");
    bench.done(&["checkpoint", "vm", "first"]);
    let taken = bench.json(&["checkpoint", "vm", "second", "--json"]);
    let bytes = taken["checkpoint"]["memory_bytes"].as_u64().unwrap();
    assert!(bytes < 16 << 20, "{bytes}");
}
