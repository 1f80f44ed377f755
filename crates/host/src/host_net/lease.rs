//! The record of the network interfaces that were set up for each VM: a directory with one file per
//! interface.
//!
//! Every change is made under the directory's lock (`flock`), so concurrent commands exclude each
//! other, and one that dies releases it. A file is written before its interface is made, and
//! removed after the interface is gone. So an interface without a VM is found by its file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clone_api::MacAddr;
use clone_api::config::Egress;
use clone_start::Process;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::HostNetError;
use super::range::Range;

/// The longest time between a VM's lease and its runtime directory showing that it runs.
const STARTING: Duration = Duration::from_secs(120);

const LEASE_SUFFIX: &str = ".lease";

/// The record of one network interface of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lease {
    /// The VM's name.
    pub(super) vm: String,
    /// The lease's number, which names the tap.
    pub(super) slot: u16,
    /// The guest's hardware address.
    pub(super) mac: MacAddr,
    /// The guest's address, if we assign it.
    pub(super) address: Option<Ipv4Addr>,
    /// The owner's bridge that the tap is on; `None` for our own bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bridge: Option<String>,
    /// The only addresses that the guest may use on a bridge of the owner's; any if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) held_to: Vec<IpAddr>,
    /// The most connections that the guest may have in the host's table; `None` for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) connections: Option<u32>,
    /// Whether the guest may reach other guests that have this set too.
    pub(super) neighbours: bool,
    /// Whether the guest may open connections to the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) reach_host: bool,
    /// The destinations that the guest may send to.
    #[serde(default, skip_serializing_if = "Egress::is_full")]
    pub(super) egress: Egress,
    /// The process that made the lease, which counts while the VM is starting.
    pub(super) creator: Creator,
}

impl Lease {
    /// The name of the tap of slot `slot`.
    pub(super) fn tap_name(slot: u16) -> String {
        format!("clone-{slot:04x}")
    }

    /// Whether the lease was made by an older version, which guarded taps differently.
    pub(super) fn is_of_older_version(&self) -> bool {
        self.address.is_none() && self.bridge.is_none()
    }

    /// Whether the two leases are on the same owner's bridge, and only one of them may reach other
    /// guests there. (The bridge itself separates two that may not.)
    pub(super) fn is_stranger_to(&self, other: &Self) -> bool {
        self.bridge.is_some() && self.bridge == other.bridge && self.neighbours != other.neighbours
    }

    /// The name of this lease's tap.
    pub(super) fn tap(&self) -> String {
        Self::tap_name(self.slot)
    }
}

/// The process that made a lease, identified by pid and start time, and when it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Creator {
    pid: u32,
    /// Clock ticks from boot to the process's start, as in `/proc/PID/stat`.
    started: u64,
    /// The time of the lease, in seconds since 1970.
    at: u64,
}

impl Creator {
    pub(super) fn this_process() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            started: start_time(pid).unwrap_or(0),
            at: now(),
        }
    }

    /// Whether the VM may still be starting: its creator runs, and [`STARTING`] has not passed.
    pub(super) fn may_be_starting(&self) -> bool {
        now().saturating_sub(self.at) < STARTING.as_secs()
            && start_time(self.pid) == Some(self.started)
    }
}

fn now() -> u64 {
    clone_base::clock::since_1970().as_secs()
}

fn start_time(pid: u32) -> Option<u64> {
    Process::of(pid).map(|process| process.start_time)
}

/// The record of the network that all VMs on our own bridge share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nat {
    /// The addresses behind the bridge.
    pub(super) range: Range,
}

/// The state of the host's packet filter when it was last examined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ruleset {
    /// The kernel's number of that state.
    pub(super) generation: u32,
    /// The listing of our own table just after it was made.
    pub(super) table: String,
    /// Notices about other rules that blocked guests then.
    pub(super) notices: Vec<String>,
}

/// The lease directory, locked while this value lives.
pub(super) struct Leases {
    dir: PathBuf,
    _lock: File,
}

/// The content of the directory.
#[derive(Default)]
pub(super) struct Contents {
    /// The valid leases.
    pub(super) leases: Vec<Lease>,
    /// The slots whose files are damaged.
    pub(super) damaged: Vec<u16>,
}

