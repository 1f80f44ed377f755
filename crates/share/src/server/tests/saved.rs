//! Tables that another server takes over: of a fork, of a resumed VM, and hostile ones.

use proptest::prelude::*;

use super::*;

/// The tables of `guest` in a new server of `path`.
fn taken_over(guest: &mut Guest, path: &Path) -> Server {
    let saved = guest.control(Kind::Save, b"").unwrap().unwrap().content;
    let mut other = server(path);
    let half = saved.len() / 2;
    let part = |kind, content| Request {
        tag: 0,
        kind,
        content,
    };
    assert!(other.request(part(Kind::Restore, &saved[..half])).is_none());
    other
        .request(part(Kind::RestoreEnd, &saved[half..]))
        .unwrap()
        .unwrap();
    other
}

#[test]
fn open_files_go_on_where_they_still_are_and_are_stale_where_not() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.path("d/e")).unwrap();
    let mut open = Vec::new();
    let d = guest.lookup(ROOT_ID, "d").unwrap();
    let e = guest.lookup(d, "e").unwrap();
    for name in ["kept", "replaced", "removed"] {
        guest.put(&format!("d/e/{name}"), name);
        let node = guest.lookup(e, name).unwrap();
        open.push(guest.open(node, libc::O_RDONLY).unwrap().0);
    }
    let directory = guest.open_directory(e).unwrap();
    fs::rename(guest.path("d/e/replaced"), guest.path("elsewhere")).unwrap();
    guest.put("d/e/replaced", "another");
    fs::remove_file(guest.path("d/e/removed")).unwrap();
    let path = guest.dir.path().to_owned();
    guest.server = taken_over(&mut guest, &path);
    let mut descriptor = |handle: u64| {
        guest
            .control(Kind::Descriptor, &handle.to_le_bytes())
            .unwrap()
    };
    let kept = descriptor(open[0]).unwrap().file.unwrap();
    assert_eq!(content(&kept), "kept");
    assert_eq!(refused(descriptor(open[1])), Errno::STALE);
    assert_eq!(refused(descriptor(open[2])), Errno::STALE);
    let body = [
        directory.to_le_bytes(),
        [0; 8],
        [0, 16, 0, 0, 0, 0, 0, 0],
        [0; 8],
        [0; 8],
    ];
    let listed = guest.ask(op::READDIR, e, &body.concat()).unwrap();
    assert!(!listed.content.is_empty());
    // A number is never given twice.
    let (node, handle, _) = guest.create(ROOT_ID, "new", libc::O_RDWR).unwrap();
    assert!(node > e + 3 && handle > directory);
    assert_eq!(guest.lookup(d, "e").unwrap(), e);
}

#[test]
fn a_fork_with_another_directory_sees_nothing_of_the_first() {
    let mut guest = Guest::new();
    guest.put("a", "of the first");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDONLY).unwrap();
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("a"), "of the second").unwrap();
    let server = taken_over(&mut guest, other.path());
    let mut fork = Guest { dir: other, server };
    let descriptor = fork.control(Kind::Descriptor, &handle.to_le_bytes());
    assert_eq!(refused(descriptor.unwrap()), Errno::STALE);
    let second = fork.lookup(ROOT_ID, "a").unwrap();
    assert_ne!(second, node);
    let (_, file) = fork.open(second, libc::O_RDONLY).unwrap();
    assert_eq!(content(&file), "of the second");
}

#[test]
fn version_1_keeps_its_bytes() {
    let mut guest = Guest::new();
    let saved = guest.control(Kind::Save, b"").unwrap().unwrap().content;
    let hex: String = saved.iter().map(|byte| format!("{byte:02x}")).collect();
    // No handle, and the numbers that come next.
    assert_eq!(hex, "0002000000");
    // A directory `d` with number 2, looked up once, with an open handle 0.
    let bytes = b"\0\x03\x01\x01\x02\x01\x01d\x08\x01\x0c\x01\x02\x03\x80\x80\x01\x01\x01\0\x02\x80\x80\x04";
    guest.control(Kind::RestoreEnd, bytes).unwrap().unwrap();
    assert_eq!(
        guest.control(Kind::Save, b"").unwrap().unwrap().content,
        bytes
    );
}

#[test]
fn tables_that_were_made_by_hand_are_refused() {
    let mut guest = Guest::new();
    // A name that leads out, the root's number, flags that no server sets, and bytes after the end.
    let bad: [&[u8]; 5] = [
        b"\0\x03\0\x01\x02\x01\x02..\x08\x01\x0c\x01\x02\x03\x80\x80\x01\x01\0",
        b"\0\x03\0\x01\x01\x01\x01d\x08\x01\x0c\x01\x02\x03\x80\x80\x01\x01\0",
        b"\0\x03\x01\0\x01\0\x02\x40",
        b"\0\x02\0\0\0\0",
        b"\x01",
    ];
    for bytes in bad {
        let refusal = guest.control(Kind::RestoreEnd, bytes).unwrap();
        assert_eq!(refused(refusal), Errno::INVAL, "{bytes:?}");
    }
    guest.put("a", "");
    guest.lookup(ROOT_ID, "a").unwrap();
}

#[test]
fn more_files_than_fit_are_left_out_and_open_ones_are_kept() {
    let mut guest = Guest::new();
    let long = "x".repeat(200);
    let mut last = (0, 0);
    for number in 0..30_000 {
        let name = format!("{long}{number}");
        guest.put(&name, "content");
        let node = guest.lookup(ROOT_ID, &name).unwrap();
        if number == 29_999 {
            last = (node, guest.open(node, libc::O_RDONLY).unwrap().0);
        }
    }
    let path = guest.dir.path().to_owned();
    guest.server = taken_over(&mut guest, &path);
    assert_eq!(guest.server.node_count(), 2);
    let descriptor = guest.control(Kind::Descriptor, &last.1.to_le_bytes());
    assert!(descriptor.unwrap().unwrap().file.is_some());
    guest.ask(op::GETATTR, last.0, &[0; 16]).unwrap();
    assert!(guest.lookup(ROOT_ID, &format!("{long}0")).is_ok());
}

proptest! {
    #[test]
    fn no_tables_make_the_server_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut guest = Guest::new();
        let _ = guest.control(Kind::RestoreEnd, &bytes);
        let _ = guest.lookup(ROOT_ID, "a");
    }
}
