//! The main job, shown from nothing, with its times: a stock Debian boots once and becomes a
//! template, its clones answer, started and as a live fork; then Army forks it from standbys, and
//! runs commands in its clones, through the REST API. On hardware KVM or in the testbed.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::{cargo, output, run as run_command};
use crate::testbed::{self, Size, Testbed};
use crate::{guest, host, kvm, paths};

const VM: &str = "demo";
const TEMPLATE: &str = "demo";
/// Clones that are started, and those that Army takes from its standbys.
const CLONES: usize = 5;
const STANDBYS: usize = 5;
/// Lines of the guest kernel's own that are shown.
const CONSOLE_LINES: usize = 6;
/// How long the standbys may take.
const STANDBY_LIMIT: Duration = Duration::from_secs(120);
/// In the guest: a process that holds data, and answers with it.
const HOLDER: &str = "import os
data = bytes(range(256)) * 4096 * 100
os.mkfifo('/run/ask'); os.mkfifo('/run/answer')
open('/run/ready', 'w').write('yes')
while True:
    word = open('/run/ask').read().strip()
    open('/run/answer', 'w').write(f'{word}: {len(data) >> 20} MiB in the memory of process {os.getpid()}')
";

pub(crate) fn run(inside: bool) -> Result<ExitCode> {
    if inside {
        return show();
    }
    println!(
        "Sets up a Debian guest and builds the programs, then shows what they do. The first time takes about \
         ten minutes on two processors; later ones start at once."
    );
    host::install_packages()?;
    let verdict = kvm::probe();
    println!("{verdict}");
    // Debian's packages are fetched and unpacked while the programs are built.
    let fetching = guest::Fetching::start(!verdict.runs_stock_guests());
    println!("== building clone and army, and fetching a Debian beside it");
    let build = [
        "build",
        "-p",
        "clone",
        "-p",
        "clone-vm-process",
        "-p",
        "clone-share",
        "-p",
        "army",
    ];
    let bins = [
        "--bin",
        "clone",
        "--bin",
        "clone-vm",
        "--bin",
        "clone-share",
        "--bin",
        "army",
    ];
    run_command(cargo(&build).args(bins))?;
    println!("== making the guest's kernel and disk");
    fetching.wait()?;
    guest::build()?;
    if verdict.runs_stock_guests() {
        return show();
    }
    std::env::set_current_dir(paths::workspace())?;
    let program = std::env::current_exe()?;
    let files = [
        program.clone(),
        paths::debug_binary("clone-share").canonicalize()?,
        paths::debug_binary("clone").canonicalize()?,
        paths::debug_binary("clone-vm").canonicalize()?,
        paths::debug_binary("army").canonicalize()?,
        paths::assets()
            .join("guest-debian/debian.ext4")
            .canonicalize()?,
    ];
    let words: [OsString; 3] = [program.into(), "demo".into(), "--inside".into()];
    let archive = paths::target().canonicalize()?.join("demo.tar");
    let words = testbed::in_memory(&archive, &files, &words)?;
    let testbed = Testbed::find_or_start(&Size::default())?;
    testbed::execute(&testbed, &words)
}

