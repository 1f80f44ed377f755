//! A stock Debian with a Python process that holds 100 MiB, templated and forked fifty times; and a
//! live fork of it under load.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use guest_bench::{Bench, PATIENCE};
use sha2::{Digest, Sha256};

const CLONES: usize = 50;
/// Clones that run at a time: where guests are emulated, a Debian takes seconds of the processor to
/// become itself, and idle some twentieth of it, so that those that have answered are paused.
const AWAKE: usize = 5;

/// Holds its data and a nonce; answers each line in one FIFO with a line in the other.
const HOLDER: &str = r#"
import os, random
random.seed(7)
data = bytearray(random.randbytes(1 << 20) * 100)
nonce = os.urandom(8).hex()
for path in ('/run/ask', '/run/answer'):
    os.mkfifo(path)
open('/run/held', 'w').write(nonce)
while True:
    with open('/run/ask') as ask:
        word = ask.read().strip()
    total = sum(data[at] for at in range(0, len(data), 65537))
    with open('/run/answer', 'w') as answer:
        answer.write(f'{nonce} {len(data)} {total} {word}')
"#;

/// Works for ever, and proves at each step that nothing was lost: a chain of hashes over a buffer
/// that it changes. [`Chain`] is the same.
const WORKER: &str = r#"
import hashlib, os
buffer = bytearray(8 << 20)
link, steps = bytes(32), 0
place = lambda number: int.from_bytes(number, 'big') % (len(buffer) - 4096)
while True:
    at = place(link[4:8])
    link = hashlib.sha256(link + bytes(buffer[at:at + 4096])).digest()
    at = place(link[:4])
    buffer[at:at + 4096] = link * 128
    steps += 1
    if steps % 50 == 0:
        with open('/run/steps.new', 'w') as out:
            out.write(f'{steps} {link.hex()}')
        os.rename('/run/steps.new', '/run/steps')
"#;

fn debian(cpus: &str) -> Bench {
    let bench = Bench::new();
    let root = format!("{},overlay=ephemeral", bench.debian().display());
    let words = [
        "--detach", "-c", cpus, "-m", "512M", "--disk", &root, "--net", "nat",
    ];
    let started = bench.boot("base", &words);
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("base");
    // All is started by then, but udev may be at work for long, and clones would all go on with it.
    bench.guest(
        "base",
        "systemctl is-system-running --wait; udevadm settle --timeout=600",
    );
    bench
}

fn start(bench: &Bench, name: &str, program: &str) {
    let script = format!("cat > /root/{name}.py <<'END'\n{program}\nEND\n");
    bench.guest("base", &script);
    let run = format!("setsid python3 /root/{name}.py >/root/{name}.log 2>&1 </dev/null &");
    bench.guest("base", &run);
}

fn wait_for(bench: &Bench, vm: &str, file: &str) -> String {
    let script =
        format!("for i in $(seq 600); do [ -s {file} ] && break; sleep 0.1; done; cat {file}");
    bench.guest(vm, &script)
}

#[test]
fn fifty_clones_answer_with_the_data_in_memory_and_their_own_identity() {
    // Two CPUs are the other tests' business.
    let bench = debian("1");
    start(&bench, "holder", HOLDER);
    let nonce = wait_for(&bench, "base", "/run/held");
    bench.done(&["snapshot", "base", "-o", "python"]);
    let expected = ask(&bench, "base", "base");
    bench.done(&["pause", "base"]);
    let (mut hosts, mut addresses, mut machines, mut random) = (
        BTreeSet::new(),
        BTreeSet::new(),
        BTreeSet::new(),
        BTreeSet::new(),
    );
    for batch in 0..CLONES / AWAKE {
        let (prefix, count) = (format!("c{batch}"), AWAKE.to_string());
        let words = ["fork", "python", "-n", &prefix, "--count", &count, "--json"];
        let forked = bench.json(&words);
        let clones = forked["clones"].as_array().unwrap();
        assert_eq!(clones.len(), AWAKE);
        for clone in clones {
            let name = clone["name"].as_str().unwrap();
            let answer = ask(&bench, name, name);
            assert_eq!(answer, expected.replace(" base", &format!(" {name}")));
            assert!(answer.starts_with(&nonce), "{answer}");
            let own = bench.guest(
                name,
                "hostname; cat /sys/class/net/eth0/address; hostname -I; \
                 cat /etc/machine-id; od -An -N16 -tx1 /dev/urandom",
            );
            let own: Vec<&str> = own.lines().collect();
            assert_eq!(own[0], name);
            hosts.insert(own[1].to_owned());
            addresses.insert(own[2].to_owned());
            machines.insert(own[3].to_owned());
            random.insert(own[4].to_owned());
            bench.done(&["pause", name]);
        }
    }
    for set in [&hosts, &addresses, &machines, &random] {
        assert_eq!(set.len(), CLONES, "{set:?}");
    }
    let running = bench.json(&["ls", "--json"]);
    assert_eq!(running.as_array().unwrap().len(), CLONES + 1);
    // They reach the network at once, and one that is killed disturbs none.
    let gateway = "ip route show default | awk '{print $3}'";
    for name in ["c0-1", "c0-2"] {
        bench.done(&["resume", name]);
        bench.guest(name, &format!("ping -c 1 -W 20 $({gateway})"));
    }
    // Their journal goes on, and its reader finds it below their own id.
    let entry = bench.guest("c0-2", "journalctl --quiet --lines 1 --output cat");
    assert!(!entry.is_empty());
    bench.done(&["kill", "c0-1"]);
    let last = format!("c{}-{AWAKE}", CLONES / AWAKE - 1);
    for name in [last.as_str(), "base"] {
        bench.done(&["resume", name]);
    }
    for name in ["c0-2", last.as_str(), "base"] {
        let answer = ask(&bench, name, name);
        assert!(answer.starts_with(&nonce), "{answer}");
    }
    kill_all(&bench);
}

