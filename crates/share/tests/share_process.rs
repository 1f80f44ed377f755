//! The process `clone-share` before it serves requests: what it reports to its launcher.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use clone_fuse::link::{self, HEADER, MAX_MESSAGE, Report, VERSION, Wait, Welcome};

/// Starts the server, which waits for its task on the socket.
fn start() -> (Child, OwnedFd) {
    let (ours, theirs) = link::pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_clone-share"))
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (child, ours)
}

/// The task to serve `directory`.
fn task(directory: &Path, spot: &Path) -> Welcome {
    let meta = fs::metadata(directory).unwrap();
    Welcome {
        version: VERSION,
        directory: directory.to_str().unwrap().to_owned(),
        identity: (meta.dev(), meta.ino()),
        read_only: false,
        guest_owner: (0, 0),
        spot: spot.to_str().unwrap().to_owned(),
        cgroup: None,
    }
}

/// The reason for which a server refuses the task `text`.
fn refusal(text: &[u8]) -> String {
    let (mut child, socket) = start();
    link::send(&socket, &[0; HEADER], text, None, Wait::Yes).unwrap();
    let mut buffer = vec![0; MAX_MESSAGE];
    let (len, _) = link::receive(&socket, &mut buffer, Wait::Yes).unwrap();
    let report = serde_json::from_slice(&buffer[HEADER..len]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    match report {
        Report::Failed { reason } => reason,
        Report::Ready { .. } => panic!("the task was accepted"),
    }
}

#[test]
fn a_server_whose_launcher_has_gone_ends_in_peace() {
    let (mut child, socket) = start();
    drop(socket);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_task_that_cannot_be_read_or_is_of_another_version_is_refused() {
    let unreadable = refusal(b"{}");
    assert!(unreadable.contains("cannot read its task"), "{unreadable}");
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let other = Welcome {
        version: VERSION + 1,
        ..task(dirs[0].path(), dirs[1].path())
    };
    let refused = refusal(&serde_json::to_vec(&other).unwrap());
    assert!(refused.contains("another version"), "{refused}");
}

#[test]
fn a_directory_that_became_another_one_meanwhile_is_refused() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut other = task(dirs[0].path(), dirs[1].path());
    other.identity.1 += 1;
    let refused = refusal(&serde_json::to_vec(&other).unwrap());
    assert!(refused.contains("was replaced meanwhile"), "{refused}");
}
