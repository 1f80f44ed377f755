//! Directories of the host in a tiny guest, from both sides, and in what becomes of the VM: clones
//! with directories of their own, live forks, suspended VMs, and servers that die.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use guest_bench::Bench;

/// A guest `base` with the directory `first` at /mnt/src, and `docs`, read-only, at /mnt/docs.
fn bench_with_shares() -> Bench {
    let bench = Bench::new();
    for (dir, file, content) in [
        ("first", "name", "first"),
        ("first", "held", "of the first"),
        ("second", "name", "second"),
        ("second", "held", "of the second"),
        ("docs", "page", "text"),
    ] {
        fs::create_dir_all(bench.path(dir)).unwrap();
        fs::write(PathBuf::from(bench.path(dir)).join(file), content).unwrap();
    }
    let src = format!("{}=src:/mnt/src", bench.path("first"));
    let docs = format!("{}=docs,ro", bench.path("docs"));
    let started = bench.boot("base", &["--detach", "--share", &src, "--share", &docs]);
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("base");
    bench.guest(
        "base",
        "mkdir -p /mnt/docs && mount -t virtiofs docs /mnt/docs",
    );
    bench
}

fn host_file(bench: &Bench, dir: &str, name: &str) -> PathBuf {
    PathBuf::from(bench.path(dir)).join(name)
}

/// Opens `held` in the guest and reads it only when told.
fn hold_open(bench: &Bench, name: &str) {
    bench.guest(
        name,
        "rm -f /run/go /run/read /run/error; \
         (exec 3</mnt/src/held; touch /run/holds; \
          while [ ! -e /run/go ]; do usleep 50000; done; \
          cat <&3 >/run/read.new 2>/run/error; mv /run/read.new /run/read) >/dev/null 2>&1 & \
         while [ ! -e /run/holds ]; do usleep 20000; done",
    );
}

/// What the guest reads from the file that it has open: the content, and the error.
fn read_held(bench: &Bench, name: &str) -> String {
    bench.guest(
        name,
        "touch /run/go; while [ ! -e /run/read ]; do usleep 20000; done; cat /run/read /run/error",
    )
}

