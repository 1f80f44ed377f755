//! Applies a new identity: host name, machine id, randomness, clock, network, keys.
//!
//! The kernel reseeds its random numbers after a fork by itself (VMGENID); this module does the
//! parts that need user space.
//!
//! The steps are independent. One that fails is reported as a notice, and the next step follows.
//! Only a failure that would leave two guests with the same secret or address ends the whole
//! operation.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use agent_proto::messages::Identity;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::conversation::Refusal;
use crate::replace::{Replaced, replace};
use crate::report::Report;
use crate::{hosts, interfaces, machine_id, process, ssh};

/// Where an SSH server keeps its keys.
const SSH_FOLDER: &str = "/etc/ssh";
/// Programs that are run, in order of name, after an identity was set.
const HOOKS: &str = "/etc/clone/identity.d";
/// The time limit for all of these programs, since the fork waits for them.
const HOOKS_LIMIT: Duration = Duration::from_secs(60);
/// What systemd, Debian's and Buildroot's inits give the kernel at the next boot.
const SEED_FILES: [&str; 3] = [
    "/var/lib/systemd/random-seed",
    "/var/lib/urandom/random-seed",
    "/var/lib/misc/random-seed",
];
const SEED_BYTES: usize = 512;

/// Applies the fields that are set in `identity`. Returns notices about the steps that failed.
///
/// # Errors
/// The guest would share a secret or an address with another.
pub(crate) fn apply(identity: &Identity) -> Result<Vec<String>, Refusal> {
    let mut report = Report::default();
    if identity.clock_ns > 0 {
        report.take(set_clock(identity.clock_ns));
    }
    if !identity.seed.is_empty() {
        add_randomness(&identity.seed).map_err(|error| {
            let what = "two guests would draw the same random numbers: \
                        cannot add to the kernel's randomness";
            Refusal::io(what, &error)
        })?;
        renew_seed_files(&mut report);
    }
    if !identity.machine_id.is_empty() {
        machine_id::set(&identity.machine_id, &mut report)?;
    }
    if !identity.hostname.is_empty() {
        set_hostname(&identity.hostname, &mut report);
    }
    set_network(identity, &mut report)?;
    if identity.new_ssh_host_keys {
        ssh::renew_host_keys(Path::new(SSH_FOLDER), &mut report)?;
    }
    // A VM that was resumed is the same one: only its clock is set, and its network where that is new.
    if !identity.seed.is_empty() || !identity.machine_id.is_empty() || !identity.hostname.is_empty()
    {
        run_hooks(Path::new(HOOKS), HOOKS_LIMIT, &mut report);
    }
    Ok(report.into_notices())
}

/// Applies only the part of `identity` that is about the network.
fn set_network(identity: &Identity, report: &mut Report) -> Result<(), Refusal> {
    for (index, interface) in identity.interfaces.iter().enumerate() {
        let Some(name) = interfaces::name_of(index, interface) else {
            // The guest has no address that another one could share.
            report.add(format!("the guest has no Ethernet interface {index}"));
            continue;
        };
        interfaces::set_addresses(&name, interface)?;
        report.take(interfaces::bring_up(&name, interface));
    }
    set_name_servers(&identity.dns, report);
    Ok(())
}

/// Sets up the network that a guest is given at its boot. False where an interface is missing yet.
pub(crate) fn boot_network(identity: &Identity) -> bool {
    let mut interfaces = identity.interfaces.iter().enumerate();
    if interfaces.any(|(index, it)| interfaces::name_of(index, it).is_none()) {
        return false;
    }
    let mut report = Report::default();
    let set = set_network(identity, &mut report);
    report.take(set);
    for notice in report.into_notices() {
        crate::say(&format!("network: {notice}"));
    }
    true
}

fn set_name_servers(servers: &[String], report: &mut Report) {
    if servers.is_empty() {
        return;
    }
    let line = |server: &String| format!("nameserver {server}\n");
    let lines: String = servers.iter().map(line).collect();
    report.replace("/etc/resolv.conf", lines.as_bytes());
}

