//! The record of a node's VMs that survives the node's process: one small file for each VM.
//!
//! A VM is recorded before it is created, and every step after it was taken. Files are replaced as a
//! whole and written through to the disk, so a kill or a loss of power at any point leaves the step
//! before or the step after. Whether a VM really runs is not known here; [`crate::supervise`]
//! compares.
//!
//! A file that cannot be read does not stop the node, whose other VMs would be lost with it: the file
//! is renamed to `*.unreadable`, and the host reports it to administrators.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use army_api::vms::{IdlePolicy, NetworkPolicy, VmState};
use serde::{Deserialize, Serialize};

use army_node_api::requests::VmSpec;
use army_node_api::{Error, ErrorKind, Result};
use clone_api::config::Egress;

use crate::lock;

/// The version of the files. Files of another version cannot be read.
const VERSION: u32 = 1;

/// The record of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The version of the file.
    pub version: u32,
    /// The VM's id.
    pub id: String,
    /// The incarnation of the VM. It never decreases.
    pub epoch: u64,
    /// The guest's host name.
    pub name: String,
    /// When the VM is destroyed, in milliseconds since 1970, by the controller's clock. It is used
    /// where there is no `ends_ms`, as in files of former releases.
    pub expires_ms: Option<u64>,
    /// How long the VM may live, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// When that time is over, in milliseconds since the host's start. Nobody can set this clock,
    /// and a VM does not outlive a restart of its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_ms: Option<u64>,
    /// What is done when the VM is not used.
    pub idle: Option<IdlePolicy>,
    /// What the VM's network permits; `None` is the default policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// The destinations that the VM's guest may send to at the most, whatever its policy; `None`
    /// where it is not known, as in files of former releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling: Option<Egress>,
    /// The number of the last change of the VM, and 0 before the first one.
    #[serde(default)]
    pub revision: u64,
    /// The last step of the VM's life.
    pub stage: Stage,
    /// Whether the VM was paused because it was idle.
    #[serde(default)]
    pub asleep: bool,
    /// Whether the VM is suspended, is being suspended or is being woken.
    #[serde(default)]
    pub suspended: bool,
    /// Where the VM is being moved to. Until the controller has decided where it is, it is not known
    /// whether it is still here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub departure: Option<Departure>,
    /// The state that a VM gets that is arriving from another host, if it does not just run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrives_as: Option<VmState>,
}

/// The move of a VM to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departure {
    /// The host that the VM is moved to.
    pub to: String,
    /// The VM's epoch there.
    pub epoch: u64,
    /// The state that the VM had before.
    pub former: VmState,
    /// Whether the move is known to have failed, so that the VM is here.
    pub stayed: bool,
}

/// A step of a VM's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "stage", content = "why")]
pub enum Stage {
    /// The VM is being created.
    Begun,
    /// The VM is arriving from another host.
    Arriving,
    /// The VM was created, or has arrived.
    Running,
    /// The VM has ended, or is about to, for this reason.
    Ended(String),
    /// The VM could not be created, or was lost, for this reason.
    Failed(String),
}

impl Stage {
    /// Whether the VM may be running.
    pub fn is_alive(&self) -> bool {
        matches!(self, Self::Begun | Self::Arriving | Self::Running)
    }
}

impl Entry {
    /// The same record with a time to live that begins now, at `boot_ms` since the host's start.
    pub fn beginning(&self, boot_ms: u64) -> Self {
        let mut entry = self.clone();
        entry.ends_ms = entry.ttl_ms.map(|ttl| boot_ms.saturating_add(ttl));
        entry
    }

    /// Whether the time to live is over, by either clock.
    pub fn is_expired(&self, boot_ms: u64, wall_ms: u64) -> bool {
        match (self.ends_ms, self.expires_ms) {
            (Some(end), _) => end <= boot_ms,
            (None, Some(end)) => end <= wall_ms,
            (None, None) => false,
        }
    }

