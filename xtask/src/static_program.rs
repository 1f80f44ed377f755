//! Programs that need no library of the machine they run on: those that run in guests, and a VM's
//! process, which is started in half the time where nothing has to be linked first.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::paths;
use crate::process::{cargo, run as run_command};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the program of `package`, small, for any guest, and returns where it is.
pub(crate) fn for_guests(package: &str) -> Result<PathBuf> {
    build(package, package, "agent")
}

/// Builds `clone-vm` with a profile, and returns where it is.
pub(crate) fn vm_process(profile: &str) -> Result<PathBuf> {
    build("clone-vm-process", "clone-vm", profile)
}

/// Builds `clone-share` with a profile, and returns where it is.
pub(crate) fn share_server(profile: &str) -> Result<PathBuf> {
    build("clone-share", "clone-share", profile)
}

fn build(package: &str, program: &str, profile: &str) -> Result<PathBuf> {
    let mut build = cargo(&["build", "--quiet", "--profile", profile]);
    build.args(["-p", package, "--bin", program, "--target", TARGET]);
    // With an explicit target the flags do not hit build scripts and procedural macros. Work trees
    // that share their assets should make the same agent of the same source.
    let flags = format!(
        "-C target-feature=+crt-static --remap-path-prefix={}=.",
        paths::workspace().display()
    );
    run_command(build.env("RUSTFLAGS", flags))
        .with_context(|| format!("cannot build a static {program}"))?;
    Ok(paths::target().join(TARGET).join(profile).join(program))
}
