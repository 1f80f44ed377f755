//! VMs that move between two hosts: two runtime directories, with a stream between them that the
//! tests can look into and cut. Each VM proves from inside that it is the same one, and that it runs
//! once.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;
#[path = "guest_migrate/wire.rs"]
mod wire;

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use guest_bench::{Bench, With, bench_with_template, proves_itself};
use serde_json::Value;
use wire::{Lost, Relay};

/// Two hosts that share a store of templates.
struct Hosts {
    a: Bench,
    b: Bench,
}

impl Hosts {
    fn with_template() -> Self {
        let a = bench_with_template(With::Nothing);
        a.done(&["fork", "t", "-n", "anna"]);
        a.guest("anna", "echo only-annas > /run/mine");
        let b = Bench::new();
        b.trust_templates_of(&a);
        Self { a, b }
    }

    /// The command that takes in a VM on `to`, with this store.
    fn receiving(to: &Bench, store: &Bench) -> String {
        let environment = [
            ("CLONE_RUNTIME_DIR", to.path("")),
            (
                "CLONE_TEMPLATE_DIR",
                store.templates().display().to_string(),
            ),
            ("CLONE_SUSPENDED_DIR", to.suspended().display().to_string()),
        ];
        let words = environment.map(|(name, value)| format!("{name}='{value}' "));
        let program = env!("CARGO_BIN_EXE_clone");
        format!("{}exec {program} migrate --receive", words.concat())
    }

    fn to_b(&self) -> String {
        Self::receiving(&self.b, &self.a)
    }

    fn to_a(&self) -> String {
        Self::receiving(&self.a, &self.a)
    }

