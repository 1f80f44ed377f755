//! What a guest must not get by with, and outsiders who move things meanwhile.

use proptest::prelude::*;
use std::os::unix::fs::symlink;

use super::*;
use crate::handles::MAX_HANDLES;

/// Every request with a name, with the bytes before the name.
fn named_requests() -> Vec<(u32, usize)> {
    vec![
        (op::LOOKUP, 0),
        (op::MKDIR, 8),
        (op::MKNOD, 16),
        (op::UNLINK, 0),
        (op::RMDIR, 0),
        (op::RENAME, 8),
        (op::RENAME2, 16),
        (op::LINK, 8),
        (op::CREATE, 16),
        (op::SYMLINK, 0),
    ]
}

#[test]
fn no_name_leads_out_of_its_directory() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("d")).unwrap();
    guest.put("outside", "secret");
    let inside = guest.lookup(ROOT_ID, "d").unwrap();
    let long = vec![b'x'; 64 << 10];
    let bad: [&[u8]; 8] = [
        b"",
        b".",
        b"..",
        b"../outside",
        b"/etc/passwd",
        b"a/b",
        b"..//",
        &long,
    ];
    let before = fs::read_dir(guest.dir.path()).unwrap().count();
    for (opcode, skipped) in named_requests() {
        for name in bad {
            let mut body = vec![0; skipped];
            if matches!(opcode, op::LINK | op::RENAME | op::RENAME2) {
                body[0] = 1;
            }
            body.extend_from_slice(&text(name));
            body.extend_from_slice(b"new\0");
            let refusal = refused(guest.ask(opcode, inside, &body));
            let expected = [Errno::INVAL, Errno::NAMETOOLONG];
            assert!(expected.contains(&refusal), "{opcode} {refusal}");
            // A name that has no end.
            let mut body = vec![0; skipped];
            body.extend_from_slice(b"endless");
            assert_eq!(refused(guest.ask(opcode, inside, &body)), Errno::INVAL);
        }
    }
    assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), before);
}

#[test]
fn links_are_not_followed_by_the_server() {
    let mut guest = Guest::new();
    symlink("/etc", guest.path("etc")).unwrap();
    symlink("/etc/passwd", guest.path("passwd")).unwrap();
    let etc = guest.lookup(ROOT_ID, "etc").unwrap();
    assert_eq!(refused(guest.lookup(etc, "passwd")), Errno::NOTDIR);
    assert_eq!(refused(guest.open_directory(etc)), Errno::NOTDIR);
    let passwd = guest.lookup(ROOT_ID, "passwd").unwrap();
    assert_eq!(
        refused(guest.open(passwd, libc::O_RDONLY)),
        Errno::OPNOTSUPP
    );
    let created = guest.create(ROOT_ID, "passwd", libc::O_RDWR);
    assert_eq!(refused(created), Errno::LOOP);
}

#[test]
fn numbers_that_were_never_given_are_refused() {
    let mut guest = Guest::new();
    for node in [0, 2, 77, u64::MAX] {
        assert_eq!(refused(guest.lookup(node, "a")), Errno::STALE);
        assert_eq!(refused(guest.open(node, 0)), Errno::STALE);
        assert_eq!(
            refused(guest.ask(op::GETATTR, node, &[0; 16])),
            Errno::STALE
        );
        guest.control(Kind::Guest, &message(op::FORGET, node, &[1; 8]));
    }
    for handle in [0, 1, u64::MAX] {
        let body = [handle.to_le_bytes(), [0; 8], [255; 8], [0; 8], [0; 8]].concat();
        for opcode in [op::READDIR, op::READDIRPLUS, op::RELEASE, op::FSYNCDIR] {
            assert_eq!(refused(guest.ask(opcode, ROOT_ID, &body)), Errno::BADF);
        }
        let descriptor = guest.control(Kind::Descriptor, &handle.to_le_bytes());
        assert_eq!(refused(descriptor.unwrap()), Errno::BADF);
    }
    let directory = guest.open_directory(ROOT_ID).unwrap();
    let descriptor = guest.control(Kind::Descriptor, &directory.to_le_bytes());
    assert_eq!(refused(descriptor.unwrap()), Errno::ISDIR);
}

