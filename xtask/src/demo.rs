//! The main job, shown from nothing, with its times. Today: a stock Debian kernel boots with every
//! device, runs commands, and ends, on hardware KVM or in the testbed.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::process::{cargo, output, run as run_command};
use crate::testbed::{self, Size, Testbed};
use crate::{guest, host, kvm, paths};

const VM: &str = "demo";
/// Lines of the guest kernel's own that are shown.
const CONSOLE_LINES: usize = 8;
/// Commands that are run to find the time of one.
const EXECS: usize = 11;

pub(crate) fn run(inside: bool) -> Result<ExitCode> {
    if inside {
        return show();
    }
    host::setup()?;
    guest::build()?;
    println!("building clone");
    run_command(&mut cargo(&["build", "--quiet", "-p", "clone"]))?;
    let verdict = kvm::probe();
    println!("{verdict}");
    if verdict.runs_stock_guests() {
        return show();
    }
    std::env::set_current_dir(paths::workspace())?;
    let testbed = Testbed::find_or_start(&Size::default())?;
    let words: [OsString; 3] = [
        std::env::current_exe()?.into(),
        "demo".into(),
        "--inside".into(),
    ];
    testbed::execute(&testbed, &words)
}

/// The show itself, where guests run.
fn show() -> Result<ExitCode> {
    let assets = paths::assets();
    let kernel = assets.join("guest-kernel/vmlinux");
    let initramfs = assets.join("guest-initramfs/initramfs.cpio");
    let mut times = Vec::new();
    let start = Instant::now();
    let mut boot = clone(&[
        "run", "--detach", "--name", VM, "--cpus", "2", "--memory", "256M",
    ]);
    boot.args(["--net", "nat", "--kernel"])
        .arg(kernel)
        .arg("--initrd")
        .arg(initramfs);
    run_command(&mut boot).context("cannot start the guest")?;
    times.push(("clone run returns (the guest runs)", start.elapsed()));
    let shown = show_guest(start, &mut times);
    // Whatever happened, nothing stays behind.
    let stop = Instant::now();
    let stopped = run_command(&mut clone(&["stop", VM]));
    times.push(("clone stop", stop.elapsed()));
    shown.and(stopped)?;
    println!("\n{:<40} {:>10}", "what", "time");
    for (what, time) in times {
        println!("{what:<40} {:>7.1} ms", time.as_secs_f64() * 1e3);
    }
    Ok(ExitCode::SUCCESS)
}

fn show_guest(start: Instant, times: &mut Vec<(&'static str, Duration)>) -> Result<()> {
    run_command(&mut clone(&["exec", "--wait", "120", VM, "true"]))?;
    times.push(("from the start to the first exec's reply", start.elapsed()));
    println!("\nThe guest kernel's first lines:");
    for line in output(&mut clone(&["logs", VM]))?
        .lines()
        .take(CONSOLE_LINES)
    {
        println!("  {line}");
    }
    println!("\nclone exec {VM} uname -a; nproc; free -m:");
    run_command(&mut clone(&[
        "exec",
        VM,
        "sh",
        "-c",
        "uname -a; nproc; free -m",
    ]))?;
    let mut execs = Vec::new();
    for _ in 0..EXECS {
        let start = Instant::now();
        run_command(&mut clone(&["exec", VM, "true"]))?;
        execs.push(start.elapsed());
    }
    execs.sort();
    times.push(("clone exec VM true (median of 11)", execs[EXECS / 2]));
    Ok(())
}

fn clone(words: &[&str]) -> Command {
    let mut command = Command::new(paths::debug_binary("clone"));
    command.args(words);
    command
}