    /// Checks that the VM can be changed.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where it is being created or moved, or has ended.
    pub fn check_changeable(&self) -> Result<()> {
        let message = match &self.stage {
            Stage::Running => match &self.departure {
                None => return Ok(()),
                Some(departure) => {
                    format!("the VM {} is being moved to {}", self.name, departure.to)
                }
            },
            Stage::Arriving => format!("the VM {} has not arrived yet", self.name),
            Stage::Begun => format!("the VM {} is being created", self.name),
            Stage::Ended(reason) | Stage::Failed(reason) => {
                format!("the VM {} has ended: {reason}", self.name)
            }
        };
        Err(Error::new(ErrorKind::Conflict, message))
    }

    /// The record of a VM that is about to be created.
    pub fn new(id: String, epoch: u64, name: String) -> Self {
        Self {
            version: VERSION,
            id,
            epoch,
            name,
            expires_ms: None,
            ttl_ms: None,
            ends_ms: None,
            idle: None,
            network: None,
            ceiling: None,
            revision: 0,
            stage: Stage::Begun,
            asleep: false,
            suspended: false,
            departure: None,
            arrives_as: None,
        }
    }
}

impl From<&VmSpec> for Entry {
    fn from(spec: &VmSpec) -> Self {
        let mut entry = Self::new(spec.id.clone(), spec.epoch, spec.name.clone());
        entry.expires_ms = spec.expires_ms;
        entry.ttl_ms = spec.ttl_ms;
        entry.idle = spec.idle;
        entry.network.clone_from(&spec.network);
        entry
    }
}

/// The journal: all records, in memory and in files.
pub struct Journal {
    folder: PathBuf,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// What an administrator should know about the files, as sentences.
    notices: Vec<String>,
    /// The ids of VMs whose files were put aside.
    put_aside: BTreeSet<String>,
}

