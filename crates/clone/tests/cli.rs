//! The command from outside, as far as no guest is needed.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_clone"))
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.0.path().join("run"))
            .env("CLONE_CACHE_DIR", self.0.path().join("cache"))
            .output()
            .unwrap()
    }

    /// Runs and gives the exit code and what was told of the failure.
    fn fails(&self, words: &[&str]) -> (i32, String) {
        let output = self.run(words);
        assert!(output.stdout.is_empty(), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), told)
    }

    fn leftovers(&self) -> Vec<String> {
        let Ok(dir) = fs::read_dir(self.0.path().join("run/vms")) else {
            return Vec::new();
        };
        let names = dir.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with('.')).collect()
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

#[test]
fn every_command_that_names_a_vm_that_is_not_there_says_so_with_code_3() {
    let bench = Bench::new();
    for words in [
        &["stat", "nobody"][..],
        &["attach", "nobody"],
        &["logs", "nobody"],
        &["pause", "nobody"],
        &["resume", "nobody"],
        &["stop", "nobody"],
        &["kill", "nobody"],
        &["rm", "nobody"],
        &["balloon", "nobody"],
        &["cp", "nobody:/etc/hosts", "-"],
    ] {
        let (code, told) = bench.fails(words);
        assert_eq!(code, 3, "{words:?}: {told}");
        assert!(
            told.contains("`nobody`") && told.contains("clone ls"),
            "{told}"
        );
    }
    // exec's codes below 125 are the command's own.
    assert_eq!(bench.fails(&["exec", "nobody", "true"]).0, 125);
}

#[test]
fn all_that_is_wrong_with_a_description_is_told_at_once_with_code_2() {
    let bench = Bench::new();
    let (code, told) = bench.fails(&["run", "-c", "99", "-m", "1K", "--net", "tap="]);
    assert_eq!(code, 2, "{told}");
    for field in ["vcpus:", "memory:", "kernel:", "net[0].tap:"] {
        assert!(told.contains(field), "{field} is not in: {told}");
    }
    let missing = [
        "run",
        "-k",
        "/no/kernel",
        "-i",
        "/no/initrd",
        "--disk",
        "/no/disk",
    ];
    let (code, told) = bench.fails(&missing);
    assert_eq!(code, 2, "{told}");
    for path in ["/no/kernel", "/no/initrd", "/no/disk"] {
        assert!(told.contains(path), "{path} is not in: {told}");
    }
    assert!(bench.leftovers().is_empty());
}

#[test]
fn what_is_no_kernel_gets_one_clear_error_and_leaves_nothing() {
    let bench = Bench::new();
    let mut truncated = fs::read(env!("CARGO_BIN_EXE_clone")).unwrap();
    truncated.truncate(3000);
    for (name, content) in [
        ("empty", &b""[..]),
        ("text", b"not a kernel, by any means"),
        ("zeros", &[0; 1 << 20]),
        ("truncated", &truncated),
    ] {
        let kernel = bench.file(name, content);
        let (code, told) = bench.fails(&["run", "-d", "-k", &kernel]);
        assert!(code == 2 || code == 1, "{name}: {code} {told}");
        assert!(told.contains(&kernel), "{name}: {told}");
        assert!(bench.leftovers().is_empty(), "{name}");
    }
}

#[test]
fn errors_as_json_have_code_message_and_advice() {
    let bench = Bench::new();
    let (code, told) = bench.fails(&["--json", "stat", "nobody"]);
    assert_eq!(code, 3);
    let error: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(error["code"], "not_found");
    assert!(error["message"].is_string() && error["advice"].is_string());
}

#[test]
fn an_empty_host_lists_nothing() {
    let bench = Bench::new();
    let text = bench.run(&["ls"]);
    assert!(text.status.success());
    assert_eq!(String::from_utf8(text.stdout).unwrap().lines().count(), 1);
    let json = bench.run(&["ls", "--json"]);
    let list: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(list, Value::Array(Vec::new()));
}

#[test]
fn what_a_dead_vm_left_is_gone_after_the_next_command() {
    let bench = Bench::new();
    for command in [&["ls"][..], &["stat", "dead"], &["rm", "dead"]] {
        let dir = bench.0.path().join("run/vms/dead");
        fs::create_dir_all(&dir).unwrap();
        // Process 1 lives, and started at another time.
        fs::write(dir.join("pid"), "1 1\n").unwrap();
        fs::write(dir.join("console.log"), "gone").unwrap();
        bench.run(command);
        assert!(bench.leftovers().is_empty(), "{command:?}");
    }
}

#[test]
fn wrong_usage_has_code_2_and_help_has_0() {
    let bench = Bench::new();
    for words in [
        &["frobnicate"][..],
        &["run", "--memory", "much"],
        &["run", "--disk", "a,format=vmdk"],
        &["exec"],
        &["cp", "a", "b"],
    ] {
        assert_eq!(bench.fails(words).0, 2, "{words:?}");
    }
    let help = bench.run(&["--help"]);
    assert!(help.status.success());
    assert!(
        String::from_utf8(help.stdout)
            .unwrap()
            .contains("Exit codes:")
    );
}

#[test]
fn completions_and_manual_pages_are_made_for_every_command() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = bench.run(&["completions", shell]);
        assert!(script.status.success());
        assert!(
            String::from_utf8(script.stdout)
                .unwrap()
                .contains("balloon")
        );
    }
    let dir = bench.0.path().join("man");
    assert!(bench.run(&["man", dir.to_str().unwrap()]).status.success());
    for page in [
        "clone.1",
        "clone-run.1",
        "clone-exec.1",
        "clone-image-build.1",
    ] {
        assert!(Path::new(&dir).join(page).exists(), "{page}");
    }
    // What is only for ourselves is not for users.
    assert!(!dir.join("clone-vm-process.1").exists());
}

#[test]
fn a_directory_becomes_a_disk_image() {
    let bench = Bench::new();
    let root = bench.0.path().join("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/motd"), "hello").unwrap();
    let image = bench.0.path().join("root.img");
    let words = [
        "--json",
        "image",
        "build",
        root.to_str().unwrap(),
        image.to_str().unwrap(),
    ];
    let built = bench.run(&words);
    assert!(built.status.success(), "{built:?}");
    let report: Value = serde_json::from_slice(&built.stdout).unwrap();
    assert_eq!(report["bytes"], fs::metadata(&image).unwrap().len());
    // Once more would overwrite it.
    assert!(!bench.run(&words).status.success());
}
