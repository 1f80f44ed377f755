//! VMs with a real guest, from `run` to their end, through the command alone.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use guest_bench::{Bench, PATIENCE};
use serde_json::Value;

/// How long a connection may take to end with whoever had it.
const LEAK_LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_guest_that_powers_off_ends_run_with_0_and_leaves_nothing() {
    let bench = Bench::with_kernel("bzImage");
    let ended = bench.boot("a", &["-c", "2", "--append", "quiet guest.poweroff"]);
    let console = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(console.contains("guest: user space"), "{console}");
    assert!(console.contains("2 CPUs"), "{console}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn a_detached_vm_is_listed_paused_resumed_and_killed() {
    let bench = Bench::with_kernel("bzImage");
    let started = bench.boot("a", &["--detach"]);
    assert!(started.status.success(), "{started:?}");
    assert_eq!(String::from_utf8(started.stdout).unwrap(), "a\n");

    let again = bench.boot("a", &["--detach"]);
    assert_eq!(again.status.code(), Some(4), "{again:?}");

    assert!(bench.run(&["pause", "a"]).status.success());
    assert_eq!(
        bench.json(&["ls", "--state", "--json"])[0]["state"],
        "paused"
    );
    let cpu = |stat: &Value| stat["stats"]["cpu"]["user_us"].as_u64().unwrap();
    assert!(cpu(&bench.json(&["stat", "a", "--json"])) > 0);
    let stopped = bench.run(&["stop", "a"]);
    assert_eq!(stopped.status.code(), Some(4), "{stopped:?}");
    assert!(bench.run(&["resume", "a"]).status.success());
    assert_eq!(
        bench.json(&["stat", "a", "--json"])["info"]["state"],
        "running"
    );

    assert!(bench.run(&["kill", "a"]).status.success());
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn what_a_vm_killed_from_outside_left_is_gone_after_the_next_command() {
    let bench = Bench::with_kernel("bzImage");
    assert!(bench.boot("a", &["--detach"]).status.success());
    let pid = bench.json(&["ls", "--json"])[0]["pid"].to_string();
    let killed = Command::new("kill").args(["-9", &pid]).status().unwrap();
    assert!(killed.success());
    assert_eq!(bench.run(&["stat", "a"]).status.code(), Some(3));
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn a_kernel_that_cannot_start_is_one_error_and_leaves_nothing() {
    let bench = Bench::with_kernel("bzImage");
    let mut cut = fs::read(bench.kernel()).unwrap();
    cut.truncate(cut.len() / 3);
    let kernel = bench.path("cut");
    fs::write(&kernel, cut).unwrap();
    let failed = bench.run(&["run", "-d", "-n", "a", "-k", &kernel]);
    assert_eq!(failed.status.code(), Some(2), "{failed:?}");
    let told = String::from_utf8(failed.stderr).unwrap();
    assert!(told.contains("kernel"), "{told}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

/// What the process of a VM has open, and its threads.
fn holdings(bench: &Bench, name: &str) -> (usize, usize) {
    let vms = bench.json(&["ls", "--json"]);
    let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name);
    let process = format!("/proc/{}", vm.unwrap()["pid"]);
    let count = |of: &str| fs::read_dir(format!("{process}/{of}")).unwrap().count();
    (count("fd"), count("task"))
}

fn boot_id(bench: &Bench, name: &str) -> String {
    bench.wait_for_agent(name);
    bench.guest(name, "cat /proc/sys/kernel/random/boot_id")
}

/// Has a guest reboot itself, and gives its new boot id.
fn reboot(bench: &Bench, name: &str) -> String {
    let before = boot_id(bench, name);
    // The answer is lost with the guest.
    bench.run(&["exec", name, "sh", "-c", "sync; reboot -f"]);
    let after = boot_id(bench, name);
    assert_ne!(before, after);
    after
}

/// How often the guest of the next test reboots.
fn reboots() -> usize {
    let more = std::env::var("CLONE_TEST_REBOOTS").ok();
    more.map_or(2, |count| count.parse().unwrap())
}

#[test]
fn a_guest_that_reboots_boots_again_in_its_vm_with_its_disk() {
    let bench = Bench::new();
    let disk = bench.path("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = format!("{disk},format=raw,overlay=ephemeral");
    let started = bench.boot(
        "a",
        &[
            "--detach",
            "-c",
            "2",
            "--disk",
            &disk,
            "--append",
            "quiet root=",
        ],
    );
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("a");
    bench.guest("a", "echo kept > /dev/vda; echo gone > /run/x; sync");
    std::thread::sleep(Duration::from_secs(1));
    let at_first = holdings(&bench, "a");
    let mut ids = std::collections::BTreeSet::new();
    for _ in 0..reboots() {
        assert!(ids.insert(reboot(&bench, "a")), "every boot is another");
        assert_eq!(bench.guest("a", "head -c 5 /dev/vda; nproc"), "kept\n2");
        assert_eq!(
            bench.guest("a", "ls /run/x 2>/dev/null || echo none"),
            "none"
        );
        // Connections to the agent end a moment after who had them.
        let waited = Instant::now();
        loop {
            let now = holdings(&bench, "a");
            if now == at_first {
                break;
            }
            assert!(
                waited.elapsed() < LEAK_LIMIT,
                "{now:?} and not {at_first:?}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    // So does a clone, whose RAM was its template's; and what it then is can be forked again.
    bench.done(&["fork", "--from", "a", "-n", "b"]);
    let before = bench.guest("b", "cat /proc/sys/kernel/random/boot_id");
    assert!(ids.contains(&before));
    bench.guest("b", "echo mine > /run/x");
    let after = reboot(&bench, "b");
    assert!(!ids.contains(&after));
    assert_eq!(
        bench.guest(
            "b",
            "head -c 5 /dev/vda; ls /run/x 2>/dev/null || echo none"
        ),
        "kept\nnone"
    );
    bench.done(&["fork", "--from", "b", "-n", "c"]);
    assert_eq!(
        bench.guest("c", "cat /proc/sys/kernel/random/boot_id"),
        after
    );

    // A kernel that panics would only panic again: its VM ends.
    bench.run(&["exec", "c", "sh", "-c", "echo c > /proc/sysrq-trigger"]);
    gone(&bench, "c");
    for name in ["a", "b"] {
        bench.done(&["kill", name]);
    }
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

/// Waits until there is no such VM, and nothing of it: one that is just ending answers no more, and
/// what it leaves goes with the first command that finds its process gone.
fn gone(bench: &Bench, name: &str) {
    let waited = Instant::now();
    let is_gone = || bench.run(&["stat", name]).status.code() == Some(3);
    while !is_gone() || bench.leftovers().iter().any(|left| left == name) {
        assert!(waited.elapsed().as_secs() < PATIENCE, "{name} does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_reboot_ends_a_vm_that_is_to_stop_at_one() {
    let bench = Bench::new();
    let ended = bench.boot(
        "a",
        &["--on-reboot", "stop", "--append", "quiet guest.reboot"],
    );
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let told = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(told.contains("reboot"), "{told}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}
