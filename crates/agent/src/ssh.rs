//! Makes new SSH host keys. With the template's keys, every clone could pose as every other.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent_proto::messages::ErrorCode;
use rustix::process::{Pid, Signal, kill_process};

use crate::conversation::Refusal;
use crate::replace::replace;
use crate::report::Report;

/// The file with the process id of a running server.
const PID_FILE: &str = "/run/sshd.pid";
/// The directory in which keys are made. It is in memory, so a full disk does not matter.
const WORKSHOP: &str = "/run/clone/keys";

/// Makes new keys of the kinds that `folder` has (`ssh_host_KIND_key`), and notifies the server. A
/// key for which no new one can be made is removed and reported.
///
/// # Errors
/// An old key could not be removed, which the template's other clones have too.
pub(crate) fn renew_host_keys(folder: &Path, report: &mut Report) -> Result<(), Refusal> {
    let keys = match host_keys(folder) {
        Ok(keys) => keys,
        // The guest has no SSH server.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            let what = format!("cannot read {}", folder.display());
            return Err(Refusal::io(what, &error));
        }
    };
    for key in &keys {
        renew(key, report)?;
    }
    if !keys.is_empty() {
        tell_server(report);
    }
    Ok(())
}

fn host_keys(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut keys = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        keys.extend(kind_by_name(&path).is_some().then_some(path));
    }
    keys.sort();
    Ok(keys)
}

fn kind_by_name(key: &Path) -> Option<&str> {
    let name = key.file_name()?.to_str()?;
    name.strip_prefix("ssh_host_")?.strip_suffix("_key")
}

/// What `ssh-keygen` calls a key's kind: by its public part, else by its name.
fn kind_of(key: &Path) -> String {
    let public = fs::read_to_string(public(key)).unwrap_or_default();
    let known = match public.split_whitespace().next().unwrap_or_default() {
        "ssh-rsa" => Some("rsa"),
        "ssh-ed25519" => Some("ed25519"),
        algorithm if algorithm.starts_with("ecdsa-sha2-") => Some("ecdsa"),
        _ => kind_by_name(key),
    };
    known.unwrap_or_default().to_owned()
}

/// Replaces a key, or removes it.
fn renew(key: &Path, report: &mut Report) -> Result<(), Refusal> {
    let name = key.display();
    let why = match make(key) {
        Ok(fresh) => match put_in_place(key, &fresh, report) {
            Ok(()) => return Ok(()),
            Err(error) => error.to_string(),
        },
        Err(refusal) => refusal.message,
    };
    take_away(key).map_err(|error| {
        let what = format!("two guests would have one SSH host key: {name}: {why}; and");
        Refusal::io(what, &error)
    })?;
    report.add(format!(
        "{name} was taken away, because no new one could be made: {why}"
    ));
    Ok(())
}

/// A key, and its public part.
struct Pair {
    private: Vec<u8>,
    public: Vec<u8>,
}

fn put_in_place(key: &Path, fresh: &Pair, report: &mut Report) -> io::Result<()> {
    for (path, bytes, mode) in [
        (public(key), &fresh.public, 0o644),
        (key.to_owned(), &fresh.private, 0o600),
    ] {
        let how = replace(&path, bytes, mode)?;
        report.replaced(&path, how);
    }
    Ok(())
}

/// Removes a key; if that is impossible, empties it.
fn take_away(key: &Path) -> io::Result<()> {
    // A read-only disk refuses to remove even what is not there.
    let there = |path: &PathBuf| fs::symlink_metadata(path).is_ok();
    for path in [key.to_owned(), public(key)].into_iter().filter(there) {
        if fs::remove_file(&path).is_err() {
            replace(&path, b"", 0o600)?;
        }
    }
    Ok(())
}

/// Makes a key of the kind that `key` is.
fn make(key: &Path) -> Result<Pair, Refusal> {
    let made = Path::new(WORKSHOP).join("key");
    let pair = workshop()
        .map_err(|error| Refusal::io(format!("cannot make {WORKSHOP}"), &error))
        .and_then(|()| keygen(&kind_of(key), &made))
        .and_then(|()| {
            let read = |path| fs::read(path).map_err(|error| Refusal::io("cannot read it", &error));
            Ok(Pair {
                private: read(made.clone())?,
                public: read(public(&made))?,
            })
        });
    // It may not be there, and is in memory.
    let _ = fs::remove_dir_all(WORKSHOP);
    pair
}

/// An empty folder of root's.
fn workshop() -> io::Result<()> {
    let _ = fs::remove_dir_all(WORKSHOP);
    let parent = Path::new(WORKSHOP).parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    fs::DirBuilder::new().mode(0o700).create(WORKSHOP)
}

fn keygen(kind: &str, path: &Path) -> Result<(), Refusal> {
    let output = Command::new("ssh-keygen")
        .args(["-q", "-t", kind, "-N", "", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Refusal::io("cannot run ssh-keygen", &error))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: Vec<_> = complaint.split_whitespace().collect();
    Err(Refusal::new(ErrorCode::Other, complaint.join(" ")))
}

fn public(key: &Path) -> PathBuf {
    key.with_added_extension("pub")
}

/// A server reads its keys when it starts, and at SIGHUP.
fn tell_server(report: &mut Report) {
    let pid = fs::read_to_string(PID_FILE).ok();
    let pid = pid.and_then(|text| Pid::from_raw(text.trim().parse().ok()?));
    if let Some(pid) = pid
        // A stale file must not make us signal another process.
        && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sshd")
        && let Err(error) = kill_process(pid, Signal::HUP)
    {
        report.add(format!(
            "the SSH server has its old keys until it is restarted: {error}"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(folder: &Path) -> Vec<String> {
        let keys = host_keys(folder).unwrap();
        keys.iter().map(|key| kind_of(key)).collect()
    }

    #[test]
    fn only_host_keys_are_found_and_their_kind_is_that_of_their_public_part() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("ssh_host_rsa_key", ""),
            ("ssh_host_rsa_key.pub", "ssh-rsa AAAA"),
            ("ssh_host_ed25519_key", ""),
            ("ssh_host_p384_key", ""),
            ("ssh_host_p384_key.pub", "ecdsa-sha2-nistp384 AAAA root@x"),
            ("ssh_config", ""),
            ("ssh_host_key", ""),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(keys(folder.path()), ["ed25519", "ecdsa", "rsa"]);
    }

    #[test]
    fn a_guest_without_a_server_needs_no_keys() {
        let renew = |folder: &Path| renew_host_keys(folder, &mut Report::default());
        assert!(renew(Path::new("/no/such/folder")).is_ok());
        assert!(renew(tempfile::tempdir().unwrap().path()).is_ok());
    }
}
