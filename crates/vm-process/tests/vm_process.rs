//! The process of a VM, `clone-vm`, before it has a guest.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use clone_api::jail::{JailLayer, RequiredJail};
use clone_start::{cgroup, invocation, report};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;

const PATIENCE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// Starts the process, which waits for its description on the socket.
fn start() -> (Child, UnixStream) {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_clone-vm"))
        .args(invocation::words(dir.path()))
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (child, ours)
}

/// Makes a descriptor one that children inherit, as a careless library would.
fn make_inheritable(fd: &OwnedFd) {
    rustix::io::fcntl_setfd(fd, FdFlags::empty()).unwrap();
}

#[test]
fn a_vms_process_closes_what_its_caller_left_open() {
    // The end of the pipe shows when the process has closed its copy of the other side.
    let (read, write) = rustix::pipe::pipe().unwrap();
    let far = rustix::io::fcntl_dupfd_cloexec(&write, 900).unwrap();
    make_inheritable(&write);
    make_inheritable(&far);
    let (mut child, socket) = start();
    drop((write, far));
    let mut polled = [PollFd::new(&read, PollFlags::IN)];
    let closed = poll(&mut polled, Some(&PATIENCE)).unwrap();
    let mut open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", child.id()))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    open.sort();
    drop(socket);
    let status = child.wait().unwrap();
    assert_eq!(closed, 1, "the process keeps what it inherited: {open:?}");
    assert_eq!(open, ["0", "1", "2"]);
    assert_eq!(status.code(), Some(invocation::EXIT_START_FAILED.into()));
}

#[test]
fn a_description_with_another_number_of_taps_than_came_is_refused() {
    let (mut child, socket) = start();
    let text = br#"{"config":{"name":"web","kernel":"/k"},"origin":{"Boot":{"kernel":"/k"}},
        "nets":[{"queues":1,"mac":"02:00:00:00:00:01","mtu":null,"kernel_argument":null}],
        "required_jail":[]}"#;
    clone_api::descriptors::send(&socket, text, &[]).unwrap();
    drop(socket);
    let report = report::read(child.stdout.take().unwrap()).unwrap().unwrap();
    let message = report.unwrap_err().message;
    assert!(
        message.contains("1 queues of taps and 0 shares, and 0 came"),
        "{message}"
    );
    child.wait().unwrap();
}

#[test]
fn a_host_tells_which_layers_its_jails_lack() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_clone-vm"))
        .args(invocation::check_words(dir.path()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let report = report::read(child.stdout.take().unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    cgroup::remove(dir.path()).unwrap();
    let jail = report.unwrap().unwrap();
    let lacks = |layer| jail.missing.iter().any(|missing| missing.layer == layer);
    let has_controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .is_ok_and(|text| text.contains("memory") && text.contains("pids"));
    let is_root = rustix::process::geteuid().is_root();
    assert_eq!(
        lacks(JailLayer::Cgroup),
        !(is_root && has_controllers),
        "{jail:?}"
    );
    assert_eq!(lacks(JailLayer::UserId), !is_root, "{jail:?}");
    assert_eq!(
        RequiredJail::complete().check(&jail).is_ok(),
        jail.missing.is_empty()
    );
}
