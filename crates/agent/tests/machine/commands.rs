//! Commands: who they run as, how they end, and what becomes of them when their caller is gone.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::client::{ClientError, Collected, Event};
use agent_proto::messages::{Acknowledge, ErrorCode, Exec, Put, TerminalSize};

use crate::{MOST, Machine, refusal, shell, words};

fn terminal(script: &str) -> Exec {
    Exec {
        terminal: Some(TerminalSize {
            rows: 24,
            columns: 80,
        }),
        input: true,
        ..shell(script)
    }
}

fn as_user(user: &str, script: &str) -> Exec {
    Exec {
        user: user.to_owned(),
        ..shell(script)
    }
}

#[test]
fn who_a_command_runs_as_is_who_was_asked_for() {
    let machine = Machine::boot_with(
        "printf 'all:x:4294967295:0::/:\\nminus:x:-1:0::/:\\ngroup:x:70:-1::/:\\n' >> etc/passwd
         printf 'all:x:4294967295:web\\n' >> etc/group",
    );
    let id = |user| machine.exec(as_user(user, "id -u; id -G")).1;
    assert_eq!(id("ada"), "1000\n1000 50\n");
    assert_eq!(
        id("ada:web-less".split(':').next().unwrap()),
        "1000\n1000 50\n"
    );
    assert_eq!(id("ada:50"), "1000\n50\n");
    assert_eq!(id("4321"), "4321\n0\n");
    for user in [
        "4294967295",
        "-1",
        "4294967296",
        "ada:4294967295",
        "ada:-1",
        "all",
        "minus",
        "group",
        "web",
        "ada:all",
    ] {
        let refused = machine.connect().exec(as_user(user, "id"));
        assert_eq!(refusal(refused).0, ErrorCode::Invalid, "{user}");
        let put = Put {
            path: "/file".to_owned(),
            user: user.to_owned(),
            ..Put::default()
        };
        let refused = machine.connect().put(put, &mut &b"x"[..]);
        assert_eq!(refusal(refused).0, ErrorCode::Invalid, "{user}");
    }
}

#[test]
fn a_command_ends_soon_after_its_process_whatever_its_children_do() {
    let machine = Machine::boot();
    for child in [
        "while :; do echo x; sleep .1; done",
        "while :; do echo x; done",
        "sleep 100",
    ] {
        let start = Instant::now();
        let (exited, stdout, _) = machine.exec(shell(&format!("({child})& echo own; exit 7")));
        assert_eq!(exited.code, Some(7), "{child}");
        assert!(stdout.lines().any(|line| line == "own"), "{child}");
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "{child} held it up"
        );
    }
}

#[test]
fn what_a_command_itself_wrote_comes_whole_and_its_children_run_on() {
    let machine = Machine::boot();
    let script = "(while [ ! -e /stop ]; do echo noise >&2; sleep .01; done; echo alive > /alive)&
                  head -c 3000000 /dev/zero; exit 7";
    let mut running = machine.connect().exec(shell(script)).unwrap();
    // The command has to wait for its reader, and ends while much is on its way.
    thread::sleep(Duration::from_millis(1500));
    let mut bytes = 0;
    let exited = loop {
        match running.next_event().unwrap() {
            Event::Output(agent_proto::messages::Stream::Stdout, data) => {
                bytes += data.len();
                thread::sleep(Duration::from_millis(20));
            }
            Event::Exited(exited) => break exited,
            _ => {}
        }
    };
    assert_eq!((exited.code, bytes), (Some(7), 3_000_000));
    // Its child writes to nobody, and is not ended by that.
    thread::sleep(Duration::from_millis(100));
    machine.run("touch /stop; until [ -e /alive ]; do sleep .05; done");
}

/// Waits until a file is there.
fn wait_for_file(machine: &Machine, path: &str) {
    let script = format!(
        "n=0; until [ -s {path} ]; do n=$((n+1)); [ $n -lt 100 ] || exit 1; sleep .05; done"
    );
    machine.run(&script);
}