impl Journal {
    /// Opens the journal in `folder`, which is created where it does not exist. Only its owner can
    /// read it. Files that cannot be read, or are of another version, are put aside.
    ///
    /// # Errors
    /// Where the folder cannot be used.
    pub fn open(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).map_err(|error| failed("create", &folder, &error))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))
            .map_err(|error| failed("protect", &folder, &error))?;
        let mut entries = BTreeMap::new();
        let mut notices = Vec::new();
        let mut put_aside_ids = BTreeSet::new();
        let list = fs::read_dir(&folder).map_err(|error| failed("list", &folder, &error))?;
        // The list comes first, so that files that are renamed are not found twice.
        let list: io::Result<Vec<_>> = list.collect();
        for file in list.map_err(|error| failed("list", &folder, &error))? {
            let path = file.path();
            let id = path.file_stem().unwrap_or_default().to_string_lossy();
            match path.extension().and_then(|it| it.to_str()) {
                Some("json") => match read(&path) {
                    Ok(entry) => {
                        entries.insert(entry.id.clone(), entry);
                    }
                    Err(error) => {
                        put_aside_ids.insert(id.into_owned());
                        notices.push(put_aside(&path, &error));
                    }
                },
                Some("unreadable") => {
                    put_aside_ids.insert(id.into_owned());
                    notices.push(format!(
                        "{} was put aside because it could not be read; its VM is left as it is",
                        path.display()
                    ));
                }
                // The write of this file was interrupted; the file that it was to replace exists.
                Some("new") => {
                    fs::remove_file(&path).map_err(|error| failed("remove", &path, &error))?;
                }
                _ => {}
            }
        }
        Ok(Self {
            folder,
            entries: Mutex::new(entries),
            notices,
            put_aside: put_aside_ids,
        })
    }

    /// What an administrator should know about the files, as sentences.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Whether the file of this VM was put aside: the VM may be running, and is wanted by what could
    /// not be read.
    pub fn is_put_aside(&self, id: &str) -> bool {
        self.put_aside.contains(id)
    }

    /// All records.
    pub fn all(&self) -> Vec<Entry> {
        lock(&self.entries).values().cloned().collect()
    }

    /// The record of one VM.
    pub fn get(&self, id: &str) -> Result<Entry> {
        lock(&self.entries)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("this host has no VM {id}")))
    }

    /// Whether a VM was paused because it was idle.
    pub fn is_asleep(&self, id: &str) -> bool {
        lock(&self.entries).get(id).is_some_and(|it| it.asleep)
    }

    /// Records a VM that is about to be created.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM is known in this epoch or a later one.
    pub fn begin(&self, entry: &Entry) -> Result<()> {
        let mut entries = lock(&self.entries);
        if let Some(known) = entries.get(&entry.id)
            && known.epoch >= entry.epoch
        {
            let detail = format!("the VM {} is known in epoch {}", entry.id, known.epoch);
            return Err(Error::new(ErrorKind::Conflict, detail));
        }
        self.write(entry)?;
        entries.insert(entry.id.clone(), entry.clone());
        Ok(())
    }

    /// Records a step of a VM's life. A VM that has ended stays ended.
    pub fn advance(&self, id: &str, stage: Stage) -> Result<()> {
        self.change(id, |entry| {
            if entry.stage.is_alive() {
                entry.stage = stage;
            }
        })
    }

    /// Records that a VM has ended, if it is alive and `condition` still holds for its record.
    /// Returns whether it was recorded.
    pub fn end_if(
        &self,
        id: &str,
        stage: Stage,
        condition: impl FnOnce(&Entry) -> bool,
    ) -> Result<bool> {
        let mut ended = false;
        self.change(id, |entry| {
            ended = entry.stage.is_alive() && condition(entry);
            if ended {
                entry.stage = stage;
            }
        })?;
        Ok(ended)
    }

    /// Changes the record of a VM that was created and has not ended.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none, and [`ErrorKind::Conflict`] where the VM is being
    /// created or has ended.
    pub fn update(&self, id: &str, update: impl FnOnce(&mut Entry)) -> Result<()> {
        let mut refused = None;
        self.change(id, |entry| match entry.check_changeable() {
            Ok(()) => update(entry),
            Err(error) => refused = Some(error),
        })?;
        refused.map_or(Ok(()), Err)
    }

    /// Changes the record of a VM that is being moved, or has arrived.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none.
    pub fn record_move(&self, id: &str, update: impl FnOnce(&mut Entry)) -> Result<()> {
        self.change(id, update)
    }

    /// Records whether a VM was paused because it was idle.
    pub fn set_asleep(&self, id: &str, asleep: bool) -> Result<()> {
        self.change(id, |entry| entry.asleep = asleep)
    }

    /// Removes the record of a VM.
    pub fn forget(&self, id: &str) -> Result<()> {
        let mut entries = lock(&self.entries);
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path, &error))
            }
            _ => {
                entries.remove(id);
                Ok(())
            }
        }
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Entry)) -> Result<()> {
        let mut entries = lock(&self.entries);
        let unknown = || Error::new(ErrorKind::NotFound, format!("this host has no VM {id}"));
        let known = entries.get_mut(id).ok_or_else(unknown)?;
        let mut changed = known.clone();
        change(&mut changed);
        if changed != *known {
            self.write(&changed)?;
            *known = changed;
        }
        Ok(())
    }

    fn write(&self, entry: &Entry) -> Result<()> {
        let path = self.path(&entry.id);
        let write = || clone_base::file::replace(&path, 0o600, &serde_json::to_vec(entry)?);
        write().map_err(|error| failed("write", &path, &error))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}

fn read(path: &Path) -> Result<Entry> {
    let text = fs::read(path).map_err(|error| failed("read", path, &error))?;
    let entry: Entry =
        serde_json::from_slice(&text).map_err(|error| failed("parse", path, &error.into()))?;
    if entry.version != VERSION {
        let detail = format!(
            "{} is of version {}, and this program reads version {VERSION}",
            path.display(),
            entry.version
        );
        return Err(Error::new(ErrorKind::Internal, detail));
    }
    Ok(entry)
}

