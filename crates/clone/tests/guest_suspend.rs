//! VMs that are suspended and resumed: each proves from inside that it is the same one.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use guest_bench::{Bench, With, bench_with_template, proves_itself};

/// What only the same VM can say: its boot, its names, what it wrote, its addresses.
fn identity(bench: &Bench, name: &str) -> String {
    bench.guest(
        name,
        "cat /proc/sys/kernel/random/boot_id /etc/hostname /etc/machine-id /run/mine; \
         cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 | awk '{print $4}'",
    )
}

/// The states of suspended VMs that are kept on disk.
fn states(bench: &Bench) -> Vec<PathBuf> {
    let entries = fs::read_dir(bench.suspended()).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    let is_state = |path: &PathBuf| !path.file_name().unwrap().to_string_lossy().starts_with('.');
    paths.filter(is_state).collect()
}

fn count(bench: &Bench, name: &str) -> u64 {
    bench.guest(name, "cat /run/count").parse().unwrap()
}

#[test]
fn a_suspended_clone_goes_on_as_the_same_vm_again_and_again() {
    let bench = bench_with_template(With::Net);
    bench.done(&["fork", "t", "-n", "anna"]);
    bench.guest("anna", "echo only-annas > /run/mine");
    let (before, counted) = (identity(&bench, "anna"), count(&bench, "anna"));
    for round in 0..3 {
        bench.done(&["suspend", "anna"]);
        // Nothing of it runs, its name and its address are taken, and its template is in use.
        let listed = bench.json(&["ls", "--json"]);
        let anna = listed
            .as_array()
            .unwrap()
            .iter()
            .find(|vm| vm["name"] == "anna");
        assert_eq!(anna.unwrap()["suspended"], true, "{listed}");
        assert!(anna.unwrap()["pid"].is_null());
        assert_eq!(states(&bench).len(), 1);
        for words in [
            vec!["fork", "t", "-n", "anna"],
            vec!["exec", "anna", "true"],
            vec!["template", "rm", "t"],
        ] {
            let refused = bench.run(&words);
            assert!(!refused.status.success(), "{words:?}");
            let told = String::from_utf8(refused.stderr).unwrap();
            assert!(told.contains("suspended"), "{words:?}: {told}");
        }
        let other = format!("other{round}");
        bench.done(&["fork", "t", "-n", &other]);
        bench.done(&["resume", "anna"]);
        proves_itself(&bench, "anna");
        assert_eq!(identity(&bench, "anna"), before);
        assert!(count(&bench, "anna") > counted);
        let clock: u64 = bench.guest("anna", "date +%s").parse().unwrap();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(
            now.abs_diff(clock) <= 5,
            "the clock says {clock}, and it is {now}"
        );
        // Its own changes are part of the next state, and its state is not kept twice.
        bench.guest("anna", &format!("echo round{round} > /run/round; sync"));
        bench.done(&["kill", &other]);
    }
    assert_eq!(bench.guest("anna", "cat /run/round"), "round2");
    // The state that it was resumed from goes with it.
    bench.done(&["kill", "anna"]);
    assert_eq!(states(&bench), [] as [PathBuf; 0]);
    bench.done(&["template", "rm", "t"]);
}

