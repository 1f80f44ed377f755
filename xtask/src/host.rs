//! What the host must have installed, and how it gets there.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, is_installed, run};

/// A program that chores start, the Debian package that has it, and what it is for.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("cc", "gcc", "links Rust programs"),
    (
        "mmdebstrap",
        "mmdebstrap",
        "unpacks QEMU, kernels and guest file systems from Debian",
    ),
    ("mount", "mount", "lays out the guests' file systems"),
    ("kill", "procps", "ends processes in tests"),
    ("mke2fs", "e2fsprogs", "makes the guests' disk images"),
    ("xz", "xz-utils", "unpacks kernel modules"),
    ("ip", "iproute2", "sets up test networks"),
    ("nft", "nftables", "sets up the guests' address translation"),
];

/// What only tests start.
const TEST_PROGRAMS: &[(&str, &str, &str)] = &[
    (
        "pg_ctlcluster",
        "postgresql",
        "keeps what Army remembers, in tests",
    ),
    (
        "qemu-img",
        "qemu-utils",
        "checks our qcow2 images against QEMU's",
    ),
    ("chromium", "chromium", "looks at the dashboard"),
    ("curl", "curl", "asks Army's API as the book shows it"),
    ("python3", "python3", "runs the examples"),
    (
        "ssh-keygen",
        "openssh-client",
        "makes the keys that clones get anew",
    ),
    ("chromedriver", "chromium-driver", "clicks on it"),
];

/// Packages without a program of their own: a file that tells, the package, what it is for.
const FILES: &[(&str, &str, &str)] = &[
    (
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
        "checks Debian's signatures",
    ),
    (
        "/usr/lib/x86_64-linux-gnu/libc.a",
        "libc6-dev",
        "links the static guest agent",
    ),
];

/// A cargo tool and the version that the project is developed with.
const CARGO_TOOLS: &[(&str, &str)] = &[("cargo-nextest", "0.9.143"), ("cargo-deny", "0.20.2")];

/// Memory that programs can have now, in MiB (`MemAvailable` of `/proc/meminfo`).
pub(crate) fn available_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? >> 10)
}

/// Installs what tests need and is missing, saying what and why.
pub(crate) fn setup() -> Result<()> {
    install(&[PROGRAMS, TEST_PROGRAMS])?;
    for (tool, version) in CARGO_TOOLS {
        if !is_installed(tool) {
            println!("installing {tool} {version} with cargo (some minutes, once)");
            // Not optimised: it takes half the time, and they only start what takes the rest.
            let mut install = cargo(&["install", "--locked", "--quiet", "--debug"]);
            install.args([tool, "--version", version]);
            run(install.env("CARGO_PROFILE_DEV_DEBUG", "0"))?;
        }
    }
    Ok(())
}

/// What only those who are not root need.
const USER_PROGRAMS: &[(&str, &str, &str)] = &[(
    "newuidmap",
    "uidmap",
    "lets mmdebstrap make file systems without root's rights",
)];

/// Installs what everything but tests needs and is missing.
pub(crate) fn install_packages() -> Result<()> {
    install(&[PROGRAMS])
}

/// Installs missing system packages with apt.
fn install(programs: &[&'static [(&str, &str, &str)]]) -> Result<()> {
    let is_root = rustix::process::geteuid().is_root();
    let user_programs = if is_root { &[] } else { USER_PROGRAMS };
    let programs = programs
        .iter()
        .copied()
        .flatten()
        .chain(user_programs)
        .filter(|(program, ..)| !is_installed(program));
    let files = FILES
        .iter()
        .filter(|(path, ..)| !std::path::Path::new(path).exists());
    let missing: Vec<_> = programs.chain(files).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing with apt:");
    for (_, package, why) in &missing {
        println!("  {package}: {why}");
    }
    if !is_installed("apt-get") {
        let names: Vec<_> = missing.iter().map(|(_, package, _)| *package).collect();
        bail!(
            "this machine has no apt; install these by hand: {}",
            names.join(" ")
        );
    }
    run(apt().args(["-qq", "update"])).context("cannot refresh the package lists")?;
    let mut install = apt();
    install.args(["-qq", "-y", "--no-install-recommends", "install"]);
    install.args(missing.iter().map(|(_, package, _)| package));
    run(&mut install).context("cannot install packages")
}

/// `apt-get`, through `sudo` where we are not root.
fn apt() -> Command {
    let mut apt = if rustix::process::geteuid().is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        sudo
    };
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}
