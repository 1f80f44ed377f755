//! The writer against e2fsprogs, the reference implementation: every image must pass a forced check unchanged, and
//! debugfs must read back what went in.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::tree::{Content, Limits, Meta, Node};

struct Disk {
    _dir: tempfile::TempDir,
    path: PathBuf,
    made: Made,
}

fn options(size: DiskSize) -> Options {
    Options {
        size,
        uuid: *b"\x12test-fs-uuid-01",
        label: "clone-root".to_owned(),
        created: 1_700_000_000,
    }
}

fn write_disk(tree: &Tree, size: DiskSize) -> Result<Disk> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let file = File::create_new(&path).unwrap();
    let made = write(tree, &options(size), &file, &path, &())?;
    Ok(Disk {
        _dir: dir,
        path,
        made,
    })
}

/// Runs one of e2fsprogs; they live in /sbin, which is not in every user's path.
fn e2fs(program: &str, args: &[&str]) -> (bool, String) {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let out = Command::new(program)
        .env("PATH", path)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("this test needs e2fsprogs ({program}): {e}"));
    let text = [out.stdout, out.stderr].concat();
    (
        out.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

impl Disk {
    fn check(&self) {
        let (ok, text) = e2fs("e2fsck", &["-fn", self.path.to_str().unwrap()]);
        assert!(ok, "{text}");
    }

    fn debugfs(&self, request: &str) -> String {
        e2fs("debugfs", &["-R", request, self.path.to_str().unwrap()]).1
    }
}

fn tree() -> Tree {
    Tree::new(Limits::default())
}

fn node(kind: Kind) -> Node {
    Node {
        meta: Meta::root(0o644, 1_600_000_000),
        kind,
    }
}

fn bytes(content: &[u8]) -> Kind {
    Kind::File(Content::Bytes(Arc::from(content)))
}

#[test]
fn an_empty_tree_is_a_clean_file_system() {
    for size in [
        DiskSize::Total(8 << 20),
        DiskSize::Total(300 << 20),
        DiskSize::Free(0),
    ] {
        let disk = write_disk(&tree(), size).unwrap();
        disk.check();
        assert_eq!(fs::metadata(&disk.path).unwrap().len(), disk.made.bytes);
    }
}

#[test]
fn files_of_every_size_keep_their_content() {
    let mut tree = tree();
    let pattern: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7 / 3) as u8).collect();
    for len in [0, 1, 4095, 4096, 4097, 100_000, 5_000_000] {
        tree.put_at(&format!("/files/of {len}"), node(bytes(&pattern[..len])))
            .unwrap();
    }
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    for len in [0, 1, 4095, 4096, 4097, 100_000, 5_000_000] {
        let out = disk.path.with_extension("out");
        disk.debugfs(&format!("dump \"/files/of {len}\" {}", out.display()));
        assert!(fs::read(&out).unwrap() == pattern[..len], "{len}");
    }
}

#[test]
fn zeros_in_a_file_cost_no_space_in_the_image() {
    use std::os::unix::fs::MetadataExt;
    let mut tree = tree();
    let mut data = vec![0; 64 << 20];
    data[33 << 20] = 1;
    tree.put_at("/sparse", node(bytes(&data))).unwrap();
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    let used = fs::metadata(&disk.path).unwrap().blocks() * 512;
    assert!(used < 2 << 20, "{used} bytes used");
    let out = disk.path.with_extension("out");
    disk.debugfs(&format!("dump /sparse {}", out.display()));
    assert!(fs::read(&out).unwrap() == data);
}

