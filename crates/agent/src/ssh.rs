//! SSH host keys of one's own: with those of its template, every clone could pose as every other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent_proto::messages::ErrorCode;
use rustix::process::{Pid, Signal, kill_process};

use crate::session::Refusal;

/// Where a running server leaves its number.
const PID_FILE: &str = "/run/sshd.pid";

/// Makes new keys of the kinds that `folder` has (`ssh_host_KIND_key`), and tells the server. A key
/// is replaced only when its successor is there.
pub(crate) fn renew_host_keys(folder: &Path) -> Result<(), Refusal> {
    let kinds = match kinds(folder) {
        Ok(kinds) => kinds,
        // No SSH server.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            let what = format!("cannot read {}", folder.display());
            return Err(Refusal::io(what, &error));
        }
    };
    for kind in &kinds {
        renew(folder, kind)?;
    }
    if !kinds.is_empty() {
        tell_server();
    }
    Ok(())
}

fn kinds(folder: &Path) -> io::Result<Vec<String>> {
    let mut kinds = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let kind = name
            .to_str()
            .and_then(|name| name.strip_prefix("ssh_host_")?.strip_suffix("_key"));
        kinds.extend(kind.map(str::to_owned));
    }
    kinds.sort();
    Ok(kinds)
}

fn renew(folder: &Path, kind: &str) -> Result<(), Refusal> {
    let key = folder.join(format!("ssh_host_{kind}_key"));
    let fresh = folder.join(format!(".ssh_host_{kind}_key.new"));
    let failed = |error: &io::Error| Refusal::io(format!("cannot renew {}", key.display()), error);
    for leftover in [&fresh, &public(&fresh)] {
        match fs::remove_file(leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&error)),
            _ => {}
        }
    }
    let output = Command::new("ssh-keygen")
        .args(["-q", "-t", kind, "-N", "", "-f"])
        .arg(&fresh)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Refusal::io("cannot run ssh-keygen", &error))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let message = format!("cannot renew {}: {}", key.display(), complaint.trim());
        return Err(Refusal::new(ErrorCode::Other, message));
    }
    fs::rename(public(&fresh), public(&key))
        .and_then(|()| fs::rename(&fresh, &key))
        .map_err(|error| failed(&error))
}

fn public(key: &Path) -> PathBuf {
    key.with_added_extension("pub")
}

/// A server reads its keys when it starts, and at SIGHUP.
fn tell_server() {
    let pid = fs::read_to_string(PID_FILE).ok();
    let pid = pid.and_then(|text| Pid::from_raw(text.trim().parse().ok()?));
    if let Some(pid) = pid
        // A stale file must not hit somebody else.
        && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sshd")
        && let Err(error) = kill_process(pid, Signal::HUP)
    {
        crate::say(&format!(
            "cannot tell the SSH server of its new keys: {error}"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_keys_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "ssh_host_rsa_key",
            "ssh_host_rsa_key.pub",
            "ssh_host_ed25519_key",
            "ssh_config",
            "ssh_host_key",
        ] {
            fs::write(folder.path().join(name), "old").unwrap();
        }
        assert_eq!(kinds(folder.path()).unwrap(), ["ed25519", "rsa"]);
    }

    #[test]
    fn a_guest_without_a_server_needs_no_keys() {
        assert!(renew_host_keys(Path::new("/no/such/folder")).is_ok());
        assert!(renew_host_keys(tempfile::tempdir().unwrap().path()).is_ok());
    }

    #[test]
    fn keys_are_replaced_by_others_of_their_kind() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("ssh_host_ed25519_key");
        fs::write(&key, "old").unwrap();
        renew_host_keys(folder.path()).unwrap();
        let first = fs::read_to_string(public(&key)).unwrap();
        assert!(first.starts_with("ssh-ed25519 "), "{first}");
        renew_host_keys(folder.path()).unwrap();
        assert_ne!(fs::read_to_string(public(&key)).unwrap(), first);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_kind_that_cannot_be_made_leaves_its_old_key() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("ssh_host_nonsense_key");
        fs::write(&key, "old").unwrap();
        let refusal = renew_host_keys(folder.path()).unwrap_err();
        assert!(!refusal.message.is_empty());
        assert_eq!(fs::read_to_string(key).unwrap(), "old");
    }
}
