//! The main job, shown from nothing. Today: a stock kernel boots under the machine, in the testbed
//! or on hardware KVM.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::process::{cargo, run as run_command};
use crate::testbed::{self, Size, Testbed};
use crate::{guest, host, kvm, paths};

pub(crate) fn run() -> Result<ExitCode> {
    host::setup()?;
    let assets = guest::build()?;
    println!("building the machine");
    run_command(&mut cargo(&[
        "build",
        "--quiet",
        "-p",
        "clone-vmm",
        "--example",
        "boot",
    ]))?;
    let boot = paths::debug_binary("examples/boot");
    let words: Vec<OsString> = vec![
        boot.into(),
        assets.vmlinux.into(),
        assets.initramfs.into(),
        "guest.poweroff".into(),
    ];
    let verdict = kvm::probe();
    println!("{verdict}");
    if verdict.runs_stock_guests() {
        let status = Command::new(&words[0])
            .args(&words[1..])
            .status()
            .context("cannot boot")?;
        return Ok(ExitCode::from(status.code().unwrap_or(1) as u8));
    }
    let testbed = Testbed::find_or_start(&Size::default())?;
    testbed::execute(&testbed, &words)
}