impl Leases {
    /// Locks the directory, and makes it if necessary. Waits for other holders of the lock.
    pub(super) fn lock(dir: &Path) -> Result<Self, HostNetError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("create the directory", dir))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        loop {
            match flock(&lock, FlockOperation::LockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed("lock", &path)(error.into())),
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// Reads all leases.
    pub(super) fn contents(&self) -> Result<Contents, HostNetError> {
        let mut contents = Contents::default();
        let wrong = failed("list", &self.dir);
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>().map_err(wrong)?,
            Err(error) => return Err(wrong(error)),
        };
        for entry in entries {
            let name = entry.file_name();
            let Some(slot) = name
                .to_str()
                .and_then(|name| name.strip_suffix(LEASE_SUFFIX))
                .and_then(|slot| u16::from_str_radix(slot, 16).ok())
            else {
                continue;
            };
            match self.read::<Lease>(&entry.path())? {
                Some(lease) if lease.slot == slot => contents.leases.push(lease),
                _ => contents.damaged.push(slot),
            }
        }
        contents.leases.sort_by_key(|lease| lease.slot);
        Ok(contents)
    }

    /// The first of these slots that has no lease and for which `free` returns true.
    pub(super) fn free_slot(
        &self,
        slots: RangeInclusive<u16>,
        mut free: impl FnMut(u16) -> Result<bool, HostNetError>,
    ) -> Result<u16, HostNetError> {
        for slot in slots {
            let path = self.lease_path(slot);
            let taken = path.try_exists().map_err(failed("look for", &path))?;
            if !taken && free(slot)? {
                return Ok(slot);
            }
        }
        Err(HostNetError::NoFreeAddress)
    }

    pub(super) fn add(&self, lease: &Lease) -> Result<(), HostNetError> {
        self.write(&self.lease_path(lease.slot), lease)
    }

    pub(super) fn remove(&self, slot: u16) -> Result<(), HostNetError> {
        remove_file(&self.lease_path(slot))
    }

    /// The record of our own bridge, if it exists.
    pub(super) fn nat(&self) -> Result<Option<Nat>, HostNetError> {
        self.read(&self.nat_path())
    }

    /// Whether a record of our own bridge exists, readable or not.
    pub(super) fn has_nat(&self) -> bool {
        self.nat_path().exists()
    }

    pub(super) fn set_nat(&self, nat: &Nat) -> Result<(), HostNetError> {
        self.write(&self.nat_path(), nat)
    }

    pub(super) fn remove_nat(&self) -> Result<(), HostNetError> {
        remove_file(&self.nat_path())
    }

    /// The last recorded state of the packet filter, if there is one.
    pub(super) fn ruleset(&self) -> Result<Option<Ruleset>, HostNetError> {
        self.read(&self.ruleset_path())
    }

    pub(super) fn set_ruleset(&self, ruleset: &Ruleset) -> Result<(), HostNetError> {
        self.write(&self.ruleset_path(), ruleset)
    }

    pub(super) fn remove_ruleset(&self) -> Result<(), HostNetError> {
        remove_file(&self.ruleset_path())
    }

    fn ruleset_path(&self) -> PathBuf {
        self.dir.join("ruleset")
    }

    fn lease_path(&self, slot: u16) -> PathBuf {
        self.dir.join(format!("{slot:04x}{LEASE_SUFFIX}"))
    }

    fn nat_path(&self) -> PathBuf {
        self.dir.join("nat")
    }

    /// Reads a file; `None` if it does not exist or is damaged.
    fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, HostNetError> {
        match fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", path)(error)),
        }
    }

    /// Writes a file atomically.
    fn write(&self, path: &Path, value: &impl Serialize) -> Result<(), HostNetError> {
        let written = serde_json::to_vec(value)
            .map_err(io::Error::from)
            .and_then(|bytes| clone_base::file::replace_volatile(path, 0o644, &bytes));
        written.map_err(failed("write", path))
    }
}

fn remove_file(path: &Path) -> Result<(), HostNetError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostNetError {
    move |source| HostNetError::Lease {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(slot: u16) -> Lease {
        Lease {
            vm: "web".to_owned(),
            slot,
            mac: MacAddr([2, 0xc1, 0, 0, 0, slot as u8]),
            address: Some(Ipv4Addr::new(10, 213, 0, 2)),
            bridge: None,
            held_to: Vec::new(),
            connections: None,
            neighbours: false,
            reach_host: false,
            egress: Egress::Full,
            creator: Creator::this_process(),
        }
    }

    #[test]
    fn leases_come_back_and_their_slots_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::lock(dir.path()).unwrap();
        for slot in [2, 3] {
            assert_eq!(leases.free_slot(2..=10, |_| Ok(true)).unwrap(), slot);
            leases.add(&lease(slot)).unwrap();
        }
        assert_eq!(leases.contents().unwrap().leases, [lease(2), lease(3)]);
        leases.remove(2).unwrap();
        assert_eq!(leases.free_slot(2..=10, |_| Ok(true)).unwrap(), 2);
        assert_eq!(leases.free_slot(2..=10, |slot| Ok(slot > 5)).unwrap(), 6);
        leases.free_slot(2..=3, |slot| Ok(slot > 3)).unwrap_err();
    }

    #[test]
    fn a_damaged_lease_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::lock(dir.path()).unwrap();
        leases.add(&lease(7)).unwrap();
        fs::write(dir.path().join("0009.lease"), "{\"vm\":").unwrap();
        // A lease under another's name.
        fs::copy(dir.path().join("0007.lease"), dir.path().join("000a.lease")).unwrap();
        let mut contents = leases.contents().unwrap();
        contents.damaged.sort_unstable();
        assert_eq!(contents.leases.len(), 1);
        assert_eq!(contents.damaged, [9, 10]);
    }

    #[test]
    fn only_one_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let held = Leases::lock(dir.path()).unwrap();
        let path = dir.path().to_owned();
        let (sender, receiver) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            let _leases = Leases::lock(&path).unwrap();
            sender.send(()).unwrap();
        });
        receiver
            .recv_timeout(Duration::from_millis(50))
            .expect_err("the lock was given twice");
        drop(held);
        receiver.recv().unwrap();
        waiter.join().unwrap();
    }

    #[test]
    fn a_creator_that_is_gone_or_late_starts_nothing() {
        assert!(Creator::this_process().may_be_starting());
        let mut another = Creator::this_process();
        another.started += 1;
        assert!(!another.may_be_starting(), "the pid was used again");
        let mut late = Creator::this_process();
        late.at -= STARTING.as_secs();
        assert!(!late.may_be_starting());
    }
}