#[test]
fn a_terminal_is_hung_up_when_its_client_is_gone() {
    let machine = Machine::boot();
    // The foreground job of an interactive shell, and the shell.
    let script = "trap 'echo shell >> /hup; exit' HUP
                  sh -c 'trap \"echo job >> /hup; exit\" HUP; echo ready; while :; do sleep .05; done'
                  while :; do sleep .05; done";
    let mut running = machine.connect().exec(terminal(script)).unwrap();
    let Event::Output(_, data) = running.next_event().unwrap() else {
        panic!("no output")
    };
    assert_eq!(data, b"ready\r\n");
    assert_eq!(machine.connect().info().unwrap().commands, 1);
    drop(running);
    wait_for_file(&machine, "/hup");
    let gone = "n=0; until [ $(wc -l < /hup) = 2 ]; do n=$((n+1)); [ $n -lt 100 ] || exit 1; sleep .05; done";
    machine.run(gone);
    let deadline = Instant::now() + crate::LIMIT;
    while machine.connect().info().unwrap().commands > 0 {
        assert!(Instant::now() < deadline, "the terminal's command goes on");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn who_ignores_the_hang_up_finds_the_terminal_gone() {
    let machine = Machine::boot();
    let script = "trap '' HUP; echo ready; cat; echo $? > /read; echo x || echo lost > /written";
    let mut running = machine.connect().exec(terminal(script)).unwrap();
    running.next_event().unwrap();
    drop(running);
    wait_for_file(&machine, "/read");
    wait_for_file(&machine, "/written");
}

#[test]
fn a_detached_terminal_and_a_plain_command_go_on_alone() {
    let machine = Machine::boot();
    for (index, exec) in [
        Exec {
            detached: true,
            ..terminal("echo ready; sleep .5; echo on > /on0")
        },
        shell("echo ready; sleep .5; echo on > /on1"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut running = machine.connect().exec(exec).unwrap();
        running.next_event().unwrap();
        drop(running);
        wait_for_file(&machine, &format!("/on{index}"));
    }
}

#[test]
fn a_signal_reaches_a_command_whoever_is_attached_and_whatever_the_image_has() {
    // No shell, and a user who may signal nobody.
    let image = r#"mkdir etc/clone; echo '{"user": "ada"}' > etc/clone/image.json"#;
    let machine = Machine::boot_with(image);
    let exec = Exec {
        command: words(&["/usr/bin/sleep", "1000"]),
        user: "root".to_owned(),
        detached: true,
        ..Exec::default()
    };
    let running = machine.connect().exec(exec).unwrap();
    let id = running.started().id;
    machine.connect().signal_command(id, libc::SIGTERM).unwrap();
    let Collected { exited, .. } = running.collect(MOST).unwrap();
    assert_eq!(exited.signal, Some(libc::SIGTERM));
    for (id, signal, code) in [
        (id, 15, ErrorCode::NotFound),
        (id + 1, 15, ErrorCode::NotFound),
        (id, 0, ErrorCode::Invalid),
        (id, 65, ErrorCode::Invalid),
        (id, -9, ErrorCode::Invalid),
    ] {
        let refused = machine.connect().signal_command(id, signal);
        assert_eq!(refusal(refused).0, code, "{id} {signal}");
    }
}

#[test]
fn a_command_that_is_signalled_while_it_is_read_is_read_on() {
    let machine = Machine::boot();
    let script = "trap 'echo usr1; exit 3' USR1; echo ready; while :; do sleep .02; done";
    let mut running = machine.connect().exec(shell(script)).unwrap();
    let id = running.started().id;
    running.next_event().unwrap();
    machine.connect().signal_command(id, libc::SIGUSR1).unwrap();
    let Collected { exited, stdout, .. } = running.collect(MOST).unwrap();
    assert_eq!((exited.code, stdout), (Some(3), b"usr1\n".to_vec()));
}

#[test]
fn arguments_are_as_long_as_linux_takes_them_or_said_to_be_too_long() {
    let machine = Machine::boot();
    let exec = |count: usize| {
        let mut command = words(&["/usr/bin/printf", "%.1s"]);
        command.extend((0..count).map(|_| "y".repeat(100_000)));
        Exec {
            command,
            ..Exec::default()
        }
    };
    let (exited, stdout, _) = machine.exec(exec(19));
    assert_eq!((exited.code, stdout.len()), (Some(0), 19));
    for count in [25, 70] {
        let (code, message) = refusal(machine.connect().exec(exec(count)));
        assert_eq!(code, ErrorCode::Invalid);
        assert!(message.contains("too long"), "{message}");
    }
    let refused = machine.connect().exec(exec(100)).map(drop);
    assert!(
        matches!(refused, Err(ClientError::TooLong { .. })),
        "{refused:?}"
    );
    // Lists of commands stay small. One that has ended may be forgotten already.
    let mut command = words(&["/bin/sh", "-c", "sleep 20"]);
    command.extend(exec(18).command);
    let long = Exec {
        command,
        ..Exec::default()
    };
    let _running = machine.connect().exec(long).unwrap();
    let known = machine.connect().commands().unwrap();
    assert!(known[0].command.concat().len() <= 4096);
}

#[test]
fn a_login_shell_is_one_that_runs() {
    let machine = Machine::boot();
    for user in ["web", "ada", "4321", "root"] {
        let exec = Exec {
            login_shell: true,
            command: words(&["/bin/false"]),
            input: true,
            ..as_user(user, "")
        };
        let running = machine.connect().exec(exec).unwrap();
        let input = running.input();
        input.write(b"echo $0 $SHELL\n").unwrap();
        input.end().unwrap();
        let Collected { exited, stdout, .. } = running.collect(MOST).unwrap();
        let stdout = String::from_utf8(stdout).unwrap();
        assert_eq!(exited.code, Some(0), "{user}");
        assert!(
            ["-sh /bin/sh\n", "-bash /bin/bash\n"].contains(&stdout.as_str()),
            "{user}: {stdout}"
        );
        // What an older host sends.
        let older = machine.exec(as_user(user, "exec $SHELL -c 'echo in'"));
        assert_eq!(older.1, "in\n", "{user}");
    }
}

#[test]
fn an_image_without_the_usual_shells_has_another_or_says_so() {
    let bare = "umount usr; mkdir usr/lib usr/lib64; mount --bind /usr/lib usr/lib; mount --bind /usr/lib64 usr/lib64";
    let shell = |machine: &Machine| {
        let exec = Exec {
            login_shell: true,
            ..Exec::default()
        };
        machine
            .connect()
            .exec(exec)
            .map(|running| running.collect(MOST).unwrap().exited.code)
    };
    let machine = Machine::boot_with(&format!("mkdir busybox; cp /bin/dash busybox/sh; {bare}"));
    assert_eq!(shell(&machine).unwrap(), Some(0));
    let machine = Machine::boot_with(bare);
    let (code, message) = refusal(shell(&machine));
    assert_eq!(
        (code, message.as_str()),
        (ErrorCode::NotFound, "the guest has no shell")
    );
}

#[test]
fn a_file_lands_where_cp_would_put_it() {
    let machine =
        Machine::boot_with("mkdir dir; echo old > file; ln -s file link; ln -s dir/new dangling");
    let put = |path: &str, name: &str| {
        let put = Put {
            path: path.to_owned(),
            mode: 0o644,
            name: name.to_owned(),
            ..Put::default()
        };
        machine.connect().put(put, &mut &b"new"[..])
    };
    for (path, lands) in [
        ("/dir", "/dir/own"),
        ("/dir/", "/dir/own"),
        ("/link", "/file"),
        ("/dangling", "/dir/new"),
        ("/plain", "/plain"),
    ] {
        put(path, "own").unwrap();
        assert_eq!(machine.read(lands), "new", "{path}");
    }
    assert!(
        fs::symlink_metadata(machine.path("link"))
            .unwrap()
            .is_symlink()
    );
    // Without a name, or with one that is a path, a directory is refused, and a device always.
    machine.run("mkfifo /pipe");
    for (path, name) in [
        ("/dir", ""),
        ("/dir", "../x"),
        ("/dir", "."),
        ("/pipe", "own"),
        ("/dev/null", "own"),
    ] {
        assert_eq!(
            refusal(put(path, name)).0,
            ErrorCode::Invalid,
            "{path} {name}"
        );
    }
    machine.run("[ -p /pipe ] && [ -c /dev/null ]");
}

#[test]
fn a_detached_command_counts_as_running_until_it_ends() {
    let machine = Machine::boot();
    let exec = Exec {
        detached: true,
        ..shell("sleep .4")
    };
    let running = machine.connect().exec(exec).unwrap();
    let id = running.started().id;
    drop(running);
    assert_eq!(machine.connect().info().unwrap().commands, 1);
    let running = machine
        .connect()
        .attach(id, Acknowledge::default())
        .unwrap();
    running.collect(MOST).unwrap();
    assert_eq!(machine.connect().info().unwrap().commands, 0);
}
