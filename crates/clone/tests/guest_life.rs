//! VMs with a real guest, from `run` to their end, through the command alone.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs;
use std::process::Command;

use guest_bench::Bench;
use serde_json::Value;

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
