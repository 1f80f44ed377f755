//! VMs with a real guest, from `run` to their end, through the command alone.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A runtime directory of its own and the tiny guest.
struct Bench {
    dir: tempfile::TempDir,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let assets = std::env::var_os("CLONE_TEST_ASSETS")
            .expect("set CLONE_TEST_ASSETS, or run `cargo xtask test --guest`");
        let assets = PathBuf::from(assets);
        Self {
            // Not under the shared target folder, which holds no sockets.
            dir: tempfile::tempdir_in("/run").unwrap(),
            kernel: assets.join("guest-kernel/bzImage"),
            initrd: assets.join("guest-initramfs/initramfs.cpio"),
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clone"));
        command
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.dir.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn json(&self, words: &[&str]) -> Value {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn boot(&self, name: &str, more: &[&str]) -> Output {
        let (kernel, initrd) = (self.kernel.to_str().unwrap(), self.initrd.to_str().unwrap());
        let mut words = vec!["run", "-n", name, "-k", kernel, "-i", initrd, "-m", "256M"];
        words.extend(more);
        if !more.contains(&"--append") {
            words.extend(["--append", "quiet"]);
        }
        self.run(&words)
    }

    /// What is left of VMs: directories, and processes that mention the runtime directory.
    fn leftovers(&self) -> Vec<String> {
        let dirs = fs::read_dir(self.dir.path().join("vms")).unwrap();
        let dirs = dirs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut left: Vec<String> = dirs.filter(|name| !name.starts_with('.')).collect();
        let root = self.dir.path().to_str().unwrap();
        for process in fs::read_dir("/proc").unwrap() {
            let line = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(root) {
                left.push(line);
            }
        }
        left
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for vm in fs::read_dir(self.dir.path().join("vms"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = vm.file_name().into_string().unwrap();
            self.run(&["rm", "--force", &name]);
        }
    }
}

#[test]
fn a_guest_that_powers_off_ends_run_with_0_and_leaves_nothing() {
    let bench = Bench::new();
    let ended = bench.boot("a", &["-c", "2", "--append", "quiet guest.poweroff"]);
    let console = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(console.contains("guest: user space"), "{console}");
    assert!(console.contains("2 CPUs"), "{console}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn a_detached_vm_is_listed_paused_resumed_and_killed() {
    let bench = Bench::new();
    let started = bench.boot("a", &["--detach"]);
    assert!(started.status.success(), "{started:?}");
    assert_eq!(String::from_utf8(started.stdout).unwrap(), "a\n");

    let again = bench.boot("a", &["--detach"]);
    assert_eq!(again.status.code(), Some(4), "{again:?}");

    assert!(bench.run(&["pause", "a"]).status.success());
    assert_eq!(
        bench.json(&["ls", "--state", "--json"])[0]["state"],
        "paused"
    );
    let cpu = |stat: &Value| stat["stats"]["cpu"]["user_us"].as_u64().unwrap();
    assert!(cpu(&bench.json(&["stat", "a", "--json"])) > 0);
    let stopped = bench.run(&["stop", "a"]);
    assert_eq!(stopped.status.code(), Some(4), "{stopped:?}");
    assert!(bench.run(&["resume", "a"]).status.success());
    assert_eq!(
        bench.json(&["stat", "a", "--json"])["info"]["state"],
        "running"
    );

    assert!(bench.run(&["kill", "a"]).status.success());
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn what_a_vm_killed_from_outside_left_is_gone_after_the_next_command() {
    let bench = Bench::new();
    assert!(bench.boot("a", &["--detach"]).status.success());
    let pid = bench.json(&["ls", "--json"])[0]["pid"].to_string();
    let killed = Command::new("kill").args(["-9", &pid]).status().unwrap();
    assert!(killed.success());
    assert_eq!(bench.run(&["stat", "a"]).status.code(), Some(3));
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}

#[test]
fn a_kernel_that_cannot_start_is_one_error_and_leaves_nothing() {
    let bench = Bench::new();
    let mut cut = fs::read(&bench.kernel).unwrap();
    cut.truncate(cut.len() / 3);
    let kernel = bench.dir.path().join("cut");
    fs::write(&kernel, cut).unwrap();
    let failed = bench.run(&["run", "-d", "-n", "a", "-k", kernel.to_str().unwrap()]);
    assert!(!failed.status.success());
    let told = String::from_utf8(failed.stderr).unwrap();
    assert!(told.contains("kernel"), "{told}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
}
