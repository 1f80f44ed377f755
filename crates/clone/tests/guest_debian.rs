//! A stock Debian with systemd, two CPUs, two disks and every device, through the command alone.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_bench::{Bench, PATIENCE};

/// Bytes sent over the network.
const TRANSFER: usize = 8 << 20;

fn debian() -> Bench {
    let bench = Bench::new();
    let second = bench.path("second.img");
    File::create(&second).unwrap().set_len(64 << 20).unwrap();
    let root = format!("{},overlay=ephemeral", bench.debian().display());
    let words = [
        "--detach", "-c", "2", "-m", "512M", "--disk", &root, "--disk", &second, "--net",
        "nat,host",
    ];
    let started = bench.boot("a", &words);
    assert!(started.status.success(), "{started:?}");
    bench
}

fn guest(bench: &Bench, script: &str) -> String {
    let output = bench.run(&["exec", "a", "sh", "-c", script]);
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_stock_debian_uses_every_device_and_leaves_nothing() {
    let bench = debian();
    bench.wait_for_agent("a");
    assert_eq!(
        guest(&bench, "systemctl is-system-running --wait").trim(),
        "running"
    );
    assert_eq!(guest(&bench, "nproc").trim(), "2");
    assert_eq!(
        guest(&bench, "lsblk -nbdo NAME,SIZE /dev/vdb")
            .split_whitespace()
            .collect::<Vec<_>>(),
        ["vdb", "67108864"]
    );
    guest(&bench, "cmp -n 16 /dev/hwrng /dev/zero; [ $? = 1 ]");
    a_login_prompt_is_on_the_console(&bench);
    a_hundred_mebibytes_of_output_arrive(&bench);
    the_network_reaches_the_host(&bench);
    the_balloon_takes_and_gives(&bench);
    let stopped = bench.run(&["stop", "--timeout", "120", "a"]);
    assert!(stopped.status.success(), "{stopped:?}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    let links = Command::new("ip").args(["-br", "link"]).output().unwrap();
    assert!(
        !String::from_utf8_lossy(&links.stdout).contains("clone-"),
        "{links:?}"
    );
}

fn a_login_prompt_is_on_the_console(bench: &Bench) {
    let limit = Instant::now() + Duration::from_secs(PATIENCE);
    loop {
        let console = bench.run(&["logs", "a"]).stdout;
        if String::from_utf8_lossy(&console).contains("login:") {
            return;
        }
        assert!(
            Instant::now() < limit,
            "{}",
            String::from_utf8_lossy(&console)
        );
        thread::sleep(Duration::from_millis(500));
    }
}

fn a_hundred_mebibytes_of_output_arrive(bench: &Bench) {
    let sum_of = |mut command: Command| {
        let mut printer = command.stdout(Stdio::piped()).spawn().unwrap();
        let input = Stdio::from(printer.stdout.take().unwrap());
        let sum = Command::new("sha256sum").stdin(input).output().unwrap();
        assert!(printer.wait().unwrap().success());
        String::from_utf8(sum.stdout).unwrap()
    };
    let mut here = Command::new("seq");
    here.args(["1", "13000000"]);
    let guest = bench.command(&["exec", "a", "seq", "1", "13000000"]);
    assert_eq!(sum_of(guest), sum_of(here));
}

fn the_network_reaches_the_host(bench: &Bench) {
    let route = guest(bench, "ip route show default");
    let gateway = route.split_whitespace().nth(2).unwrap();
    guest(bench, &format!("ping -c 3 -W 5 {gateway}"));
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiver = thread::spawn(move || {
        let mut received = Vec::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_end(&mut received)
            .unwrap();
        received
    });
    let program = format!(
        "import socket; s = socket.create_connection(('{gateway}', {port})); \
         s.sendall(bytes(i * 7 % 251 for i in range(4096)) * {}); s.close()",
        TRANSFER / 4096
    );
    guest(bench, &format!("python3 -c \"{program}\""));
    let expected: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 251) as u8).collect();
    assert!(receiver.join().unwrap() == expected.repeat(TRANSFER / 4096));
    // The data went through the kernel: the VM's process has a vhost worker.
    let pid = &bench.json(&["--json", "stat", "a"])["info"]["pid"];
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = threads.map(|thread| {
        // Threads of the ring come and go.
        fs::read_to_string(thread.unwrap().path().join("comm")).unwrap_or_default()
    });
    let names: Vec<String> = names.collect();
    assert!(
        names.iter().any(|name| name.starts_with("vhost-")),
        "{names:?}"
    );
}

fn the_balloon_takes_and_gives(bench: &Bench) {
    for (size, bytes) in [("128M", 128u64 << 20), ("0", 0)] {
        let set = bench.run(&["balloon", "a", size]);
        assert!(set.status.success(), "{set:?}");
        let limit = Instant::now() + Duration::from_secs(PATIENCE);
        loop {
            let held = bench.json(&["--json", "balloon", "a"])["actual_bytes"]
                .as_u64()
                .unwrap();
            if held == bytes {
                break;
            }
            assert!(Instant::now() < limit, "it holds {held} of {bytes}");
            thread::sleep(Duration::from_millis(500));
        }
    }
}