/// Puts a file aside that cannot be read. Returns a sentence about it.
fn put_aside(path: &Path, error: &Error) -> String {
    let aside = path.with_extension("unreadable");
    let place = match fs::rename(path, &aside) {
        Ok(()) => format!("it was renamed to {}", aside.display()),
        Err(error) => format!("it cannot be renamed: {error}"),
    };
    tracing::error!(%error, "a VM of the journal is unknown; {place}");
    format!("a VM of the journal is unknown, and left as it is: {error}; {place}")
}

fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    let detail = format!("cannot {action} {}: {error}", path.display());
    Error::new(ErrorKind::Internal, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, epoch: u64) -> Entry {
        Entry::new(id.to_owned(), epoch, "a".to_owned())
    }

    #[test]
    fn what_was_recorded_is_read_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Journal::open(folder.path().to_owned()).unwrap();
        let journal = open();
        journal.begin(&entry("1", 1)).unwrap();
        journal.begin(&entry("2", 1)).unwrap();
        journal.advance("1", Stage::Running).unwrap();
        journal.forget("2").unwrap();
        fs::write(folder.path().join("3.new"), "{").unwrap();
        let again = open();
        assert_eq!(again.all(), journal.all());
        assert_eq!(again.get("1").unwrap().stage, Stage::Running);
        assert!(!folder.path().join("3.new").exists());
    }

    #[test]
    fn a_vm_begins_once_in_an_epoch_and_stays_ended() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        journal.begin(&entry("1", 2)).unwrap();
        for epoch in [1, 2] {
            let error = journal.begin(&entry("1", epoch)).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Conflict);
        }
        journal.advance("1", Stage::Ended("asked".into())).unwrap();
        journal.advance("1", Stage::Running).unwrap();
        assert!(!journal.get("1").unwrap().stage.is_alive());
        journal.begin(&entry("1", 3)).unwrap();
        assert!(journal.get("1").unwrap().stage.is_alive());
    }

    #[test]
    fn a_time_to_live_does_not_depend_on_the_wall_clock() {
        let mut wanted = entry("1", 1);
        wanted.ttl_ms = Some(60_000);
        wanted.expires_ms = Some(1_000_060_000);
        let begun = wanted.beginning(5_000);
        // The wall clock is set an hour ahead, or back to 1970.
        assert!(!begun.is_expired(64_999, 1_003_600_000));
        assert!(begun.is_expired(65_000, 0));
        // A record of a former release has only the wall clock's time.
        wanted.ttl_ms = None;
        let old = wanted.beginning(5_000);
        assert!(!old.is_expired(u64::MAX, 1_000_059_999));
        assert!(old.is_expired(0, 1_000_060_000));
        assert!(!entry("2", 1).beginning(0).is_expired(u64::MAX, u64::MAX));
    }

    #[test]
    fn a_vm_ends_by_what_its_record_says_now_and_is_not_changed_after_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        let mut wanted = entry("1", 1);
        wanted.ttl_ms = Some(1000);
        journal.begin(&wanted.beginning(0)).unwrap();
        let extend = |entry: &mut Entry| entry.ends_ms = Some(9000);
        let error = journal.update("1", extend).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict, "it is being created");
        journal.advance("1", Stage::Running).unwrap();
        // The supervision has read the record, and the time to live is extended before it acts.
        assert!(journal.get("1").unwrap().is_expired(2000, 0));
        journal.update("1", extend).unwrap();
        let end = |boot_ms| {
            let over = Stage::Ended("over".into());
            journal.end_if("1", over, |entry| entry.is_expired(boot_ms, 0))
        };
        assert!(!end(2000).unwrap());
        assert_eq!(journal.get("1").unwrap().stage, Stage::Running);
        assert!(end(9000).unwrap() && !end(9000).unwrap());
        let error = journal.update("1", extend).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict);
        assert!(error.message.contains("over"), "{error}");
        let again = Journal::open(folder.path().to_owned()).unwrap();
        assert_eq!(again.get("1").unwrap().ends_ms, Some(9000));
    }

    #[test]
    fn the_file_of_version_1_is_read_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let golden = r#"{"version":1,"id":"1","epoch":4,"name":"a","expires_ms":5,
            "idle":{"after_s":6,"action":"pause"},"stage":{"stage":"failed","why":"x"}}"#;
        fs::write(folder.path().join("1.json"), golden).unwrap();
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        let entry = journal.get("1").unwrap();
        assert_eq!((entry.epoch, entry.expires_ms), (4, Some(5)));
        assert_eq!(entry.stage, Stage::Failed("x".into()));
        fs::write(
            folder.path().join("2.json"),
            golden.replace(":1,\"id\"", ":2,\"id\""),
        )
        .unwrap();
        // A file of the future is put aside, and is not lost.
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        assert_eq!(journal.all().len(), 1);
        assert!(folder.path().join("2.unreadable").exists());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_put_aside_and_the_node_starts() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Journal::open(folder.path().to_owned()).unwrap();
        open().begin(&entry("1", 1)).unwrap();
        for (name, content) in [
            ("2.json", ""),
            ("3.json", "{\"version\":1"),
            ("4.json", "\0"),
        ] {
            fs::write(folder.path().join(name), content).unwrap();
        }
        fs::create_dir(folder.path().join("5.json")).unwrap();
        let journal = open();
        assert_eq!(journal.all(), [entry("1", 1)]);
        assert_eq!(journal.notices().len(), 4, "{:?}", journal.notices());
        assert!(
            journal
                .notices()
                .iter()
                .any(|it| it.contains("3.unreadable"))
        );
        assert!(journal.is_put_aside("3") && !journal.is_put_aside("1"));
        // The VM can be created again under the same id, and the notices remain.
        journal.begin(&entry("2", 1)).unwrap();
        assert_eq!((open().all().len(), open().notices().len()), (2, 4));
    }

    #[test]
    fn a_vm_that_is_moved_is_recorded_on_both_hosts_and_not_changed_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Journal::open(folder.path().to_owned()).unwrap();
        let journal = open();
        journal.begin(&entry("1", 1)).unwrap();
        journal.advance("1", Stage::Running).unwrap();
        let departure = Departure {
            to: "b".into(),
            epoch: 2,
            former: VmState::Paused,
            stayed: false,
        };
        let begun = |entry: &mut Entry| entry.departure = Some(departure.clone());
        journal.record_move("1", begun).unwrap();
        let mut arriving = entry("2", 5);
        arriving.stage = Stage::Arriving;
        arriving.arrives_as = Some(VmState::Suspended);
        journal.begin(&arriving).unwrap();
        let again = open();
        assert_eq!(again.all(), journal.all());
        assert_eq!(again.get("1").unwrap().departure, Some(departure));
        for (id, word) in [("1", "moved to b"), ("2", "not arrived")] {
            let refused = again.update(id, |entry| entry.asleep = true).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::Conflict);
            assert!(refused.message.contains(word), "{refused}");
        }
        // The files, as they are read for ever.
        let golden = r#"{"version":1,"id":"3","epoch":4,"name":"a","expires_ms":null,"idle":null,
            "stage":{"stage":"running"},
            "departure":{"to":"b","epoch":5,"former":"suspended","stayed":true}}"#;
        fs::write(folder.path().join("3.json"), golden).unwrap();
        let golden = r#"{"version":1,"id":"4","epoch":4,"name":"a","expires_ms":null,"idle":null,
            "stage":{"stage":"arriving"},"arrives_as":"paused"}"#;
        fs::write(folder.path().join("4.json"), golden).unwrap();
        let golden = open();
        assert!(golden.get("3").unwrap().departure.unwrap().stayed);
        assert_eq!(golden.get("4").unwrap().stage, Stage::Arriving);
    }

    #[test]
    fn only_the_owner_reads_the_journal() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vms");
        let journal = Journal::open(path.clone()).unwrap();
        journal.begin(&entry("1", 1)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join("1.json"))), (0o700, 0o600));
    }
}