fn ask(bench: &Bench, vm: &str, word: &str) -> String {
    bench.guest(vm, &format!("echo {word} > /run/ask; cat /run/answer"))
}

fn kill_all(bench: &Bench) {
    for vm in bench.json(&["ls", "--json"]).as_array().unwrap() {
        bench.done(&["kill", vm["name"].as_str().unwrap()]);
    }
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_live_fork_under_load_leaves_both_computations_right() {
    let bench = debian("2");
    start(&bench, "worker", WORKER);
    wait_for(&bench, "base", "/run/steps");
    bench.guest("base", "echo before > /root/marker; sync");
    let forked = bench.json(&["fork", "--from", "base", "-n", "child", "--json"]);
    assert!(
        forked["snapshot"]["pause_us"].as_u64().unwrap() > 0,
        "{forked}"
    );
    // Each has its own disk from that instant.
    bench.guest("base", "echo parent >> /root/marker; sync");
    bench.guest("child", "echo child >> /root/marker; sync");
    assert_eq!(bench.guest("base", "cat /root/marker"), "before\nparent");
    assert_eq!(bench.guest("child", "cat /root/marker"), "before\nchild");
    let mut chain = Chain::new();
    let reached: Vec<(u64, String)> = ["base", "child"]
        .into_iter()
        .map(|name| {
            let first = steps(&bench, name);
            let waited = Instant::now();
            let reached = loop {
                let now = steps(&bench, name);
                if now.0 >= first.0 + 100 {
                    break now;
                }
                assert!(
                    waited.elapsed() < Duration::from_secs(PATIENCE),
                    "{name} stands still"
                );
            };
            bench.done(&["pause", name]);
            reached
        })
        .collect();
    for (steps, link) in reached {
        assert_eq!(chain.after(steps), link, "after {steps} steps");
    }
    kill_all(&bench);
}

fn steps(bench: &Bench, vm: &str) -> (u64, String) {
    let text = bench.guest(vm, "cat /run/steps");
    let (steps, link) = text.split_once(' ').unwrap();
    (steps.parse().unwrap(), link.to_owned())
}

/// The worker's computation, done by the test.
struct Chain {
    buffer: Vec<u8>,
    links: Vec<[u8; 32]>,
}

impl Chain {
    fn new() -> Self {
        Self {
            buffer: vec![0; 8 << 20],
            links: Vec::new(),
        }
    }

    fn place(&self, number: &[u8]) -> usize {
        let number = u32::from_be_bytes(number.try_into().unwrap());
        number as usize % (self.buffer.len() - 4096)
    }

    /// The link after so many steps, which are at least one.
    fn after(&mut self, steps: u64) -> String {
        while (self.links.len() as u64) < steps {
            let last = self.links.last().copied().unwrap_or_default();
            let read = self.place(&last[4..8]);
            let mut hash = Sha256::new();
            hash.update(last);
            hash.update(&self.buffer[read..read + 4096]);
            let link: [u8; 32] = hash.finalize().into();
            let written = self.place(&link[..4]);
            self.buffer[written..written + 4096].copy_from_slice(&link.repeat(128));
            self.links.push(link);
        }
        let link = &self.links[steps as usize - 1];
        link.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
