//! Process 1: reaping, and the end of the machine, which the kernel tells by the signal that
//! process 1 ends with in a process namespace of its own (reboot(2)).

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use agent_proto::messages::Exec;

use crate::{LIMIT, Machine, words};

#[test]
fn orphans_are_reaped_and_the_machine_is_furnished() {
    let machine = Machine::boot();
    assert_eq!(
        machine.run("readlink /proc/1/exe"),
        machine.run("readlink /proc/$PPID/exe")
    );
    machine.run("(sh -c 'exit 3' & exec sleep 0.2) & exit 0");
    let deadline = Instant::now() + LIMIT;
    while !machine
        .run("grep -l '^State:.Z' /proc/[0-9]*/status || true")
        .is_empty()
    {
        assert!(Instant::now() < deadline, "a zombie stays");
    }
    let mounts = machine.run("cut -d ' ' -f 2,3 /proc/self/mounts");
    for mount in ["/proc proc", "/sys sysfs", "/run tmpfs", "/tmp tmpfs"] {
        assert!(
            mounts.lines().any(|line| line == mount),
            "no {mount} in {mounts}"
        );
    }
}

#[test]
fn a_shutdown_ends_the_processes_and_powers_off() {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    fs::write(&said, "").unwrap();
    let mut machine = Machine::boot_with(&format!(
        "touch said && mount --bind {} said",
        said.display()
    ));
    machine.run(
        "(trap 'echo bye > /said; exit' TERM; sleep 1000 & : > /ready; wait) &
         until [ -e /ready ]; do sleep 0.05; done",
    );
    machine.connect().shutdown(false).unwrap();
    // LINUX_REBOOT_CMD_POWER_OFF shows as SIGINT; unshare passes it on as its own end.
    assert_eq!(ended_by(machine.end()), 2);
    assert_eq!(fs::read_to_string(said).unwrap(), "bye\n");
}

#[test]
fn a_reboot_is_told_from_a_power_off() {
    let mut machine = Machine::boot();
    machine.connect().shutdown(true).unwrap();
    // LINUX_REBOOT_CMD_RESTART shows as SIGHUP.
    assert_eq!(ended_by(machine.end()), 1);
}

#[test]
fn sigterm_powers_off() {
    let mut machine = Machine::boot();
    let exec = Exec {
        command: words(&["/bin/sh", "-c", "kill -TERM 1"]),
        ..Exec::default()
    };
    // The connection may end before the answer.
    let _ = machine.connect().exec(exec);
    assert_eq!(ended_by(machine.end()), 2);
}

fn ended_by(status: ExitStatus) -> i32 {
    status
        .signal()
        .or(status.code().map(|code| code - 128))
        .unwrap()
}
