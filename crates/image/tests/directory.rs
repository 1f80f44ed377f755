//! Directories as hosts have them: mounts, odd names, holes, depths, and files that somebody else writes to.

#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clone_image::{
    DiskSize, ImageError, Limits, Ownership, Progress, RootfsReport, RootfsSpec, Source, Step,
    build_rootfs,
};

fn e2fs(program: &str, args: &[&OsStr]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    Command::new(program)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("this test needs e2fsprogs ({program}): {e}"))
}

fn check(disk: &Path) {
    let out = e2fs("e2fsck", &["-fn".as_ref(), disk.as_os_str()]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
}

fn debugfs(disk: &Path, request: &[u8]) -> Vec<u8> {
    let words = ["-R".as_ref(), OsStr::from_bytes(request), disk.as_os_str()];
    e2fs("debugfs", &words).stdout
}

fn text(disk: &Path, request: &str) -> String {
    String::from_utf8_lossy(&debugfs(disk, request.as_bytes())).into_owned()
}

fn spec(root: &Path, dir: &Path) -> RootfsSpec {
    let source = Source::Directory {
        path: root.to_owned(),
        ownership: Ownership::Keep,
    };
    let mut spec = RootfsSpec::new(source, dir.join("disk.img"));
    spec.size = DiskSize::Free(8 << 20);
    spec
}

fn build(root: &Path, dir: &Path) -> RootfsReport {
    let report = build_rootfs(&spec(root, dir), &()).unwrap();
    check(&report.path);
    report
}

/// A directory with what every image needs.
fn root(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("sbin")).unwrap();
    fs::write(root.join("sbin/init"), "init").unwrap();
    root
}

/// Whether this process has mounts of its own; if not, runs the test of this name in one that has.
fn in_own_mounts(test: &str) -> bool {
    const INSIDE: &str = "CLONE_TEST_IN_OWN_MOUNTS";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

fn mount(words: &[&str], target: &Path) {
    let status = Command::new("mount").args(words).arg(target).status();
    assert!(status.unwrap().success(), "mount {words:?}");
}

#[test]
fn a_mounted_file_is_itself_and_no_link_of_one_with_the_same_inode_number() {
    if !in_own_mounts("a_mounted_file_is_itself_and_no_link_of_one_with_the_same_inode_number") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [ours, other] = ["ours", "other"].map(|name| dir.path().join(name));
    for place in [&ours, &other] {
        fs::create_dir(place).unwrap();
        mount(&["-t", "tmpfs", "none"], place);
        // Both file systems count their inodes from the same number on.
        fs::create_dir(place.join("root")).unwrap();
        fs::write(place.join("root/a"), place.as_os_str().as_bytes()).unwrap();
        fs::hard_link(place.join("root/a"), place.join("root/b")).unwrap();
    }
    let root = ours.join("root");
    let foreign = other.join("root/a");
    let number = |path: &Path| fs::metadata(path).unwrap().ino();
    assert_eq!(number(&root.join("a")), number(&foreign));
    for name in ["c", "0", "d"] {
        File::create(root.join(name)).unwrap();
        mount(&["--bind", foreign.to_str().unwrap()], &root.join(name));
    }
    // A directory of another file system is left out, and told.
    fs::create_dir(root.join("mounted")).unwrap();
    mount(&["--bind", other.to_str().unwrap()], &root.join("mounted"));
    let report = build(&root, dir.path());
    let disk = &report.path;
    for (name, content) in [("a", &ours), ("b", &ours), ("c", &other), ("0", &other)] {
        let found = debugfs(disk, format!("cat /{name}").as_bytes());
        assert_eq!(found, content.as_os_str().as_bytes(), "{name}");
    }
    assert!(text(disk, "stat /a").contains("Links: 2"));
    assert_eq!(report.left_out, [root.join("mounted")]);
    assert!(text(disk, "stat /mounted").contains("Type: directory"));
    assert_eq!(debugfs(disk, b"cat /mounted/root/a"), b"");
}

#[test]
fn any_name_that_the_host_can_hold_is_in_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let longest = [b'n'; 255];
    for name in [
        &b"\xff\xfe not text"[..],
        b"new\nline",
        b"-o,ro=x",
        &longest,
    ] {
        fs::write(root.join(OsStr::from_bytes(name)), b"here").unwrap();
    }
    symlink(OsStr::from_bytes(b"t\xff"), root.join("link")).unwrap();
    let report = build(&root, dir.path());
    let list = debugfs(&report.path, b"ls -p /");
    for name in [&b"\xff\xfe not text"[..], b"-o,ro=x", &longest] {
        let found = list.windows(name.len()).any(|part| part == name);
        assert!(found, "{}", String::from_utf8_lossy(&list));
    }
    let cat = [b"cat /".as_slice(), &longest].concat();
    assert_eq!(debugfs(&report.path, &cat), b"here");
}