    /// How many of the hosts have a VM `anna`, in which states.
    fn states(&self) -> Vec<(&'static str, String)> {
        let mut states = Vec::new();
        for (host, bench) in [("a", &self.a), ("b", &self.b)] {
            let listed = bench.json(&["ls", "--state", "--json"]);
            for vm in listed.as_array().unwrap() {
                if vm["name"] == "anna" {
                    states.push((host, vm["state"].as_str().unwrap_or("none").to_owned()));
                }
            }
        }
        states
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What only the same VM can say.
fn identity(bench: &Bench, name: &str) -> String {
    bench.guest(
        name,
        "cat /proc/sys/kernel/random/boot_id /etc/hostname /run/mine",
    )
}

fn count(bench: &Bench, name: &str) -> u64 {
    bench.guest(name, "cat /run/count").parse().unwrap()
}

fn moved(bench: &Bench, name: &str, via: &str, more: &[&str]) -> Value {
    let words = [&["migrate", name, "--json", "--via", via], more].concat();
    bench.json(&words)
}

#[test]
fn a_clone_moves_there_and_back_as_the_same_vm_and_little_of_it_is_sent() {
    let hosts = Hosts::with_template();
    let Hosts { a, b } = &hosts;
    let before = identity(a, "anna");
    let mut counted = count(a, "anna");
    for round in 0..2 {
        let private = a.json(&["stat", "anna", "--json"])["stats"]["memory"]["private_bytes"]
            .as_u64()
            .unwrap();
        let sent = moved(a, "anna", &hosts.to_b(), &[])["bytes"]
            .as_u64()
            .unwrap();
        assert!(
            sent <= private + private / 5,
            "round {round}: {sent} bytes for {private} of its own"
        );
        assert_eq!(hosts.states(), [("b", "running".to_owned())]);
        proves_itself(b, "anna");
        assert_eq!(identity(b, "anna"), before);
        assert!(count(b, "anna") > counted);
        b.guest("anna", &format!("echo {round} > /run/round"));
        moved(b, "anna", &hosts.to_a(), &[]);
        assert_eq!(hosts.states(), [("a", "running".to_owned())]);
        proves_itself(a, "anna");
        assert_eq!(identity(a, "anna"), before);
        assert_eq!(a.guest("anna", "cat /run/round"), round.to_string());
        counted = count(a, "anna");
    }
    // It is an ordinary clone: it can be suspended, snapshotted as a difference, and forked.
    a.done(&["suspend", "anna"]);
    a.done(&["resume", "anna"]);
    a.done(&["snapshot", "anna", "--diff", "-o", "d"]);
    a.done(&["fork", "d", "-n", "child"]);
    assert_eq!(a.guest("child", "cat /run/round"), "1");
    assert_eq!(b.leftovers(), [] as [String; 0]);
}

#[test]
fn a_booted_vm_moves_with_the_disk_that_it_writes() {
    let (a, b) = (Bench::new(), Bench::new());
    let disk = a.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let disk = format!("{disk},overlay=ephemeral");
    let started = a.boot("base", &["--detach", "-c", "2", "--disk", &disk]);
    assert!(started.status.success(), "{started:?}");
    a.wait_for_agent("base");
    // What is written before, while, and after the move; each piece is marked as durable when it is.
    a.guest(
        "base",
        "echo first | dd of=/dev/vda bs=4096 seek=1 conv=fsync; \
         (i=2; while :; do echo block$i | dd of=/dev/vda bs=4096 seek=$i conv=fsync,notrunc; \
         echo $i > /run/durable; i=$((i+1)); usleep 10000; done) >/dev/null 2>&1 &",
    );
    let via = Hosts::receiving(&b, &b);
    moved(&a, "base", &via, &["--bandwidth", "200M"]);
    let durable: u32 = b.guest("base", "cat /run/durable").parse().unwrap();
    // Each block ends with the zeros of the disk: what is left are the lines.
    let check = format!(
        "echo 3 > /proc/sys/vm/drop_caches; \
         dd if=/dev/vda bs=4096 skip=1 count={durable} 2>/dev/null | tr -d '\\0'"
    );
    let expected = (2..=durable).map(|block| format!("block{block}"));
    let expected: Vec<String> = std::iter::once("first".to_owned())
        .chain(expected)
        .collect();
    let read = b.guest("base", &check);
    assert!(durable > 2);
    assert_eq!(read.lines().collect::<Vec<_>>(), expected);
    let later = "a=$(cat /run/durable); sleep 1; b=$(cat /run/durable); [ $b -gt $a ] && echo on";
    assert_eq!(b.guest("base", later), "on");
    assert_eq!(a.leftovers(), [] as [String; 0]);
    // It reboots on the new host, from that host's own kernel.
    b.guest("base", "(sleep 0.2; reboot -f) >/dev/null 2>&1 &");
    std::thread::sleep(Duration::from_secs(2));
    b.wait_for_agent("base");
    assert_eq!(
        b.guest("base", "cat /run/durable 2>/dev/null; echo fresh"),
        "fresh"
    );
}

#[test]
fn a_template_that_the_other_host_lacks_is_sent_first() {
    let hosts = Hosts::with_template();
    let Hosts { a, b } = &hosts;
    let via = Hosts::receiving(b, b);
    moved(a, "anna", &via, &[]);
    proves_itself(b, "anna");
    let ids = [a, b].map(|host| {
        host.json(&["template", "inspect", "t", "--json"])["id"]
            .as_str()
            .unwrap()
            .to_owned()
    });
    assert_eq!(ids[0], ids[1]);
    // The template is in use, and stays.
    assert!(!b.run(&["template", "rm", "t"]).status.success());
}

#[test]
fn what_cannot_move_is_refused_with_the_reason_and_goes_on() {
    let hosts = Hosts::with_template();
    let Hosts { a, b } = &hosts;
    let refused = |name: &str, via: &str, more: &[&str], reason: &str| {
        let words = [&["migrate", name, "--via", via], more].concat();
        let output = a.run(&words);
        assert!(!output.status.success(), "{words:?}");
        assert!(
            text(&output).contains(reason),
            "{reason}: {}",
            text(&output)
        );
    };
    let to_b = hosts.to_b();
    b.boot("anna", &["--detach"]);
    refused("anna", &to_b, &[], "there is a VM `anna` here already");
    b.done(&["kill", "anna"]);
    let greets = "echo Welcome; cat > /dev/null";
    refused("anna", greets, &[], "is not of a migration");
    refused("anna", "exit 7", &[], "exit status: 7");
    refused("nobody", &to_b, &[], "no VM `nobody`");
    let kept = a.path("kept.img");
    fs::File::create(&kept).unwrap().set_len(1 << 20).unwrap();
    a.boot("kept", &["--detach", "--disk", &kept]);
    refused("kept", &to_b, &[], "disk 0 keeps its writes");
    a.done(&["pause", "anna"]);
    refused("anna", &to_b, &[], "paused");
    a.done(&["resume", "anna"]);
    // A guest that writes without a pause, over a thin line.
    a.guest(
        "anna",
        "mount -t tmpfs -o size=48M none /mnt; \
         (while :; do dd if=/dev/urandom of=/mnt/x bs=1M count=32 conv=notrunc; done) \
         >/dev/null 2>&1 &",
    );
    let thin = ["--max-pause", "50", "--bandwidth", "1M"];
    refused("anna", &to_b, &thin, "writes faster");
    assert_eq!(hosts.states(), [("a", "running".to_owned())]);
    proves_itself(a, "anna");
    assert_eq!(b.leftovers(), [] as [String; 0]);
    for words in [
        ["migrate", "--confirm", "anna"],
        ["migrate", "--cancel", "anna"],
    ] {
        assert!(!a.run(&words).status.success(), "{words:?}");
    }
}

/// The word at whose passing the connection is lost decides who has the VM.
#[test]
fn whichever_word_is_lost_at_the_end_the_vm_runs_once() {
    let hosts = Hosts::with_template();
    let Hosts { a, b } = &hosts;
    let before = identity(a, "anna");
    let here = || assert_eq!(hosts.states(), [("a", "running".to_owned())]);

    // Everything has arrived, but the source does not hear it: it goes on there. The destination
    // cannot know that the word was not heard.
    let (told, other) = Relay::run(a, &hosts.to_b(), "anna", Lost::Ready);
    assert!(!told.status.success() && !other.status.success());
    let waits = [("a", "running".to_owned()), ("b", "arrived".to_owned())];
    assert_eq!(hosts.states(), waits);
    proves_itself(a, "anna");
    b.done(&["migrate", "--cancel", "anna"]);
    here();

    // The source gives the VM away, but the destination does not hear it: it is on neither.
    for confirm in [false, true] {
        let (told, other) = Relay::run(a, &hosts.to_b(), "anna", Lost::Go);
        assert!(!told.status.success() && !other.status.success());
        let undecided = [("a", "moved".to_owned()), ("b", "arrived".to_owned())];
        assert_eq!(hosts.states(), undecided);
        for host in [a, b] {
            // Neither runs without the word, by whatever door.
            for words in [
                vec!["resume", "anna"],
                vec!["suspend", "anna"],
                vec!["snapshot", "anna", "-o", "x"],
                vec!["migrate", "anna", "--via", "cat"],
            ] {
                let refused = host.run(&words);
                assert!(!refused.status.success(), "{words:?}");
            }
        }
        assert_eq!(hosts.states(), undecided);
        let word = if confirm { "--confirm" } else { "--cancel" };
        for host in [a, b] {
            host.done(&["migrate", word, "anna"]);
        }
        if confirm {
            assert_eq!(hosts.states(), [("b", "running".to_owned())]);
            assert_eq!(identity(b, "anna"), before);
            proves_itself(b, "anna");
            moved(b, "anna", &hosts.to_a(), &[]);
        }
        here();
        assert_eq!(identity(a, "anna"), before);
        proves_itself(a, "anna");
    }

    // It runs at the destination, and the source does not hear it.
    let (told, other) = Relay::run(a, &hosts.to_b(), "anna", Lost::Running);
    assert!(!told.status.success() && other.status.success());
    assert_eq!(
        hosts.states(),
        [("a", "moved".to_owned()), ("b", "running".to_owned())]
    );
    a.done(&["migrate", "--confirm", "anna"]);
    assert_eq!(hosts.states(), [("b", "running".to_owned())]);
    assert_eq!(identity(b, "anna"), before);
    proves_itself(b, "anna");
}

/// Whoever is killed, whenever: the VM runs on one host, or waits on one to be told.
#[test]
fn whoever_is_killed_the_vm_is_neither_lost_nor_doubled() {
    #[derive(Clone, Copy, Debug)]
    enum Victim {
        Source,
        Destination,
        DestinationVm,
    }
    let hosts = Hosts::with_template();
    let Hosts { a, b } = &hosts;
    for victim in [Victim::Source, Victim::Destination, Victim::DestinationVm] {
        for delay_ms in [20_u64, 150, 300, 700] {
            let via = hosts.to_b();
            let mut source = a
                .command(&["migrate", "anna", "--via", &via])
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(delay_ms));
            match victim {
                Victim::Source => source.kill().unwrap(),
                Victim::Destination => kill_receiver(&b.path("")),
                Victim::DestinationVm => {
                    let pid = fs::read_to_string(b.path("vms/anna/pid")).unwrap_or_default();
                    if let Some(pid) = pid.split_whitespace().next() {
                        let _ = Command::new("kill").args(["-9", pid]).status();
                    }
                }
            }
            let _ = source.wait().unwrap();
            let at = format!("{victim:?} after {delay_ms} ms");
            settle(&hosts, &at);
        }
    }
}

/// Kills the command that takes in a VM for this runtime directory.
fn kill_receiver(runtime: &str) {
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(process.path().join("environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        if String::from_utf8_lossy(&line).contains("--receive") && environment.contains(runtime) {
            let pid = process.file_name().into_string().unwrap();
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
    }
}

/// Waits until the migration has come to its end, has a VM that waits told what to do, and brings it
/// back to the first host.
fn settle(hosts: &Hosts, at: &str) {
    let Hosts { a, b } = hosts;
    let mut last = Vec::new();
    // Timeouts of the processes are up to a minute, and the emulated machine has its own pace.
    for _ in 0..240 {
        let now = hosts.states();
        let runs = now.iter().filter(|(_, state)| state == "running").count();
        assert!(runs <= 1, "{at}: {now:?}");
        if now.len() == 1 && now == last && now[0].1 == "running" {
            break;
        }
        let words: Vec<&str> = now.iter().map(|(_, state)| state.as_str()).collect();
        match words.as_slice() {
            // It was given away, and the other side is not there any more.
            ["moved"] => drop(a.run(&["migrate", "--cancel", "anna"])),
            ["arrived"] => drop(b.run(&["migrate", "--confirm", "anna"])),
            ["moved", "arrived"] => drop(b.run(&["migrate", "--confirm", "anna"])),
            ["moved", "running"] => drop(a.run(&["migrate", "--confirm", "anna"])),
            ["running", "arrived"] => drop(b.run(&["migrate", "--cancel", "anna"])),
            _ => {}
        }
        last = now;
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(last.len(), 1, "{at}: {last:?}");
    let host = if last[0].0 == "a" { a } else { b };
    assert_eq!(host.guest("anna", "cat /run/mine"), "only-annas", "{at}");
    proves_itself(host, "anna");
    if last[0].0 == "b" {
        moved(b, "anna", &hosts.to_a(), &[]);
    }
    assert_eq!(hosts.states(), [("a", "running".to_owned())], "{at}");
}