/// Credits the seed and has the generator take it up at once: what is merely written to
/// `/dev/urandom` counts only at its next reseeding, and siblings would draw the same until then.
fn add_randomness(seed: &[u8]) -> io::Result<()> {
    // random(4): _IOW('R', 3, int [2]) and _IO('R', 7).
    const ADD_ENTROPY: libc::Ioctl = 0x4008_5203;
    const RESEED: libc::Ioctl = 0x5207;
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    for piece in seed.chunks(64) {
        // A struct rand_pool_info: bits, bytes, then the bytes themselves in whole words.
        let mut request = [0_u32; 18];
        request[0] = piece.len() as u32 * 8;
        request[1] = piece.len() as u32;
        for (word, bytes) in request[2..].iter_mut().zip(piece.chunks(4)) {
            let mut whole = [0; 4];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u32::from_ne_bytes(whole);
        }
        // SAFETY: the request is a live value, and holds as many bytes as it says.
        if unsafe { libc::ioctl(device.as_raw_fd(), ADD_ENTROPY, request.as_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the code takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RESEED) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_clock(clock_ns: u64) -> Result<(), Refusal> {
    let time = Timespec {
        tv_sec: (clock_ns / 1_000_000_000) as i64,
        tv_nsec: (clock_ns % 1_000_000_000) as i64,
    };
    clock_settime(ClockId::Realtime, time)
        .map_err(|error| Refusal::io("cannot set the clock", &error.into()))
}

/// Replaces the seeds for this guest's next boot, which its template's other clones have too.
fn renew_seed_files(report: &mut Report) {
    for path in SEED_FILES
        .map(Path::new)
        .into_iter()
        .filter(|it| it.is_file())
    {
        match renew_seed(path) {
            Ok(how) => report.replaced(path, how),
            Err(error) => report.add(format!("cannot write {}: {error}", path.display())),
        }
    }
}

/// Writes a new seed over the old one. Half of a seed is a seed, so the file need not be replaced
/// as a whole, which would make the file system write to its disk at once.
fn renew_seed(path: &Path) -> io::Result<Replaced> {
    let mut seed = [0; SEED_BYTES];
    clone_base::random::fill(&mut seed)?;
    let written = OpenOptions::new().write(true).open(path).and_then(|file| {
        file.write_all_at(&seed, 0)?;
        file.set_len(SEED_BYTES as u64)
    });
    match written {
        Ok(()) => Ok(Replaced::InPlace),
        // A read-only disk.
        Err(_) => replace(path, &seed, 0o600),
    }
}

/// Whether the kernel and all programs take `name` for a host name.
pub(crate) fn is_hostname(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
}

fn set_hostname(name: &str, report: &mut Report) {
    if !is_hostname(name) {
        return report.add(format!("{name:?} is not a host name"));
    }
    let former = rustix::system::uname();
    let former = former.nodename().to_string_lossy().into_owned();
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        return report.add(format!("cannot set the host name: {error}"));
    }
    report.replace("/etc/hostname", format!("{name}\n").as_bytes());
    resolve_own_name(&former, name, report);
}

/// Adds the guest's own name to `/etc/hosts`.
pub(crate) fn resolve_own_name(former: &str, name: &str, report: &mut Report) {
    let known = match fs::read(hosts::FILE) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => hosts::LOOPBACK.to_owned(),
        Err(error) => return report.add(format!("cannot read {}: {error}", hosts::FILE)),
    };
    if let Some(text) = hosts::renamed(&known, former, name) {
        report.replace(hosts::FILE, text.as_bytes());
    }
}

fn run_hooks(folder: &Path, limit: Duration, report: &mut Report) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut hooks: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    hooks.sort();
    let deadline = Instant::now() + limit;
    for (index, hook) in hooks.iter().enumerate() {
        // A program that hangs must leave time to those after it.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (hooks.len() - index) as u32;
        let ended = process::run_within(&mut Command::new(hook), share);
        match ended {
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => report.add(format!("{} failed: {status}", hook.display())),
            Ok(None) => report.add(format!("{} took too long and was ended", hook.display())),
            Err(error) => report.add(format!("cannot run {}: {error}", hook.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_name_that_is_none_changes_nothing_and_is_reported() {
        for name in ["a b", "x;reboot", &"n".repeat(65)] {
            let mut report = Report::default();
            set_hostname(name, &mut report);
            assert_eq!(report.into_notices().len(), 1, "{name}");
        }
    }

    #[test]
    fn nothing_of_an_old_seed_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("random-seed");
        for len in [32, SEED_BYTES, 4096] {
            fs::write(&path, vec![7; len]).unwrap();
            assert!(matches!(renew_seed(&path), Ok(Replaced::InPlace)));
            let seed = fs::read(&path).unwrap();
            assert_eq!(seed.len(), SEED_BYTES);
            let same = seed.iter().filter(|byte| **byte == 7).count();
            assert!(same < 32, "{same} of {SEED_BYTES} bytes are as before");
        }
    }

    #[test]
    fn hooks_run_in_order_and_each_whatever_the_others_do() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let hooks = folder.path().join("hooks");
        fs::create_dir(&hooks).unwrap();
        for (name, script) in [
            ("1-fails", "exit 3"),
            ("2-hangs", "sleep 100"),
            ("3-works", "echo done >> \"$(dirname \"$0\")/../out\""),
        ] {
            let hook = hooks.join(name);
            fs::write(&hook, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(hooks.join("0-no-program"), "").unwrap();
        let mut report = Report::default();
        run_hooks(&hooks, Duration::from_millis(500), &mut report);
        let notices = report.into_notices();
        assert_eq!(notices.len(), 3, "{notices:?}");
        assert!(
            notices[1].contains("1-fails failed: exit status: 3"),
            "{notices:?}"
        );
        assert!(notices[2].contains("2-hangs took too long"), "{notices:?}");
        assert_eq!(fs::read_to_string(out).unwrap(), "done\n");
    }
}
