//! What a guest has whose image is a container's.

use agent_proto::messages::Exec;

use crate::{Machine, shell};

#[test]
fn a_guest_has_the_name_of_its_image_and_finds_itself_by_it() {
    let machine = Machine::boot();
    assert_eq!(machine.run("uname -n"), "base\n");
    let found = machine.run("getent hosts base");
    assert!(found.starts_with("127.0.1.1 "), "{found}");
}

#[test]
fn anybody_may_listen_on_low_ports_and_ping() {
    let machine = Machine::boot();
    let net = "/proc/sys/net/ipv4";
    assert_eq!(
        machine.run(&format!("cat {net}/ip_unprivileged_port_start")),
        "0\n"
    );
    assert_eq!(
        machine.run(&format!("cat {net}/ping_group_range")),
        "0\t2147483647\n"
    );
}

#[test]
fn limits_of_open_files_are_those_of_a_service() {
    // Who may not raise its limit has the one that it was given.
    let machine = Machine::boot_with("ulimit -Sn 2048; ulimit -Hn 4096");
    let limits = machine.run("ulimit -Sn; ulimit -Hn");
    assert!(
        ["1024\n524288\n", "1024\n4096\n"].contains(&limits.as_str()),
        "{limits}"
    );
}

#[test]
fn an_unprivileged_command_opens_its_own_streams() {
    let machine = Machine::boot();
    let script = "for name in fd stdin stdout stderr; do [ -L /dev/$name ] || exit 9; done
                  echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin";
    for user in ["ada", "4321:5"] {
        let exec = Exec {
            user: user.to_owned(),
            input: true,
            ..shell(script)
        };
        let running = machine.connect().exec(exec).unwrap();
        let input = running.input();
        input.write(b"in\n").unwrap();
        input.end().unwrap();
        let Collected {
            exited,
            stdout,
            stderr,
            ..
        } = running.collect(MOST).unwrap();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        assert_eq!(
            (exited.code, stdout),
            (Some(0), b"out\nin\n".to_vec()),
            "{stderr}"
        );
        assert_eq!(stderr, "err\n");
    }
}

#[test]
fn an_unprivileged_command_opens_its_own_terminal() {
    let machine = Machine::boot();
    let exec = Exec {
        user: "ada".to_owned(),
        terminal: Some(Default::default()),
        ..shell("echo out > $(tty) && echo err > /dev/stderr && stat -c %u $(tty)")
    };
    let (exited, output, _) = machine.exec(exec);
    assert_eq!(
        (exited.code, output.as_str()),
        (Some(0), "out\r\nerr\r\n1000\r\n")
    );
}

#[test]
fn what_an_image_has_in_tmp_and_run_is_there_in_memory() {
    let machine = Machine::boot_with(
        "mkdir -p run/service tmp/cache && echo kept > run/service/state && chown -R 33:50 run/service
         chmod 2750 run/service; ln -s service/state run/link; echo kept > tmp/cache/file",
    );
    assert_eq!(machine.run("cat /run/link /tmp/cache/file"), "kept\nkept\n");
    assert_eq!(
        machine.run("stat -c '%a %u %g' /run/service"),
        "2750 33 50\n"
    );
    assert_eq!(machine.run("stat -f -c %T /run /tmp"), "tmpfs\ntmpfs\n");
    assert_eq!(machine.run("stat -c %a /run /tmp"), "755\n1777\n");
    // Not the root's own.
    assert_eq!(
        machine.run("mountpoint -q /run && mountpoint -q /tmp && echo apart"),
        "apart\n"
    );
}

#[test]
fn a_tmp_that_is_too_large_for_memory_stays_on_disk() {
    let machine = Machine::boot_with("head -c 17000000 /dev/zero > tmp/large");
    assert_eq!(machine.run("stat -c %s /tmp/large"), "17000000\n");
    assert_eq!(
        machine.run("mountpoint -q /tmp || echo on disk"),
        "on disk\n"
    );
}