#[test]
fn a_tree_deeper_than_any_path_is_read_and_one_beyond_all_measure_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    // 40 names of 200 bytes are twice what fits into one path.
    let deepen = |from: &Path, name: &str, count: usize| {
        let mut here = File::open(from).unwrap();
        for _ in 0..count {
            let flags = rustix::fs::OFlags::DIRECTORY;
            rustix::fs::mkdirat(&here, name, 0o755.into()).unwrap();
            here = rustix::fs::openat(&here, name, flags, rustix::fs::Mode::empty())
                .unwrap()
                .into();
        }
        here
    };
    let name = "d".repeat(200);
    let deepest = deepen(&root, &name, 40);
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let file = rustix::fs::openat(&deepest, "f", flags, 0o644.into()).unwrap();
    File::from(file).write_all(b"deep").unwrap();
    let report = build(&root, dir.path());
    let path = format!("cat {}/f", format!("/{name}").repeat(40));
    assert_eq!(debugfs(&report.path, path.as_bytes()), b"deep");
    // Deeper than is walked by recursion.
    deepen(&root, "x", 1100);
    let mut again = spec(&root, dir.path());
    again.replace = true;
    let error = build_rootfs(&again, &()).unwrap_err();
    assert!(matches!(error, ImageError::Limit { .. }), "{error}");
    // What the test's own clean-up could not name.
    let status = Command::new("rm").arg("-rf").arg(&root).status().unwrap();
    assert!(status.success());
}

#[test]
fn holes_of_a_file_are_holes_in_the_image_and_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    // As /var/log/lastlog is on hosts with large user ids.
    let log = File::create(root.join("lastlog")).unwrap();
    log.set_len(300 << 30).unwrap();
    log.write_all_at(b"a login", 299 << 30).unwrap();
    File::create(root.join("nothing"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let places = [5u64, 7 << 20, (60 << 20) + 4090, (64 << 20) - 20];
    let small = File::create(root.join("small")).unwrap();
    for at in places {
        small.write_all_at(b"a login of somebody.", at).unwrap();
    }
    let report = build(&root, dir.path());
    assert!(report.bytes < 64 << 20, "{}", report.bytes);
    let stat = text(&report.path, "stat /lastlog");
    assert!(stat.contains(&format!("Size: {}", 300u64 << 30)), "{stat}");
    let found = debugfs(&report.path, b"cat /small");
    assert!(found == fs::read(root.join("small")).unwrap());
}

#[test]
fn a_file_that_is_not_data_keeps_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let fifo = CString::new(root.join("fifo").as_os_str().as_bytes()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let _socket = UnixListener::bind(root.join("socket")).unwrap();
    let report = build(&root, dir.path());
    assert!(text(&report.path, "stat /fifo").contains("Type: FIFO"));
    assert!(text(&report.path, "stat /socket").contains("Type: socket"));
}

/// Does something at the moment when all is known of the source, and nothing is read yet.
struct Meddler<F: Fn()>(Cell<bool>, F);

impl<F: Fn()> Progress for Meddler<F> {
    fn begin(&self, step: Step, _: Option<u64>) {
        if step == Step::Write && !self.0.replace(true) {
            (self.1)();
        }
    }

    fn advance(&self, _: u64) {}
}

#[test]
fn a_file_that_changes_while_the_image_is_made_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let file = root.join("file");
    let secret = dir.path().join("secret");
    fs::write(&secret, "of the host").unwrap();
    let rewrite = || fs::write(&file, "other").unwrap();
    let grow = || fs::write(&file, "longer than before").unwrap();
    let replace = || {
        fs::write(root.join("new"), "fresh").unwrap();
        fs::rename(root.join("new"), &file).unwrap();
    };
    let remove = || fs::remove_file(&file).unwrap();
    let link = || {
        fs::remove_file(&file).unwrap();
        symlink(&secret, &file).unwrap();
    };
    let changes: [&dyn Fn(); 5] = [&rewrite, &grow, &replace, &remove, &link];
    for (number, change) in changes.into_iter().enumerate() {
        let _ = fs::remove_file(&file);
        fs::write(&file, "first").unwrap();
        // Long ago, so that a change is sure to show in the time.
        let past = std::time::SystemTime::UNIX_EPOCH;
        File::open(&file).unwrap().set_modified(past).unwrap();
        let meddler = Meddler(Cell::new(false), change);
        let error = build_rootfs(&spec(&root, dir.path()), &meddler).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("file"), "{number}: {error}");
        assert!(!dir.path().join("disk.img").exists(), "{number}");
    }
}

#[test]
fn sparse_files_count_by_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    File::create(root.join("sparse"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let mut spec = spec(&root, dir.path());
    spec.limits = Limits {
        content_bytes: 1 << 20,
        ..Limits::default()
    };
    build_rootfs(&spec, &()).unwrap();
    fs::write(root.join("dense"), vec![1; 2 << 20]).unwrap();
    spec.replace = true;
    let error = build_rootfs(&spec, &()).unwrap_err();
    assert!(matches!(error, ImageError::Limit { .. }), "{error}");
}
