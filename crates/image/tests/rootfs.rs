//! Whole builds through the public door, read back with e2fsprogs.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use clone_image::{
    DiskSize, FoundInit, ImageDescription, Init, Ownership, Progress, RootfsSpec, Source, Step,
    build_rootfs,
};

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
    (
        out.status.success(),
        String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned(),
    )
}

fn check(disk: &Path) {
    let (ok, text) = e2fs("e2fsck", &["-fn", disk.to_str().unwrap()]);
    assert!(ok, "{text}");
}

fn debugfs(disk: &Path, request: &str) -> String {
    e2fs("debugfs", &["-R", request, disk.to_str().unwrap()]).1
}

/// A file's content; debugfs introduces itself on its standard error.
fn cat(disk: &Path, path: &str) -> String {
    let path_var = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let request = format!("cat {path}");
    let out = Command::new("debugfs")
        .env("PATH", path_var)
        .arg("-R")
        .arg(request)
        .arg(disk)
        .output()
        .unwrap();
    String::from_utf8(out.stdout).unwrap()
}

/// The smallest static ELF that passes for an agent.
fn agent(dir: &Path) -> PathBuf {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend_from_slice(&[0; 8]);
    elf.extend_from_slice(&64u64.to_le_bytes());
    elf.extend_from_slice(&[0; 12]);
    elf.extend_from_slice(&[64, 0, 56, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let path = dir.join("clone-agent");
    fs::write(&path, elf).unwrap();
    path
}

fn root(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::write(root.join("usr/bin/sh"), "shell").unwrap();
    fs::set_permissions(root.join("usr/bin/sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("usr/bin", root.join("bin")).unwrap();
    root
}

fn spec(source: Source, dir: &Path) -> RootfsSpec {
    let mut spec = RootfsSpec::new(source, dir.join("disk.img"));
    spec.size = DiskSize::Free(16 << 20);
    spec
}

fn directory(path: PathBuf) -> Source {
    Source::Directory {
        path,
        ownership: Ownership::Root,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_directory_without_an_init_boots_into_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(directory(root(dir.path())), dir.path());
    spec.agent = Some(agent(dir.path()));
    spec.hostname = "guest7".to_owned();
    spec.nameservers = vec!["10.0.0.1".parse().unwrap()];
    let report = build_rootfs(&spec, &()).unwrap();
    assert_eq!(report.init, FoundInit::Agent);
    let disk = &report.path;
    check(disk);
    assert!(debugfs(disk, "stat /sbin/init").contains("/usr/local/bin/clone-agent"));
    assert!(debugfs(disk, "stat /usr/local/bin/clone-agent").contains("Mode:  0755"));
    assert_eq!(cat(disk, "/etc/hostname"), "guest7\n");
    assert_eq!(cat(disk, "/etc/resolv.conf"), "nameserver 10.0.0.1\n");
    assert!(cat(disk, "/etc/hosts").contains("guest7"));
    assert!(cat(disk, "/etc/fstab").contains("LABEL=clone-root / ext4"));
    assert!(debugfs(disk, "stat /etc/machine-id").contains("Size: 0"));
    assert!(debugfs(disk, "stat /proc").contains("Type: directory"));
    let description: ImageDescription =
        serde_json::from_str(&cat(disk, "/etc/clone/image.json")).unwrap();
    assert_eq!(
        (description.format, description.init),
        (1, FoundInit::Agent)
    );
}

#[test]
fn a_tree_with_systemd_gets_the_agent_as_a_service() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    fs::create_dir_all(root.join("usr/lib/systemd")).unwrap();
    fs::create_dir_all(root.join("usr/sbin")).unwrap();
    symlink("usr/lib", root.join("lib")).unwrap();
    symlink("usr/sbin", root.join("sbin")).unwrap();
    fs::write(root.join("usr/lib/systemd/systemd"), "systemd").unwrap();
    symlink("../lib/systemd/systemd", root.join("usr/sbin/init")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(
        root.join("etc/machine-id"),
        "0123456789abcdef0123456789abcdef\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/fstab"),
        "# UNCONFIGURED FSTAB FOR BASE SYSTEM\n",
    )
    .unwrap();
    fs::write(root.join("etc/hosts"), "10.1.1.1 mine\n").unwrap();
    let mut spec = spec(directory(root), dir.path());
    spec.agent = Some(agent(dir.path()));
    let report = build_rootfs(&spec, &()).unwrap();
    assert_eq!(report.init, FoundInit::Systemd);
    let disk = &report.path;
    check(disk);
    assert!(cat(disk, "/etc/systemd/system/clone-agent.service").contains("clone-agent\n"));
    let wanted = debugfs(
        disk,
        "stat /etc/systemd/system/sysinit.target.wants/clone-agent.service",
    );
    assert!(wanted.contains("Type: symlink"), "{wanted}");
    assert!(debugfs(disk, "stat /usr/sbin/init").contains("../lib/systemd/systemd"));
    assert!(debugfs(disk, "stat /etc/machine-id").contains("Size: 0"));
    assert!(debugfs(disk, "stat /var/.updated").contains("Type: regular"));
    assert!(cat(disk, "/etc/fstab").contains("LABEL=clone-root"));
    assert_eq!(cat(disk, "/etc/hosts"), "10.1.1.1 mine\n");
    // Asked for, the agent takes over, and the old init stays in reach.
    spec.init = Init::Agent;
    spec.replace = true;
    assert_eq!(build_rootfs(&spec, &()).unwrap().init, FoundInit::Agent);
    assert!(debugfs(disk, "stat /usr/sbin/init.image").contains("../lib/systemd/systemd"));
}

#[test]
fn an_ordinary_directory_keeps_owners_hard_links_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    fs::write(root.join("one"), "linked").unwrap();
    fs::hard_link(root.join("one"), root.join("two")).unwrap();
    let holes = fs::File::create(root.join("holes")).unwrap();
    holes.set_len(40 << 20).unwrap();
    let (uid, gid) = {
        let m = fs::metadata(root.join("one")).unwrap();
        (m.uid(), m.gid())
    };
    let source = Source::at(&root).unwrap();
    assert!(matches!(
        source,
        Source::Directory {
            ownership: Ownership::Keep,
            ..
        }
    ));
    let report = build_rootfs(&spec(source, dir.path()), &()).unwrap();
    assert_eq!(report.init, FoundInit::None);
    check(&report.path);
    let one = debugfs(&report.path, "stat /one");
    assert!(one.contains("Links: 2"), "{one}");
    assert!(
        one.contains(&format!("User: {uid:>5}   Group: {gid:>5}")),
        "{one}"
    );
    let meta = fs::metadata(&report.path).unwrap();
    assert_eq!(meta.len(), report.bytes);
    assert!(meta.blocks() * 512 < 4 << 20, "holes stay holes");
}

#[test]
fn a_failed_build_leaves_nothing_and_keeps_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    fs::write(root.join("big"), vec![1; 4 << 20]).unwrap();
    let before = names(dir.path());
    let mut spec = spec(directory(root), dir.path());
    spec.size = DiskSize::Total(8 << 20);
    fs::write(dir.path().join("root/big2"), vec![2; 8 << 20]).unwrap();
    let error = build_rootfs(&spec, &()).unwrap_err().to_string();
    assert!(error.contains("larger disk"), "{error}");
    assert_eq!(names(dir.path()), before);
    // With an older image in place, that one stays.
    fs::write(&spec.output, "precious").unwrap();
    spec.replace = true;
    build_rootfs(&spec, &()).unwrap_err();
    assert_eq!(fs::read_to_string(&spec.output).unwrap(), "precious");
    spec.replace = false;
    assert!(
        build_rootfs(&spec, &())
            .unwrap_err()
            .to_string()
            .contains("exists already")
    );
}

#[test]
fn agents_that_could_not_run_in_the_guest_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(directory(root(dir.path())), dir.path());
    spec.agent = Some(std::env::current_exe().unwrap());
    let error = build_rootfs(&spec, &()).unwrap_err().to_string();
    assert!(error.contains("linked dynamically"), "{error}");
    let script = dir.path().join("script");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    spec.agent = Some(script);
    assert!(
        build_rootfs(&spec, &())
            .unwrap_err()
            .to_string()
            .contains("no ELF magic")
    );
    spec.agent = None;
    spec.hostname = "bad name\n".to_owned();
    assert!(
        build_rootfs(&spec, &())
            .unwrap_err()
            .to_string()
            .contains("not a host name")
    );
}

#[derive(Default)]
struct Recorder {
    steps: RefCell<Vec<(Step, Option<u64>, u64)>>,
}

impl Progress for Recorder {
    fn begin(&self, step: Step, bytes: Option<u64>) {
        self.steps.borrow_mut().push((step, bytes, 0));
    }

    fn advance(&self, bytes: u64) {
        self.steps.borrow_mut().last_mut().unwrap().2 += bytes;
    }
}

#[test]
fn progress_counts_every_byte_of_content() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    fs::write(root.join("data"), vec![3; 3_000_000]).unwrap();
    let recorder = Recorder::default();
    build_rootfs(&spec(directory(root), dir.path()), &recorder).unwrap();
    let steps = recorder.steps.borrow();
    assert_eq!(steps[0].0, Step::Scan);
    let (step, expected, done) = &steps[1];
    assert_eq!(*step, Step::Write);
    assert!(
        *done > 3_000_000 && Some(*done) == *expected,
        "{done} of {expected:?}"
    );
}

#[test]
fn the_same_input_makes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(directory(root(dir.path())), dir.path());
    spec.uuid = Some([7; 16]);
    spec.created = Some(1_700_000_000);
    spec.replace = true;
    build_rootfs(&spec, &()).unwrap();
    let first = fs::read(&spec.output).unwrap();
    build_rootfs(&spec, &()).unwrap();
    assert!(fs::read(&spec.output).unwrap() == first);
}
