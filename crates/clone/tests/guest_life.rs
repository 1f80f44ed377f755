//! VMs with a real guest, from `run` to their end, through the command alone.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
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

/// The process of a VM, in `/proc`.
fn process(bench: &Bench, name: &str) -> PathBuf {
    let vms = bench.json(&["ls", "--json"]);
    let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name);
    Path::new("/proc").join(vm.unwrap()["pid"].to_string())
}

/// What every open descriptor of a process leads to, with the interface that a tap's queue is of.
fn open_files(process: &Path) -> Vec<(String, Option<String>)> {
    let descriptors = fs::read_dir(process.join("fd")).unwrap();
    let numbers = descriptors.map(|entry| entry.unwrap().file_name());
    let look = |number| {
        let target = fs::read_link(process.join("fd").join(&number)).unwrap();
        let info = fs::read_to_string(process.join("fdinfo").join(&number)).unwrap();
        let interface = info.lines().find_map(|line| line.strip_prefix("iff:"));
        let interface = interface.map(|name| name.trim().to_owned());
        (target.to_string_lossy().into_owned(), interface)
    };
    numbers.map(look).collect()
}

/// Whether a VM's process that was booted without disks may have this open.
fn may_be_open(target: &str, bench: &Bench, name: &str) -> bool {
    let own = bench.path(&format!("vms/{name}/"));
    let files = ["/dev/null", "/dev/kvm", "/dev/net/tun", "/dev/vhost-net"];
    let objects = ["anon_inode:", "socket:[", "pipe:["];
    let of_proc = ["/pagemap", "/smaps_rollup"];
    let booted = [
        bench.kernel().to_str().unwrap(),
        "initramfs.cpio",
        "vmlinux",
    ];
    files.contains(&target)
        || objects.iter().any(|kind| target.starts_with(kind))
        || target.starts_with(&own)
        || target.starts_with("/proc/") && of_proc.iter().any(|file| target.ends_with(file))
        || booted.iter().any(|file| target.ends_with(file))
}

/// Whether a process is in a cgroup of its own with limits of memory and threads.
fn is_limited(process: &Path) -> bool {
    let cgroup = fs::read_to_string(process.join("cgroup")).unwrap();
    let path = cgroup.trim().strip_prefix("0::/clone/").unwrap();
    let limits = ["memory.max", "pids.max"].map(|limit| {
        let file = Path::new("/sys/fs/cgroup/clone").join(path).join(limit);
        fs::read_to_string(file).unwrap()
    });
    limits
        .iter()
        .all(|limit| limit.trim().parse::<u64>().is_ok())
}

#[test]
fn vms_started_at_once_have_nothing_of_each_other_open_and_a_whole_jail() {
    let bench = Bench::new();
    // A file that the command itself was given, as a shell's redirection gives one.
    let start = |name: &str| {
        let script = format!(
            "exec 7</etc/passwd; exec {} run --require-jail -d -n {name} -m 256M -k {} -i {} --net nat",
            env!("CARGO_BIN_EXE_clone"),
            bench.kernel().display(),
            bench.initrd().display()
        );
        let started = bench.other("sh", &["-c", &script]).output().unwrap();
        assert!(started.status.success(), "{started:?}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| start("a"));
        start("b");
    });
    let mut taps = Vec::new();
    for name in ["a", "b"] {
        let process = process(&bench, name);
        let open = open_files(&process);
        let foreign = open
            .iter()
            .find(|(target, _)| !may_be_open(target, &bench, name));
        assert_eq!(foreign, None);
        let of_taps: Vec<_> = open
            .into_iter()
            .filter_map(|(_, interface)| interface)
            .collect();
        assert_eq!(of_taps.len(), 1, "{of_taps:?}");
        taps.extend(of_taps);
        for thread in fs::read_dir(process.join("task")).unwrap() {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            // The kernel's own worker for vhost shows up as a thread, and never runs user code.
            let is_filtered = status.contains("\nSeccomp:\t2\n");
            assert!(
                is_filtered || status.starts_with("Name:\tvhost-"),
                "{status}"
            );
            assert!(status.contains("\nCapPrm:\t0000000000000000\n"), "{status}");
        }
        assert!(is_limited(&process), "{}", process.display());
        let environment = fs::read(process.join("environ")).unwrap();
        assert!(!String::from_utf8_lossy(&environment).contains("CLONE_RUNTIME_DIR"));
        let info = bench.json(&["stat", name, "--json"]);
        assert_eq!(info["info"]["jail"]["missing"], serde_json::json!([]));
        bench.done(&["kill", name]);
    }
    assert_ne!(taps[0], taps[1]);
}

#[test]
fn a_missing_layer_is_a_warning_of_run_and_a_refusal_where_it_is_required() {
    let bench = Bench::new();
    let start = |name: &str, option: &str| {
        let script = format!(
            "mount -t tmpfs none /sys/fs/cgroup && exec {} run {option} -d -n {name} -m 256M -k {} -i {}",
            env!("CARGO_BIN_EXE_clone"),
            bench.kernel().display(),
            bench.initrd().display()
        );
        let words = ["--mount", "sh", "-c", &script];
        bench.other("unshare", &words).output().unwrap()
    };
    let text = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let started = start("a", "--require-jail=landlock,namespaces,user-id");
    assert!(started.status.success(), "{started:?}");
    let told = text(&started);
    assert!(
        told.contains("warning: the VM's jail lacks a layer: cgroup"),
        "{told}"
    );
    let stat = String::from_utf8(bench.done(&["stat", "a"]).stdout).unwrap();
    assert!(
        stat.contains("jail lacks") && stat.contains("cgroup: cannot find"),
        "{stat}"
    );
    let log = fs::read_to_string(bench.path("vms/a/vmm.log")).unwrap();
    assert!(log.contains("the jail lacks a layer: cgroup"), "{log}");
    bench.done(&["kill", "a"]);
    let refused = start("b", "--require-jail");
    assert!(!refused.status.success(), "{refused:?}");
    let told = text(&refused);
    assert!(told.contains("a layer that is required: cgroup"), "{told}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

/// What the process of a VM has open, and its threads.
fn holdings(bench: &Bench, name: &str) -> (usize, usize) {
    let process = process(bench, name);
    let count = |of: &str| fs::read_dir(process.join(of)).unwrap().count();
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
