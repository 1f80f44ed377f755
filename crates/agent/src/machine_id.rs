//! The machine id, and the journal, which its readers look for by that id.
//!
//! journald reads the id when it starts, and continues to write to the same directory. Without a
//! link from the new id to that directory, `journalctl` in a clone would find no journal.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::Path;

use agent_proto::messages::ErrorCode;

use crate::conversation::Refusal;
use crate::replace::replace;
use crate::report::Report;

/// machine-id(5), and where D-Bus keeps its copy, unless that is a link to the first.
const FILES: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];
/// systemd-journald.service(8): volatile and kept journals, in a folder for each machine.
const JOURNALS: [&str; 2] = ["/run/log/journal", "/var/log/journal"];

/// Sets the machine id, which has 32 hexadecimal digits.
///
/// # Errors
/// The machine keeps its template's id, which other clones have too.
pub(crate) fn set(id: &str, report: &mut Report) -> Result<(), Refusal> {
    if !is_id(id) {
        let message = format!("{id:?} is not a machine id of 32 hexadecimal digits");
        return Err(Refusal::new(ErrorCode::Invalid, message));
    }
    let [first, copy] = FILES.map(Path::new);
    let former = fs::read_to_string(first).unwrap_or_default();
    write(first, id, report)?;
    if fs::symlink_metadata(copy).is_ok_and(|it| it.is_file()) {
        write(copy, id, report)?;
    }
    for folder in JOURNALS {
        if let Err(error) = keep_journal(Path::new(folder), former.trim(), id) {
            // The clone has its identity nevertheless, and its journal can be found by path.
            report.add(format!("cannot keep the journal in {folder}: {error}"));
        }
    }
    Ok(())
}

fn write(path: &Path, id: &str, report: &mut Report) -> Result<(), Refusal> {
    match replace(path, format!("{id}\n").as_bytes(), 0o444) {
        Ok(how) => report.replaced(path, how),
        Err(error) => {
            let file = path.display();
            if fs::read_to_string(path).is_ok_and(|text| is_id(text.trim())) {
                let what = format!("two guests would have one machine id: cannot write {file}");
                return Err(Refusal::io(what, &error));
            }
            report.add(format!("cannot write {file}: {error}"));
        }
    }
    Ok(())
}

fn is_id(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Links the journal of the machine id `former` as that of `id`.
fn keep_journal(folder: &Path, former: &str, id: &str) -> io::Result<()> {
    let kept = folder.join(former);
    if !is_id(former) || former == id || !kept.exists() {
        return Ok(());
    }
    // A clone's clone links to where the journal is, and not to a link.
    let target = match fs::read_link(&kept) {
        Ok(target) => target,
        Err(_) => former.into(),
    };
    match symlink(target, folder.join(id)) {
        // The same identity was given before.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_finds_its_journal_and_so_does_its_clone() {
        let folder = tempfile::tempdir().unwrap();
        let ids = ["a", "b", "c"].map(|digit| digit.repeat(32));
        let keep = |former: &str, id: &str| keep_journal(folder.path(), former, id).unwrap();
        keep(&ids[0], &ids[1]);
        assert!(!folder.path().join(&ids[1]).exists());
        let journal = folder.path().join(&ids[0]);
        fs::create_dir(&journal).unwrap();
        fs::write(journal.join("system.journal"), "it").unwrap();
        keep(&ids[0], &ids[1]);
        keep(&ids[0], &ids[1]);
        keep(&ids[1], &ids[2]);
        for id in &ids[1..] {
            let found = fs::read(folder.path().join(id).join("system.journal"));
            assert_eq!(found.unwrap(), b"it");
            let link = fs::read_link(folder.path().join(id)).unwrap();
            assert_eq!(link, Path::new(&ids[0]));
        }
        // What is no id names no folder.
        keep("", &ids[1]);
        keep("../x", &ids[1]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn an_id_that_is_none_changes_nothing() {
        for wrong in ["", "../../etc/passwd", "0123", &"g".repeat(32)] {
            assert!(set(wrong, &mut Report::default()).is_err());
        }
    }
}