/// The show itself, where guests run.
fn show() -> Result<ExitCode> {
    let mut show = Show::new()?;
    let shown = show.play();
    // Whatever happened, nothing stays behind.
    let ended = show.end();
    shown.and(ended)?;
    let width = show.figures.iter().map(|(what, _)| what.len()).max();
    let width = width.unwrap_or(0);
    println!();
    for (what, figure) in &show.figures {
        println!("{what:<width$} {figure:>12}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything of the show is in a directory of its own.
struct Show {
    dir: PathBuf,
    figures: Vec<(String, String)>,
    army: Option<Child>,
    /// What Army's client is told: the server's address and the key.
    access: [(&'static str, String); 2],
}

impl Show {
    fn new() -> Result<Self> {
        // Not in the target folder, which holds no sockets in the testbed.
        let dir = std::env::temp_dir().join(format!("clone-demo-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self {
            dir,
            figures: Vec::new(),
            army: None,
            access: [("ARMY_URL", String::new()), ("ARMY_KEY", String::new())],
        })
    }

    fn clone(&self, words: &[&str]) -> Command {
        self.command("clone", words)
    }

    fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(paths::debug_binary(program));
        command
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.dir.join("run"))
            .env("CLONE_TEMPLATE_DIR", self.dir.join("templates"))
            .env("ARMY_STATE", self.dir.join("army"))
            .envs(self.access.iter().map(|(name, value)| (name, value)))
            .env_remove("LD_LIBRARY_PATH");
        command
    }

    /// Runs a `clone` command that prints JSON.
    fn json(&self, words: &[&str]) -> Result<Value> {
        json(&mut self.clone(words))
    }

    /// Asks Army's API.
    fn api(&self, words: &[&str]) -> Result<Value> {
        // First: behind `exec` it would be the guest's command's.
        json(&mut self.command("army", &[&["--json"], words].concat()))
    }

    fn time(&mut self, what: impl Into<String>, time: Duration) {
        let figure = format!("{:.1} ms", time.as_secs_f64() * 1e3);
        self.figures.push((what.into(), figure));
    }

    fn play(&mut self) -> Result<()> {
        self.boot()?;
        self.template()?;
        self.cold()?;
        self.live()?;
        self.memory()?;
        self.army()
    }

    fn boot(&mut self) -> Result<()> {
        println!("\n== a stock Debian boots, once");
        let assets = paths::assets();
        let text = |path: &Path| path.display().to_string();
        let kernel = text(&assets.join("guest-kernel/vmlinux"));
        let initrd = text(&assets.join("guest-initramfs/initramfs.cpio"));
        let disk = text(&assets.join("guest-debian/debian.ext4")) + ",overlay=ephemeral";
        let start = Instant::now();
        run_command(&mut self.clone(&[
            "run", "--detach", "--name", VM, "--cpus", "2", "--memory", "512M", "--net", "nat",
            "--kernel", &kernel, "--initrd", &initrd, "--disk", &disk,
        ]))?;
        run_command(&mut self.clone(&["exec", "--wait", "600", VM, "true"]))?;
        self.time("boot: clone run to the first exec's reply", start.elapsed());
        println!("its kernel's first lines:");
        let log = output(&mut self.clone(&["logs", VM]))?;
        for line in log.lines().take(CONSOLE_LINES) {
            println!("  {line}");
        }
        self.guest(
            VM,
            "systemctl is-system-running --wait; udevadm settle --timeout=600; uname -sr",
        )?;
        let start_holder = format!(
            "cat > /root/holder.py <<'END'\n{HOLDER}END\n\
             setsid python3 /root/holder.py </dev/null >/dev/null 2>&1 &\n\
             until [ -s /run/ready ]; do sleep 0.1; done"
        );
        self.guest(VM, &start_holder)
    }

    fn template(&mut self) -> Result<()> {
        println!("\n== it becomes a template, and goes on");
        let taken = self.json(&["snapshot", VM, "-o", TEMPLATE, "--json"])?;
        let pause = taken["times"]["pause_us"].as_u64().unwrap_or_default();
        self.time("snapshot: pause of the guest", Duration::from_micros(pause));
        self.ask(VM)
    }

    fn cold(&mut self) -> Result<()> {
        println!("\n== {CLONES} clones are started from it");
        let count = CLONES.to_string();
        let words = ["fork", TEMPLATE, "-n", "cold", "--count", &count, "--json"];
        self.fork(&words, "fork, started, several at once")?;
        self.ask("cold-1")?;
        self.ask("cold-5")
    }

    /// The same through Army's REST API, from standbys.
    fn army(&mut self) -> Result<()> {
        println!("\n== Army serves the template, and keeps {STANDBYS} standbys ready");
        // Idle machines cost time where they are emulated.
        let started = (1..=CLONES).map(|number| format!("cold-{number}"));
        for name in started.chain(["live".to_owned()]) {
            output(&mut self.clone(&["kill", &name]))?;
        }
        self.start_army()?;
        let standbys = STANDBYS.to_string();
        self.api(&["template", "register", TEMPLATE, "--standbys", &standbys])?;
        self.wait_for_standbys()?;
        println!("a dashboard is at {}", self.access[0].1);
        let (mut running, mut request, mut exec) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..STANDBYS {
            let name = format!("army-{number}");
            let created = self.api(&["vm", "create", TEMPLATE, "--name", &name])?;
            let times = &created["vms"][0]["fork"];
            if times["warm"] != true {
                bail!("{name} was no standby");
            }
            running.push(times["running_us"].as_u64().unwrap_or_default());
            request.push(times["total_us"].as_u64().unwrap_or_default());
            let script = "hostname > /run/ask; cat /run/answer; echo; echo said apart >&2";
            let said = self.api(&["exec", &name, "sh", "-c", script])?;
            exec.push(said["took_us"].as_u64().unwrap_or_default());
            println!("{}", said["stdout"].as_str().unwrap_or_default().trim());
            if said["exit_code"] != 0 || said["stderr"] != "said apart\n" {
                bail!("{name} answered {said}");
            }
        }
        self.spread("Army, from standbys: request to running", running);
        self.spread(
            "Army, from standbys: request to answer, with identity",
            request,
        );
        self.spread("Army: exec, request to answer", exec);
        for number in 0..STANDBYS {
            let name = format!("army-{number}");
            output(&mut self.command("army", &["vm", "rm", &name]))?;
        }
        self.stop_army()
    }

    fn start_army(&mut self) -> Result<()> {
        let mut army = self.command("army", &["dev", "--listen", "127.0.0.1:0"]);
        let mut army = army.stdout(Stdio::piped()).spawn()?;
        let stdout = army.stdout.take().context("army has no output")?;
        self.army = Some(army);
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            if let Some((_, key)) = line.split_once("ARMY_KEY=") {
                self.access[1].1 = key.trim().to_owned();
            }
            if let Some(rest) = line.strip_prefix("Army answers at ") {
                self.access[0].1 = rest.split(';').next().unwrap_or_default().to_owned();
                return Ok(());
            }
        }
        bail!("army dev did not start")
    }

    fn live(&mut self) -> Result<()> {
        println!("\n== the running VM is forked; both go on");
        let words = ["fork", "--from", VM, "-n", "live", "--json"];
        let forked = self.json(&words)?;
        let pause = forked["snapshot"]["pause_us"].as_u64().unwrap_or_default();
        self.time("live fork: pause of the VM", Duration::from_micros(pause));
        self.ask(VM)?;
        self.ask("live")
    }

    fn memory(&mut self) -> Result<()> {
        let vms = self.json(&["ls", "--json"])?;
        let vms = vms.as_array().context("clone ls printed no list")?;
        let clones = vms.iter().filter(|vm| vm["name"] != VM);
        let own = |vm: &Value| {
            let bytes = |field: &str| vm[field].as_u64().unwrap_or_default();
            bytes("private_bytes") + bytes("swapped_bytes")
        };
        let mut private: Vec<u64> = clones.map(own).collect();
        let clones = private.len() as u64;
        let sum: u64 = private.iter().sum();
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1_048_576.0);
        private.sort_unstable();
        let median = private.get(private.len() / 2).copied().unwrap_or_default();
        self.figures.push((
            "memory of a clone's own, of 512 MiB (median)".into(),
            mib(median),
        ));
        self.figures.push((
            format!(
                "memory of all {clones} clones' own, of {}",
                mib(clones * (512 << 20))
            ),
            mib(sum),
        ));
        Ok(())
    }

    fn fork(&mut self, words: &[&str], what: &str) -> Result<()> {
        let start = Instant::now();
        let forked = self.json(words)?;
        self.time(
            format!("{what}: all {CLONES} with their identity"),
            start.elapsed(),
        );
        let clones = forked["clones"].as_array().context("no clones")?;
        let running = clones.iter().map(|clone| clone["running_us"].as_u64());
        self.spread(
            &format!("{what}: request to running"),
            running.map(Option::unwrap_or_default).collect(),
        );
        Ok(())
    }

    /// The median and the worst.
    fn spread(&mut self, what: &str, mut micros: Vec<u64>) {
        micros.sort_unstable();
        let median = micros.get(micros.len() / 2).copied().unwrap_or_default();
        let worst = micros.last().copied().unwrap_or_default();
        self.time(format!("{what} (median)"), Duration::from_micros(median));
        self.time(format!("{what} (worst)"), Duration::from_micros(worst));
    }

    fn guest(&self, vm: &str, script: &str) -> Result<()> {
        run_command(&mut self.clone(&["exec", vm, "sh", "-c", script]))
    }

    /// Shows that a guest still has what its template had in memory, and who it is.
    fn ask(&self, vm: &str) -> Result<()> {
        self.guest(
            vm,
            "hostname > /run/ask; cat /run/answer; \
             echo \", address $(hostname -I | tr -d ' '), random $(od -An -N4 -tx4 /dev/urandom)\"",
        )
    }

    fn wait_for_standbys(&self) -> Result<()> {
        let waited = Instant::now();
        loop {
            let entries = fs::read_dir(self.dir.join("run/vms"))?;
            let ready = entries.filter_map(Result::ok).filter(|entry| {
                let name = entry.file_name();
                name.as_encoded_bytes().starts_with(b".standby-")
                    && entry.path().join("parent.json").exists()
            });
            if ready.count() >= STANDBYS {
                return Ok(());
            }
            if waited.elapsed() > STANDBY_LIMIT {
                bail!("the standbys did not come in {STANDBY_LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop_army(&mut self) -> Result<()> {
        if let Some(mut army) = self.army.take() {
            run_command(Command::new("kill").arg(army.id().to_string()))?;
            army.wait()?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        self.stop_army()?;
        for name in output(&mut self.clone(&["ls", "--quiet"]))?.lines() {
            run_command(&mut self.clone(&["kill", name]))?;
        }
        fs::remove_dir_all(&self.dir)?;
        Ok(())
    }
}

/// Runs a command that prints JSON.
fn json(command: &mut Command) -> Result<Value> {
    let output = command.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{command:?} failed: {}\n{text}", output.status);
    }
    serde_json::from_str(&text).with_context(|| format!("{command:?} printed no JSON"))
}