#[test]
fn forgetting_too_much_takes_nothing_from_the_root_or_from_open_files() {
    let mut guest = Guest::new();
    guest.put("a", "content");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDONLY).unwrap();
    let all = [node.to_le_bytes(), u64::MAX.to_le_bytes()].concat();
    let root = [ROOT_ID.to_le_bytes(), u64::MAX.to_le_bytes()].concat();
    let storm = [
        &u64::MAX.to_le_bytes()[..],
        &all,
        &root,
        &all,
        &root,
        b"cut",
    ]
    .concat();
    assert!(
        guest
            .control(Kind::Guest, &message(op::BATCH_FORGET, 0, &storm))
            .is_none()
    );
    assert_eq!(guest.server.node_count(), 2);
    let descriptor = guest.control(Kind::Descriptor, &handle.to_le_bytes());
    assert!(descriptor.unwrap().is_ok());
    guest.ask(op::RELEASE, node, &handle.to_le_bytes()).unwrap();
    assert_eq!(guest.server.node_count(), 1);
    guest.lookup(ROOT_ID, "a").unwrap();
}

#[test]
fn tables_have_an_end() {
    let mut guest = Guest::new();
    guest.put("a", "");
    guest.server.nodes.limit(8);
    for number in 0..20 {
        fs::create_dir(guest.path(&format!("d{number}"))).unwrap();
        let found = guest.lookup(ROOT_ID, &format!("d{number}"));
        assert_eq!(found.is_ok(), number < 7, "{number}");
    }
    assert_eq!(refused(guest.lookup(ROOT_ID, "a")), Errno::NFILE);
    for _ in 0..MAX_HANDLES {
        if guest.open_directory(ROOT_ID).is_err() {
            break;
        }
    }
    let refusal = refused(guest.open_directory(ROOT_ID));
    assert!([Errno::NFILE, Errno::MFILE].contains(&refusal), "{refusal}");
}

#[test]
fn another_file_under_the_same_name_is_not_taken_for_the_one_that_was_there() {
    let mut guest = Guest::new();
    guest.put("a", "first");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    fs::rename(guest.path("a"), guest.path("kept")).unwrap();
    guest.put("a", "second");
    assert_eq!(refused(guest.open(node, libc::O_RDONLY)), Errno::STALE);
    let second = guest.lookup(ROOT_ID, "a").unwrap();
    assert_ne!(second, node);
    // Found again where it is now.
    assert_eq!(guest.lookup(ROOT_ID, "kept").unwrap(), node);
    let (_, file) = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(content(&file), "first");
}

#[test]
fn directories_that_others_move_in_circles_end_in_an_error() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.path("a/b")).unwrap();
    let a = guest.lookup(ROOT_ID, "a").unwrap();
    let b = guest.lookup(a, "b").unwrap();
    fs::rename(guest.path("a/b"), guest.path("b")).unwrap();
    fs::rename(guest.path("a"), guest.path("b/a")).unwrap();
    assert_eq!(guest.lookup(b, "a").unwrap(), a);
    let saved = guest.control(Kind::Save, b"").unwrap().unwrap().content;
    guest.control(Kind::RestoreEnd, &saved).unwrap().unwrap();
    assert_eq!(refused(guest.lookup(a, "x")), Errno::STALE);
    guest.control(Kind::Guest, &message(op::FORGET, a, &9_u64.to_le_bytes()));
    assert_eq!(guest.lookup(ROOT_ID, "b").unwrap(), b);
}

#[test]
fn a_pipe_that_takes_the_place_of_a_file_stops_nobody() {
    let mut guest = Guest::new();
    guest.put("a", "");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    fs::remove_file(guest.path("a")).unwrap();
    rustix::fs::mknodat(
        CWD,
        guest.path("a"),
        rustix::fs::FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .unwrap();
    assert_eq!(refused(guest.open(node, libc::O_RDONLY)), Errno::STALE);
    let created = guest.create(ROOT_ID, "a", libc::O_RDWR);
    assert_eq!(refused(created), Errno::OPNOTSUPP);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_request_makes_the_server_panic(
        requests in prop::collection::vec(
            (0_u32..60, 0_u64..4, prop::collection::vec(any::<u8>(), 0..120)),
            1..20,
        ),
    ) {
        let mut guest = Guest::new();
        guest.put("a", "content");
        for (opcode, node, body) in requests {
            guest.control(Kind::Guest, &message(opcode, node, &body));
        }
    }
}