#[test]
fn both_sides_see_what_the_other_writes_and_a_read_only_share_is_not_written() {
    let bench = bench_with_shares();
    let guest = |script: &str| bench.guest("base", script);
    assert_eq!(guest("cat /mnt/src/name"), "first");
    guest("cd /mnt/src && mkdir -p d/e && echo made >d/e/f && mv d/e d/g && ln -s g d/link");
    let made = host_file(&bench, "first", "d/link/f");
    assert_eq!(fs::read_to_string(made).unwrap(), "made\n");
    fs::write(host_file(&bench, "first", "name"), "changed").unwrap();
    assert_eq!(guest("sleep 1.2; cat /mnt/src/name"), "changed");
    // Whole, at any place, and at the end.
    guest("cd /mnt/src && dd if=/dev/urandom of=big bs=1M count=16 2>/dev/null && sync");
    let sums = guest("cd /mnt/src; echo 3 >/proc/sys/vm/drop_caches; md5sum <big; md5sum <big");
    let host = std::process::Command::new("md5sum")
        .stdin(fs::File::open(host_file(&bench, "first", "big")).unwrap())
        .output()
        .unwrap();
    let host = String::from_utf8(host.stdout).unwrap();
    assert!(
        sums.lines().all(|line| line.trim() == host.trim()),
        "{sums} {host}"
    );
    guest("cd /mnt/src; printf 1 >log; for i in 2 3 4; do printf $i >>log; done");
    let log = host_file(&bench, "first", "log");
    assert_eq!(fs::read_to_string(log).unwrap(), "1234");
    guest("cd /mnt/src; i=0; mkdir many; while [ $i -lt 300 ]; do : >many/$i; i=$((i+1)); done");
    assert_eq!(
        guest("ls /mnt/src/many | wc -l; rm -r /mnt/src/many"),
        "300"
    );
    assert!(!host_file(&bench, "first", "many").exists());
    // Nothing of the host is reached by a link, since the guest follows it in its own tree.
    std::os::unix::fs::symlink("/run", host_file(&bench, "first", "run")).unwrap();
    assert_eq!(
        guest("ls -d /mnt/src/run/vms 2>/dev/null || echo none"),
        "none"
    );

    assert_eq!(guest("cat /mnt/docs/page"), "text");
    for change in [
        "echo x >/mnt/docs/page",
        "touch /mnt/docs/new",
        "rm /mnt/docs/page",
    ] {
        let refused = guest(&format!("({change}) 2>&1 || true"));
        assert!(refused.contains("Read-only"), "{change}: {refused}");
    }
    assert_eq!(fs::read_dir(bench.path("docs")).unwrap().count(), 1);
    let listed = bench.json(&["share", "ls", "base", "--json"]);
    assert_eq!(listed[1]["tag"], "docs", "{listed}");
    assert_eq!(listed[1]["read_only"], true, "{listed}");
    let moved = bench.run(&["migrate", "base", "tcp:127.0.0.1:1"]);
    assert!(!moved.status.success(), "{moved:?}");
    bench.done(&["kill", "base"]);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn open_files_go_on_in_forks_and_suspended_vms_where_the_directory_is_the_same() {
    let bench = bench_with_shares();
    hold_open(&bench, "base");
    bench.done(&["snapshot", "base", "-o", "t"]);
    let without = bench.run(&["fork", "t", "-n", "without"]);
    let told = String::from_utf8_lossy(&without.stderr).into_owned();
    assert!(told.contains("--share src=DIRECTORY"), "{told}");
    let manifest = fs::read_to_string(bench.templates().join("t/manifest.json")).unwrap();
    assert!(manifest.contains("\"src\""), "{manifest}");
    assert!(!manifest.contains(&bench.path("first")), "{manifest}");

    let docs = format!("docs={},ro", bench.path("docs"));
    let fork = |name: &str, dir: &str| {
        let src = format!("src={}", bench.path(dir));
        bench.done(&["fork", "t", "-n", name, "--share", &src, "--share", &docs]);
    };
    fork("same", "first");
    fork("other", "second");
    assert_eq!(read_held(&bench, "same"), "of the first");
    let stale = read_held(&bench, "other");
    assert!(stale.contains("Stale file handle"), "{stale}");
    // The new directory is there under its names, once what the guest remembers is too old.
    let name = "sleep 1.2; cat /mnt/src/name; echo mine >/mnt/src/mine; cat /mnt/docs/page";
    assert_eq!(bench.guest("other", name), "secondtext");
    assert!(host_file(&bench, "second", "mine").exists());
    assert!(!host_file(&bench, "first", "mine").exists());

    bench.done(&["fork", "--from", "base", "-n", "live"]);
    assert_eq!(read_held(&bench, "live"), "of the first");
    bench.done(&["suspend", "base"]);
    bench.done(&["resume", "base"]);
    assert_eq!(read_held(&bench, "base"), "of the first");
    for name in ["base", "live", "same", "other"] {
        bench.done(&["kill", name]);
    }
    assert_eq!(bench.leftovers(), [""; 0]);
    assert_eq!(servers(), [0; 0]);
}

/// The processes of shares' servers.
fn servers() -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_server = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            name.trim() == "clone-share" && !status.contains("State:\tZ")
        };
        let found: Vec<u32> = pids.filter(is_server).collect();
        if found.is_empty() || Instant::now() > deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_server_that_dies_or_hangs_costs_the_guest_its_share_and_nothing_else() {
    let bench = bench_with_shares();
    let pids = servers();
    assert_eq!(pids.len(), 2, "{pids:?}");
    for pid in &pids {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let dirty = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Private_Dirty:"));
        let dirty = dirty.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
        assert!(dirty.unwrap() < 1024, "an idle share: {rollup}");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    }
    for pid in pids {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    let failed = bench.guest("base", "cat /mnt/src/held 2>&1 || true");
    assert!(
        failed.contains("I/O error") || failed.contains("Input/output"),
        "{failed}"
    );
    let listed = bench.json(&["share", "ls", "base", "--json"]);
    assert!(listed[0]["failure"].as_str().is_some(), "{listed}");
    assert_eq!(bench.guest("base", "echo lives"), "lives");
    // It can be forked and goes on as a VM without its share.
    bench.done(&["fork", "--from", "base", "-n", "live"]);
    assert_eq!(bench.guest("live", "sleep 1.2; cat /mnt/src/name"), "first");
    for name in ["base", "live"] {
        bench.done(&["kill", name]);
    }
    assert_eq!(bench.leftovers(), [""; 0]);
}
