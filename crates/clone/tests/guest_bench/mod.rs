//! VMs in a runtime directory of their own, started by the command.
// Each test binary uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What guests are told beside the made command line. systemd gives a device 90 s to appear: on an
/// emulated CPU that has other work, the console takes longer, and would get no login prompt.
const APPEND: &str = "quiet systemd.default_device_timeout_sec=600";
/// How long anything may take, in seconds: not what is tested, and where guests are emulated they
/// have their days.
pub const PATIENCE: u64 = 300;

/// A runtime directory of its own and the tiny guest.
pub struct Bench {
    dir: tempfile::TempDir,
    kernel: PathBuf,
    initrd: PathBuf,
    debian: PathBuf,
}

impl Bench {
    /// With a kernel that starts as it is; a `bzImage` is extracted first, which takes its time.
    pub fn new() -> Self {
        Self::with_kernel("vmlinux")
    }

    /// With this kernel of the assets.
    pub fn with_kernel(kernel: &str) -> Self {
        let assets = std::env::var_os("CLONE_TEST_ASSETS")
            .expect("set CLONE_TEST_ASSETS, or run `cargo xtask test --guest`");
        let assets = PathBuf::from(assets);
        Self {
            // Not under the shared target folder, which holds no sockets.
            dir: tempfile::tempdir_in("/run").unwrap(),
            kernel: assets.join("guest-kernel").join(kernel),
            initrd: assets.join("guest-initramfs/initramfs.cpio"),
            debian: assets.join("guest-debian/debian.ext4"),
        }
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clone"));
        command
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.dir.path())
            .env("CLONE_TEMPLATE_DIR", self.templates())
            .env("CLONE_SUSPENDED_DIR", self.suspended())
            // Of the test runner's, and slow to search in the testbed.
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::null());
        command
    }

    /// Another program that may call the command.
    pub fn other(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.dir.path());
        command
    }

    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    pub fn initrd(&self) -> &Path {
        &self.initrd
    }

    /// A disk with a stock Debian.
    pub fn debian(&self) -> &Path {
        &self.debian
    }

    /// Where its templates are.
    pub fn templates(&self) -> PathBuf {
        self.dir.path().join("templates")
    }

    /// Where its suspended VMs are.
    pub fn suspended(&self) -> PathBuf {
        self.dir.path().join("suspended")
    }

    /// Puts a nonce into the RAM of a VM and starts a counter that never stops: what
    /// [`proves_itself`] looks for. It counts slowly: each step starts two processes in the guest.
    pub fn start_proof_of_life(&self, name: &str) {
        self.guest(
            name,
            "echo nonce-4711 > /run/nonce; \
             (i=0; while :; do i=$((i+1)); echo $i > /run/count.new; mv /run/count.new /run/count; \
             usleep 100000; done) >/dev/null 2>&1 &",
        );
    }

    /// Runs a script in a VM's shell, and gives what it prints.
    pub fn guest(&self, name: &str, script: &str) -> String {
        let output = self.run(&["exec", name, "sh", "-c", script]);
        if !output.status.success() {
            let console = self.run(&["logs", name]).stdout;
            let console = String::from_utf8_lossy(&console).into_owned();
            let log = fs::read_to_string(self.dir.path().join("vms").join(name).join("vmm.log"));
            let end = |text: &str| {
                text.lines()
                    .rev()
                    .take(15)
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            panic!(
                "{name}: {script}: {output:?}\n== console, last first\n{:#?}\n== process\n{:#?}",
                end(&console),
                end(&log.unwrap_or_default())
            );
        }
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Runs a command that must succeed.
    pub fn done(&self, words: &[&str]) -> Output {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        output
    }

    /// A path for a file of the test.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    pub fn json(&self, words: &[&str]) -> Value {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn boot(&self, name: &str, more: &[&str]) -> Output {
        let (kernel, initrd) = (self.kernel.to_str().unwrap(), self.initrd.to_str().unwrap());
        let mut words = vec!["run", "-n", name, "-k", kernel, "-i", initrd];
        if !more.contains(&"-m") {
            words.extend(["-m", "256M"]);
        }
        words.extend(more);
        if !more.contains(&"--append") {
            words.extend(["--append", APPEND]);
        }
        self.run(&words)
    }

    /// Waits until a VM that boots has its agent.
    pub fn wait_for_agent(&self, name: &str) {
        self.done(&["exec", "--wait", &PATIENCE.to_string(), name, "true"]);
    }

    /// The records of verified templates.
    fn records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join("vms")).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let is_record = |path: &PathBuf| path.to_string_lossy().contains("/.verified-");
        paths.filter(is_record).collect()
    }

    /// Links to the shared template in `folder`. Nobody changes the files of a template; a test that
    /// does must copy them first.
    fn link_template(&self, folder: &Path) {
        let target = self.templates().join("t");
        fs::create_dir_all(&target).unwrap();
        fs::set_permissions(
            &target,
            fs::metadata(folder.join("t")).unwrap().permissions(),
        )
        .unwrap();
        for file in fs::read_dir(folder.join("t")).unwrap() {
            let file = file.unwrap();
            fs::hard_link(file.path(), target.join(file.file_name())).unwrap();
        }
        self.take_records(folder);
    }

    /// Takes over the records of `folder` that templates were verified, which is not done again then.
    fn take_records(&self, folder: &Path) {
        let vms = self.dir.path().join("vms");
        fs::create_dir_all(&vms).unwrap();
        for file in fs::read_dir(folder).unwrap() {
            let file = file.unwrap();
            let name = file.file_name();
            if name.to_string_lossy().starts_with(".verified-") {
                fs::copy(file.path(), vms.join(name)).unwrap();
            }
        }
    }

    /// Takes over from another bench, whose templates this one uses, that they were verified.
    pub fn trust_templates_of(&self, other: &Self) {
        self.take_records(&other.dir.path().join("vms"));
    }

    /// What is left of VMs: directories, and processes that mention the runtime directory.
    pub fn leftovers(&self) -> Vec<String> {
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
            if !name.starts_with('.') {
                self.run(&["rm", "--force", &name]);
            }
        }
    }
}

