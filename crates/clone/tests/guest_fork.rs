//! Forks of a tiny guest: each clone proves from inside that it lives, and that it is itself.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest_bench::{Bench, PATIENCE, With, bench_with_template, proves_itself};

fn kill_all(bench: &Bench) {
    for vm in bench.json(&["ls", "--json"]).as_array().unwrap() {
        bench.done(&["kill", vm["name"].as_str().unwrap()]);
    }
    assert_eq!(bench.leftovers(), [""; 0]);
    let hidden = fs::read_dir(bench.path("vms")).unwrap();
    let hidden = hidden.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = hidden
        .filter(|name| name.starts_with(".live") || name.starts_with(".standby"))
        .collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn clones_live_and_are_themselves_cold_warm_and_live() {
    let bench = bench_with_template(With::Nothing);
    bench.done(&["fork", "t", "-n", "cold", "--count", "3"]);
    let mut serve = bench.command(&["template", "serve", "t", "--standbys", "2"]);
    let mut serve = serve.stdout(Stdio::null()).spawn().unwrap();
    let waited = Instant::now();
    while standbys(&bench) < 2 {
        assert!(
            waited.elapsed() < Duration::from_secs(PATIENCE),
            "no standbys came"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    // They have waited for a while when they are adopted, which their guests must not notice.
    std::thread::sleep(Duration::from_secs(2));
    let forked = bench.json(&["fork", "t", "-n", "warm", "--json"]);
    assert_eq!(forked["clones"][0]["warm"], true, "{forked}");
    bench.done(&["fork", "--from", "warm", "-n", "live"]);
    let names = ["cold-1", "cold-2", "cold-3", "warm", "live"];
    for name in names {
        proves_itself(&bench, name);
    }
    they_are_themselves(&bench, &names);
    time_goes_on(&bench, "warm");
    // Who keeps standbys ready takes with it those that nobody took.
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&serve),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(serve.wait().unwrap().success());
    assert_eq!(standbys(&bench), 0);
    proves_itself(&bench, "warm");
    kill_all(&bench);
    bench.done(&["template", "rm", "t"]);
}

fn standbys(bench: &Bench) -> usize {
    let entries = fs::read_dir(bench.path("vms")).unwrap();
    let names = entries.map(|entry| entry.unwrap());
    let ready = names.filter(|entry| {
        entry.file_name().to_str().unwrap().starts_with(".standby")
            && entry.path().join("parent.json").exists()
    });
    ready.count()
}

fn they_are_themselves(bench: &Bench, names: &[&str]) {
    let mut random = BTreeSet::new();
    let mut machines = BTreeSet::new();
    for name in names {
        assert_eq!(bench.guest(name, "hostname"), *name);
        assert!(random.insert(bench.guest(name, "od -An -N16 -tx1 /dev/urandom")));
        assert!(machines.insert(bench.guest(name, "cat /etc/machine-id")));
    }
}

/// The wall clock is right, and the guest's own time did not count the wait.
fn time_goes_on(bench: &Bench, name: &str) {
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let told: f64 = bench
        .guest(name, "date +%s.%N || date +%s")
        .parse()
        .unwrap_or_else(|_| {
            // A busybox without nanoseconds.
            bench.guest(name, "date +%s").parse().unwrap()
        });
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(
        told >= before.as_secs_f64() - 1.0 && told <= after.as_secs_f64() + 1.0,
        "{told} is not between {before:?} and {after:?}"
    );
    let up = |name: &str| -> f64 {
        let text = bench.guest(name, "cat /proc/uptime");
        text.split(' ').next().unwrap().parse().unwrap()
    };
    // The template is older than the clone by what was waited here.
    assert!(up(name) < up("cold-1"), "the clone has run for less long");
}

#[test]
fn a_chain_of_differences_ten_deep_holds_every_step() {
    let bench = bench_with_template(With::Nothing);
    let mut parent = "t".to_owned();
    for step in 0..10 {
        let (vm, next) = (format!("vm{step}"), format!("t{step}"));
        bench.done(&["fork", &parent, "-n", &vm]);
        bench.guest(&vm, &format!("echo step{step} >> /run/steps"));
        let taken = bench.json(&["snapshot", &vm, "-o", &next, "--diff", "--json"]);
        assert!(
            taken["memory_bytes"].as_u64().unwrap() < 64 << 20,
            "{taken}"
        );
        bench.done(&["kill", &vm]);
        parent = next;
    }
    bench.done(&["template", "verify", &parent]);
    bench.done(&["template", "flatten", &parent, "-o", "flat"]);
    for (name, template) in [("deep", parent.as_str()), ("flat", "flat")] {
        bench.done(&["fork", template, "-n", name]);
        proves_itself(&bench, name);
        let steps = bench.guest(name, "cat /run/steps");
        assert_eq!(steps.lines().count(), 10);
        assert!(steps.ends_with("step9"), "{steps}");
    }
    kill_all(&bench);
}

#[test]
fn a_template_in_use_stays_and_a_damaged_one_starts_nothing() {
    let bench = bench_with_template(With::Nothing);
    bench.done(&["fork", "t", "-n", "a"]);
    let refused = bench.run(&["template", "rm", "t"]);
    assert!(!refused.status.success());
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(told.contains("in use"), "{told}");
    bench.done(&["kill", "a"]);
    // The file is another's, too, and so replaced before it is changed.
    let layer = bench.templates().join("t/memory-0.layer");
    let own = bench.templates().join("t/own");
    fs::copy(&layer, &own).unwrap();
    fs::rename(&own, &layer).unwrap();
    let mut permissions = fs::metadata(&layer).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
    fs::set_permissions(&layer, permissions).unwrap();
    let file = fs::File::options().write(true).open(&layer).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x5A; 4096], 16 << 20).unwrap();
    let damaged = bench.run(&["fork", "t", "-n", "b"]);
    assert!(!damaged.status.success());
    let told = String::from_utf8_lossy(&damaged.stderr).into_owned();
    assert!(told.contains("memory-0.layer"), "{told}");
    kill_all(&bench);
}
