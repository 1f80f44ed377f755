//! Commands, shells and files in a real guest, through the command alone.
#![allow(clippy::unwrap_used)]

#[path = "guest_bench/mod.rs"]
mod guest_bench;
#[path = "guest_bench/terminal.rs"]
mod terminal;

use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};

use guest_bench::Bench;
use terminal::Terminal;

/// A VM called `a` whose agent answers.
fn with_agent() -> Bench {
    let bench = Bench::new();
    let started = bench.boot("a", &["--detach"]);
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("a");
    bench
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

#[test]
fn exec_gives_the_commands_output_and_its_own_exit_code() {
    let bench = with_agent();
    let exec = |command: &[&str]| bench.run(&[&["exec", "a"], command].concat());
    let both = exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (code(&both), &both.stdout[..], &both.stderr[..]),
        (7, &b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(code(&exec(&["no-such-command"])), 127);
    assert_eq!(code(&exec(&["/etc"])), 126);
    assert_eq!(code(&exec(&["sh", "-c", "kill -9 $$"])), 137);
    let late = bench.run(&["exec", "--timeout", "1", "a", "sleep", "60"]);
    assert_eq!(code(&late), 124);
    let here = bench.run(&[
        "exec",
        "-e",
        "A=b",
        "-w",
        "/proc",
        "a",
        "sh",
        "-c",
        "echo $A; pwd",
    ]);
    assert_eq!(here.stdout, b"b\n/proc\n");

    // What the image says is for those who say nothing.
    bench.guest(
        "a",
        r#"mkdir -p /etc/clone; echo 'ada:x:1000:1000::/:/bin/sh' >> /etc/passwd
           echo '{"env": ["A=image"], "working_dir": "/sys", "user": "ada",
                  "cmd": ["sh", "-c", "echo $A $(pwd) $(id -u)"]}' > /etc/clone/image.json"#,
    );
    assert_eq!(exec(&[]).stdout, b"image /sys 1000\n");
    let said = bench.run(&[
        "exec",
        "-u",
        "0",
        "-e",
        "A=b",
        "-w",
        "/",
        "a",
        "sh",
        "-c",
        "echo $A; pwd; id -u",
    ]);
    assert_eq!(said.stdout, b"b\n/\n0\n");
}

#[test]
fn exec_passes_input_and_much_output_unharmed() {
    let bench = with_agent();
    let mut child = bench.command(&["exec", "-i", "a", "cat"]);
    let mut child = child
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n >> 3) as u8).collect();
    let mut input = child.stdin.take().unwrap();
    let (text, writer) = (sent.clone(), std::thread::spawn);
    let writer = writer(move || input.write_all(&text).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(
        output.stdout == sent,
        "{} bytes of {}",
        output.stdout.len(),
        sent.len()
    );
}

#[test]
fn a_shell_has_a_terminal_and_ends_with_its_code() {
    let bench = with_agent();
    let program = env!("CARGO_BIN_EXE_clone");
    // `script` gives the command a terminal of its own, as a person would have.
    let mut person = bench.other(
        "script",
        &["-qec", &format!("{program} shell a"), "/dev/null"],
    );
    let mut person = person
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keys = person.stdin.take().unwrap();
    keys.write_all(b"test -t 0 && echo is-a-$((40+2))-terminal\nexit 5\n")
        .unwrap();
    let output = person.wait_with_output().unwrap();
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(seen.contains("is-a-42-terminal"), "{seen}");
    assert_eq!(code(&output), 5, "{seen}");
}

#[test]
fn vi_and_top_draw_on_the_whole_window_of_a_shell_and_obey_its_keys() {
    let bench = with_agent();
    let mut person = Terminal::start(bench.command(&["shell", "a"]), 33, 101);
    person.keys("stty size\r");
    person.see("\n33 101");
    person.keys("vi /tmp/note\r");
    // vi puts its status line on the window's last row.
    person.see("\x1b[33;1H");
    person.resize(41, 90);
    person.see("\x1b[41;1H");
    person.keys("iwritten by hand");
    person.see("hand");
    // Out of insertion, as the status line tells: keys in one burst with an escape are lost.
    person.keys("\x1b");
    person.see("- /tmp/note");
    person.keys(":wq\r");
    person.see("# ");
    let note = bench.run(&["exec", "a", "cat", "/tmp/note"]);
    assert_eq!(note.stdout, b"written by hand\n", "{note:?}");
    person.keys("top\r");
    person.see("\x1b[H");
    person.see("COMMAND");
    person.see("clone-agent");
    person.keys("q");
    person.see("# ");
    person.keys("exit 5\r");
    assert_eq!(person.end().code(), Some(5));
}

#[test]
fn files_go_into_the_guest_and_come_back_with_their_permissions() {
    let bench = with_agent();
    let (there, back) = (bench.path("there"), bench.path("back"));
    fs::write(&there, [0xA5; 300_001]).unwrap();
    let copy = |from: &str, to: &str| bench.run(&["cp", from, to]);
    assert!(copy(&there, "a:/tmp/").status.success());
    assert!(copy("a:/tmp/there", &back).status.success());
    assert_eq!(fs::read(&back).unwrap(), fs::read(&there).unwrap());
    let gone = copy("a:/no/such", &back);
    assert_eq!(code(&gone), 3, "{gone:?}");
    // A copy that fails leaves what was there.
    assert_eq!(fs::read(&back).unwrap().len(), 300_001);
}

#[test]
fn stop_asks_the_guest_and_nothing_is_left() {
    let bench = with_agent();
    let stopped = bench.run(&["stop", "--timeout", "60", "a"]);
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}