#[test]
fn owners_modes_times_and_kinds_survive() {
    let mut tree = tree();
    let mut put = |path: &str, mode: u16, uid: u32, gid: u32, kind: Kind| {
        let meta = Meta {
            mode,
            uid,
            gid,
            mtime: 1_234_567_890,
            mtime_ns: 42,
            ..Meta::default()
        };
        tree.put_at(path, Node { meta, kind }).unwrap()
    };
    put("/bin/su", 0o4755, 0, 42, bytes(b"x"));
    put("/home/user", 0o700, 100_000, 70_000, Kind::empty_dir());
    put("/tmp", 0o1777, 0, 0, Kind::empty_dir());
    put(
        "/dev/null",
        0o666,
        0,
        0,
        Kind::CharDevice { major: 1, minor: 3 },
    );
    put(
        "/dev/big",
        0o660,
        0,
        6,
        Kind::BlockDevice {
            major: 259,
            minor: 70_000,
        },
    );
    put("/run/pipe", 0o600, 0, 0, Kind::Fifo);
    put("/run/socket", 0o600, 0, 0, Kind::Socket);
    put("/short", 0o777, 0, 0, Kind::Symlink(b"bin/su".to_vec()));
    let long = "x/".repeat(100);
    put(
        "/long",
        0o777,
        0,
        0,
        Kind::Symlink(long.clone().into_bytes()),
    );
    for length in [59, 60, 61, 4095] {
        put(
            &format!("/link{length}"),
            0o777,
            0,
            0,
            Kind::Symlink(vec![b'a'; length]),
        );
    }
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    let stat = |path: &str| disk.debugfs(&format!("stat {path}"));
    let su = stat("/bin/su");
    assert!(
        su.contains("Mode:  04755") && su.contains("Group:    42") && su.contains("Type: regular"),
        "{su}"
    );
    assert!(su.contains("mtime: 0x499602d2:000000a8"), "{su}");
    let home = stat("/home/user");
    assert!(
        home.contains("User: 100000") && home.contains("Group: 70000") && home.contains("0700"),
        "{home}"
    );
    assert!(stat("/tmp").contains("01777"));
    assert!(
        stat("/dev/null").contains("Device major/minor number: 01:03"),
        "{}",
        stat("/dev/null")
    );
    assert!(
        stat("/dev/big").contains("259:70000"),
        "{}",
        stat("/dev/big")
    );
    assert!(stat("/run/pipe").contains("Type: FIFO"));
    assert!(stat("/run/socket").contains("Type: socket"));
    assert!(
        stat("/short").contains("Fast link dest: \"bin/su\""),
        "{}",
        stat("/short")
    );
    assert!(disk.debugfs("cat /long").contains(&long));
}

#[test]
fn hard_links_share_an_inode() {
    let mut tree = tree();
    let first = tree.put_at("/a/one", node(bytes(b"shared"))).unwrap();
    let dir = tree.find("/a").unwrap();
    tree.enter(dir, b"two", first).unwrap();
    tree.enter(NodeId::ROOT, b"three", first).unwrap();
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    assert!(disk.debugfs("stat /three").contains("Links: 3"));
    assert_eq!(disk.debugfs("stat /three"), disk.debugfs("stat /a/two"));
}

#[test]
fn what_was_removed_is_not_in_the_image() {
    let mut tree = tree();
    tree.put_at("/gone/file", node(bytes(b"secret"))).unwrap();
    tree.put_at("/kept", node(bytes(b"kept"))).unwrap();
    assert!(tree.remove(NodeId::ROOT, b"gone"));
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    assert!(!disk.debugfs("ls /").contains("gone"));
    assert_eq!(disk.made.inodes, 2);
}

#[test]
fn a_directory_of_many_long_names_is_whole() {
    let mut tree = tree();
    for i in 0..3000 {
        tree.put_at(&format!("/many/{i:0>200}"), node(bytes(b"")))
            .unwrap();
    }
    for i in 0..700 {
        tree.put_at(&format!("/dirs/{i}"), node(Kind::empty_dir()))
            .unwrap();
    }
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    assert!(disk.debugfs("stat /dirs").contains("Links: 702"));
    assert!(
        disk.debugfs(&format!("stat /many/{:0>200}", 2999))
            .contains("Type: regular")
    );
}

#[test]
fn attributes_in_the_inode_and_in_a_block_survive() {
    let mut tree = tree();
    let acl = [
        &2u32.to_le_bytes()[..],
        &[1, 0, 7, 0, 255, 255, 255, 255],
        &[2, 0, 5, 0, 0xe8, 3, 0, 0],
        &[4, 0, 5, 0, 255, 255, 255, 255],
        &[16, 0, 5, 0, 255, 255, 255, 255],
        &[32, 0, 4, 0, 255, 255, 255, 255],
    ]
    .concat();
    let mut put = |path: &str, xattrs: &[(&str, &[u8])]| {
        let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
            .collect();
        let meta = Meta {
            xattrs,
            ..Meta::root(0o644, 0)
        };
        tree.put_at(
            path,
            Node {
                meta,
                kind: bytes(b"x"),
            },
        )
        .unwrap();
    };
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    put("/ping", &[("security.capability", &capability)]);
    put("/acl", &[("system.posix_acl_access", &acl)]);
    put(
        "/large",
        &[
            ("user.large", &[b'v'; 3000]),
            ("user.empty", b""),
            ("user.b", b"small value"),
        ],
    );
    let disk = write_disk(&tree, DiskSize::default()).unwrap();
    disk.check();
    let ping = disk.debugfs("ea_get -x /ping security.capability");
    assert!(ping.contains("01 00 00 02 00 20"), "{ping}");
    assert!(
        disk.debugfs("ea_get /large user.large")
            .contains(&"v".repeat(3000))
    );
    assert!(
        disk.debugfs("ea_list /large")
            .contains("user.b (11) = \"small value\"")
    );
    let shown = disk
        .debugfs("ea_get -x /acl system.posix_acl_access")
        .to_lowercase();
    assert!(shown.contains("02 00 05 00 e8 03 00 00"), "{shown}");
}

