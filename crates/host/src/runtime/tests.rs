use std::os::unix::fs::PermissionsExt;

use super::*;

fn config(name: &str) -> VmConfig {
    VmConfig {
        name: name.into(),
        kernel: "k".into(),
        ..VmConfig::default()
    }
}

fn runtime() -> (tempfile::TempDir, Runtime) {
    let root = tempfile::tempdir().unwrap();
    let runtime = Runtime::at(root.path()).unwrap();
    (root, runtime)
}

fn me() -> Process {
    Process::of(std::process::id()).unwrap()
}

#[test]
fn a_directory_is_private_and_named_like_its_vm() {
    let (_root, runtime) = runtime();
    let vm = runtime.create(&config("a")).unwrap();
    let mode = fs::metadata(vm.dir.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert_eq!(vm.dir.name(), "a");
    vm.dir.write_config(&config("a")).unwrap();
    assert_eq!(vm.dir.config().unwrap(), config("a"));
}

#[test]
fn while_it_starts_a_vm_is_neither_listed_nor_swept_and_its_name_is_taken() {
    let (_root, runtime) = runtime();
    let vm = runtime.create(&config("a")).unwrap();
    assert_eq!(vm.dir.status().unwrap(), Status::Starting);
    assert!(runtime.sweep().unwrap().is_empty());
    assert!(runtime.running().unwrap().is_empty());
    let taken = runtime.create(&config("a")).unwrap_err();
    assert_eq!(taken.code, ErrorCode::Conflict);
    assert_eq!(runtime.find("a").unwrap_err().code, ErrorCode::Conflict);
    assert!(vm.dir.path().exists());
}

#[test]
fn a_vm_runs_while_its_process_lives() {
    let (_root, runtime) = runtime();
    let vm = runtime.create(&config("a")).unwrap();
    vm.dir.write_process(me()).unwrap();
    drop(vm);
    assert_eq!(runtime.find("a").unwrap().process, me());
    assert_eq!(runtime.running().unwrap().len(), 1);
    assert!(runtime.sweep().unwrap().is_empty());
}

#[test]
fn a_directory_whose_process_id_came_again_is_stale_and_swept() {
    let (_root, runtime) = runtime();
    let vm = runtime.create(&config("a")).unwrap();
    let mut other = me();
    other.start_time -= 1;
    vm.dir.write_process(other).unwrap();
    let dir = vm.dir.clone();
    drop(vm);
    assert_eq!(dir.status().unwrap(), Status::Stale);
    assert_eq!(runtime.sweep().unwrap(), ["a"]);
    assert_eq!(dir.status().unwrap(), Status::Absent);
}

#[test]
fn what_a_launcher_left_that_was_killed_half_way_is_swept_by_the_next_command() {
    let (_root, runtime) = runtime();
    for name in ["a", "b", "c"] {
        let vm = runtime.create(&config(name)).unwrap();
        vm.dir.write_config(&config(name)).unwrap();
    }
    // Each kind of command: one that names the VM, one that lists, one that takes the name.
    assert_eq!(runtime.find("a").unwrap_err().code, ErrorCode::NotFound);
    assert!(!runtime.dir("a").path().exists());
    runtime.create(&config("b")).unwrap();
    assert!(runtime.running().unwrap().is_empty());
    assert!(!runtime.dir("c").path().exists());
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let (_root, runtime) = runtime();
    let vm = runtime.create(&config("a")).unwrap();
    vm.dir.write_config(&config("a")).unwrap();
    let path = vm.dir.path().to_owned();
    vm.abandon(&runtime).unwrap();
    assert!(!path.exists());
}

#[test]
fn names_that_would_leave_the_root_are_not_looked_for() {
    let (_root, runtime) = runtime();
    for name in ["..", "../vms", "", ".lock"] {
        assert_eq!(runtime.find(name).unwrap_err().code, ErrorCode::NotFound);
    }
}

#[test]
fn a_directory_too_deep_for_sockets_is_refused_with_advice() {
    let root = tempfile::tempdir().unwrap();
    let runtime = Runtime::at(&root.path().join("x".repeat(80))).unwrap();
    let error = runtime.create(&config("a")).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidConfig);
    assert!(error.advice.unwrap().contains("CLONE_RUNTIME_DIR"));
}

#[test]
fn a_runtime_directory_that_others_can_write_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    for (others, allowed) in [
        (0o777, false),
        (0o775, false),
        (0o1777, true),
        (0o755, true),
    ] {
        mode(root.path(), others);
        let opened = Runtime::at(root.path());
        assert_eq!(opened.is_ok(), allowed, "{others:o}");
    }
    // The directory of sockets itself, where somebody else made it first.
    let vms = root.path().join("vms");
    mode(&vms, 0o777);
    let error = Runtime::at(root.path()).unwrap_err();
    assert_eq!(error.code, ErrorCode::HostUnsupported);
    mode(&vms, 0o700);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&vms, Some(12345), None).unwrap();
        Runtime::at(root.path()).unwrap_err();
    }
}