#[test]
fn what_was_booted_or_forked_live_is_suspended_with_its_disk_and_can_be_snapshotted() {
    let bench = Bench::new();
    let disk = bench.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let ephemeral = format!("{disk},overlay=ephemeral");
    let started = bench.boot("base", &["--detach", "--disk", &ephemeral]);
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("base");
    let write = |name: &str, text: &str, at: u32| {
        let script = format!("printf {text} | dd of=/dev/vda bs=4096 seek={at} conv=fsync");
        bench.guest(name, &script);
    };
    let read = |name: &str, at: u32| {
        let script = format!("dd if=/dev/vda bs=4096 skip={at} count=1 2>/dev/null | tr -d '\\0'");
        bench.guest(name, &script)
    };
    bench.guest("base", "echo base > /run/who");
    write("base", "first", 1);
    bench.done(&["suspend", "base"]);
    bench.done(&["resume", "base"]);
    assert_eq!(
        (bench.guest("base", "cat /run/who"), read("base", 1)),
        ("base".into(), "first".into())
    );
    write("base", "second", 2);
    bench.done(&["fork", "--from", "base", "-n", "child"]);
    bench.done(&["kill", "base"]);
    write("child", "third", 3);
    bench.done(&["suspend", "child"]);
    bench.done(&["resume", "child"]);
    for (at, text) in [(1, "first"), (2, "second"), (3, "third")] {
        assert_eq!(read("child", at), text);
    }
    // It is an ordinary VM: it can be made a template, and forked.
    bench.done(&["snapshot", "child", "-o", "whole"]);
    bench.done(&["fork", "whole", "-n", "clone"]);
    write("clone", "fourth", 4);
    bench.done(&["suspend", "clone"]);
    bench.done(&["resume", "clone"]);
    // A difference to its template takes along what was saved with it.
    bench.done(&["snapshot", "clone", "--diff", "-o", "diff"]);
    bench.done(&["fork", "diff", "-n", "last"]);
    for (at, text) in [(1, "first"), (2, "second"), (3, "third"), (4, "fourth")] {
        assert_eq!(read("last", at), text);
    }
    assert_eq!(bench.guest("last", "cat /run/who"), "base");
}

#[test]
fn a_state_runs_once_whoever_is_killed_and_a_damaged_one_not_at_all() {
    let bench = bench_with_template(With::Net);
    bench.done(&["fork", "t", "-n", "anna"]);
    // The command is killed at different moments: the VM is either there or suspended, never both,
    // and never lost.
    for delay_ms in [5_u64, 20, 40, 80, 160, 320] {
        let mut suspend = bench.command(&["suspend", "anna"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        let _ = suspend.kill();
        let ended = suspend.wait().unwrap();
        assert!(ended.success() || ended.signal() == Some(9), "{ended}");
        let listed = bench.json(&["ls", "--json"]);
        let named = listed
            .as_array()
            .unwrap()
            .iter()
            .filter(|vm| vm["name"] == "anna");
        assert_eq!(named.count(), 1, "after {delay_ms} ms: {listed}");
        bench.done(&["resume", "anna"]);
        proves_itself(&bench, "anna");
        // What was saved before is void now.
        bench.done(&["kill", "anna"]);
        let again = bench.run(&["resume", "anna"]);
        assert!(!again.status.success(), "it ran twice after {delay_ms} ms");
        assert_eq!(states(&bench), [] as [PathBuf; 0]);
        bench.done(&["fork", "t", "-n", "anna"]);
    }
    // The command that resumes is killed.
    for delay_ms in [5_u64, 20, 40, 80] {
        bench.done(&["suspend", "anna"]);
        let mut resume = bench.command(&["resume", "anna"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        let _ = resume.kill();
        let _ = resume.wait().unwrap();
        // The process of a VM that did not run yet ends with the command.
        let settled = || {
            bench
                .run(&["exec", "--wait", "1", "anna", "true"])
                .status
                .success()
        };
        if !settled() && !states(&bench).is_empty() {
            let _ = bench.run(&["resume", "anna"]);
        }
        match bench.run(&["exec", "--wait", "60", "anna", "cat", "/run/nonce"]) {
            output if output.status.success() => {}
            output => panic!("anna is lost after {delay_ms} ms: {output:?}"),
        }
    }
    bench.done(&["suspend", "anna"]);
    let [state] = states(&bench).try_into().unwrap();
    let memory = state.join("memory");
    let mut bytes = fs::read(&memory).unwrap();
    let changed = bytes.iter().position(|byte| *byte != 0).unwrap();
    bytes[changed] ^= 1;
    fs::write(&memory, bytes).unwrap();
    let refused = bench.run(&["resume", "anna"]);
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(told.contains("damaged"), "{told}");
    bench.done(&["rm", "anna"]);
    assert_eq!(states(&bench), [] as [PathBuf; 0]);
}