#[test]
fn attributes_that_ext4_cannot_hold_are_refused_by_name() {
    let mut tree = tree();
    let xattrs = BTreeMap::from([(b"user.huge".to_vec(), vec![0; 5000])]);
    let meta = Meta {
        xattrs,
        ..Meta::root(0o644, 0)
    };
    tree.put_at(
        "/some/file",
        Node {
            meta,
            kind: bytes(b""),
        },
    )
    .unwrap();
    let error = write_disk(&tree, DiskSize::default())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("/some/file") && error.contains("extended attributes"),
        "{error}"
    );
}

#[test]
fn a_disk_too_small_is_refused_with_advice() {
    let mut tree = tree();
    tree.put_at("/big", node(bytes(&[1; 12 << 20]))).unwrap();
    let error = write_disk(&tree, DiskSize::Total(12 << 20))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("larger disk"), "{error}");
    assert!(write_disk(&tree, DiskSize::Total(1 << 20)).is_err());
}

#[test]
fn large_disks_stay_sparse_and_clean() {
    use std::os::unix::fs::MetadataExt;
    let mut tree = tree();
    tree.put_at("/file", node(bytes(b"hello"))).unwrap();
    let disk = write_disk(&tree, DiskSize::Total(64 << 30)).unwrap();
    disk.check();
    assert!(fs::metadata(&disk.path).unwrap().blocks() * 512 < 16 << 20);
}

#[test]
fn a_fragmented_file_gets_a_deep_extent_tree() {
    // A file of over four extents of 128 MiB each, all holes but for its ends: cheap to make.
    let spool = tempfile::tempfile().unwrap();
    spool.set_len(700 << 20).unwrap();
    use std::os::unix::fs::FileExt;
    spool.write_all_at(b"end", (700 << 20) - 3).unwrap();
    let content = Content::Spooled {
        file: Arc::new(spool),
        offset: 0,
        len: 700 << 20,
    };
    let mut tree = tree();
    tree.put_at("/huge", node(Kind::File(content))).unwrap();
    let disk = write_disk(&tree, DiskSize::Free(0)).unwrap();
    disk.check();
    assert!(
        disk.debugfs("ex /huge").contains("1/ 1"),
        "{}",
        disk.debugfs("ex /huge")
    );
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let mut tree = tree();
    tree.put_at("/etc/hostname", node(bytes(b"clone\n")))
        .unwrap();
    let (a, b) = (
        write_disk(&tree, DiskSize::Total(16 << 20)).unwrap(),
        write_disk(&tree, DiskSize::Total(16 << 20)).unwrap(),
    );
    assert!(fs::read(&a.path).unwrap() == fs::read(&b.path).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_tree_passes_the_check(
        files in prop::collection::vec(
            (prop::collection::vec("[a-c]{1,2}|[^/\u{0}]{1,60}", 1..5), 0usize..20_000, 0u8..4, any::<u32>()),
            0..60,
        ),
        size in prop_oneof![Just(DiskSize::Free(0)), (64u64..200).prop_map(|mib| DiskSize::Total((mib << 20) + 12345))],
    ) {
        let mut tree = tree();
        for (parts, len, kind, id) in files {
            let path = format!("/{}", parts.join("/"));
            let kind = match kind {
                0 => Kind::empty_dir(),
                1 => Kind::Symlink(vec![b'l'; 1 + len % 300]),
                2 => Kind::CharDevice { major: id >> 20, minor: id & 0xf_ffff },
                _ => bytes(&vec![id as u8; len]),
            };
            let meta = Meta { uid: id, gid: !id, mtime: i64::from(id), ..Meta::root(0o640, 0) };
            // Names such as `..`, and files where a directory is needed, are refused: no harm done.
            let _ = tree.put_at(&path, Node { meta, kind });
        }
        write_disk(&tree, size).unwrap().check();
    }
}