/// What the guest of a template `t` has. It is a guest of two CPUs with the proof of life.
#[derive(Clone, Copy)]
pub enum With {
    /// No device.
    Nothing,
    /// A network interface.
    Net,
    /// A network interface, and a disk of 64 MiB with an overlay that ends with the VM.
    NetAndDisk,
}

/// A bench with a template `t`. Booting a guest and saving it takes far longer than most tests, so
/// the tests of a run share what the first of them made ([`shared`]).
pub fn bench_with_template(with: With) -> Bench {
    let bench = Bench::new();
    match std::env::var_os("CLONE_TEST_SHARED") {
        None => make_template(&bench, with),
        Some(folder) => bench.link_template(&shared(Path::new(&folder), with)),
    }
    bench
}

fn make_template(bench: &Bench, with: With) {
    let disk = bench.path("disk.img");
    let image = format!("{disk},overlay=ephemeral");
    let devices: &[&str] = match with {
        With::Nothing => &[],
        With::Net => &["--net", "nat"],
        With::NetAndDisk => {
            fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
            &["--net", "nat", "--disk", &image]
        }
    };
    let started = bench.boot("base", &[&["--detach", "-c", "2"], devices].concat());
    assert!(started.status.success(), "{started:?}");
    bench.wait_for_agent("base");
    bench.start_proof_of_life("base");
    bench.done(&["snapshot", "base", "-o", "t"]);
    bench.done(&["kill", "base"]);
}

/// The folder that holds such a template for all tests, with the record that it was verified.
fn shared(folder: &Path, with: With) -> PathBuf {
    let made = folder.join(match with {
        With::Nothing => "nothing",
        With::Net => "net",
        With::NetAndDisk => "net-and-disk",
    });
    fs::create_dir_all(folder).unwrap();
    let lock = fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    if made.exists() {
        return made;
    }
    let begun = folder.join("begun");
    let _ = fs::remove_dir_all(&begun);
    fs::create_dir(&begun).unwrap();
    {
        let maker = Bench::new();
        make_template(&maker, with);
        fs::rename(maker.templates().join("t"), begun.join("t")).unwrap();
    }
    // The record is of files that nothing else links to. So it differs from those with more links in
    // their number, which is known to change nothing of their content.
    let verifier = Bench::new();
    fs::create_dir_all(verifier.templates()).unwrap();
    fs::rename(begun.join("t"), verifier.templates().join("t")).unwrap();
    verifier.done(&["template", "verify", "t"]);
    fs::rename(verifier.templates().join("t"), begun.join("t")).unwrap();
    for record in verifier.records() {
        fs::copy(&record, begun.join(record.file_name().unwrap())).unwrap();
    }
    fs::rename(&begun, &made).unwrap();
    made
}

/// The proof of life of a VM of [`bench_with_template`]: memory, time, system calls, floating point,
/// and timers on both CPUs. One command does it all: where guests are emulated, each costs its time.
pub fn proves_itself(bench: &Bench, name: &str) {
    let script = "
        cat /run/nonce
        a=$(cat /run/count)
        for cpu in 1 2; do
            taskset $cpu awk 'BEGIN { printf \"%.6f\\n\", 2.5*2.5*2.5 }'
            taskset $cpu sleep 0.01 && echo fired
        done
        for i in $(seq 1000); do
            b=$(cat /run/count); [ $b -gt $a ] && break; usleep 10000
        done
        [ $b -gt $a ] && echo on";
    let proof = bench.guest(name, script);
    let proof: Vec<&str> = proof.lines().collect();
    let of_a_cpu = ["15.625000", "fired"];
    assert_eq!(proof.first(), Some(&"nonce-4711"), "{proof:?}");
    assert_eq!(proof.get(1..3), Some(&of_a_cpu[..]), "{proof:?}");
    assert_eq!(
        proof.get(3..),
        Some(&["15.625000", "fired", "on"][..]),
        "{proof:?}"
    );
}
