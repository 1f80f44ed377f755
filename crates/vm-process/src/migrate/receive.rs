//! The destination's side of a migration.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clone_api::control::{Custody, MigrationReceived};
use clone_api::{ApiError, ErrorCode, Shape, VmConfig};
use clone_disk::{Disk, Request};
use clone_migration::wire::{MachineSizes, RECORD_BYTES, Record, Reply};
use clone_migration::{Blocks, Link};
use clone_start::error::Result;
use clone_start::{cpu, fits};
use clone_vmm::machine::MachineState;
use clone_vmm::snapshot::{self, CpuProfile};

use super::super::machine::{locked, machine_error};
use super::super::snapshot::{SharedSnapshotSource, SnapshotDisk, SnapshotSource, exclusive};
use super::{Migration, failed, link};

/// The longest time without anything from the source while it sends, which is longer than the source
/// waits for its bandwidth limit.
const SOURCE_PATIENCE: Duration = Duration::from_secs(90);
/// The longest time between the answer that everything is here and the word to run.
const WORD_PATIENCE: Duration = Duration::from_secs(60);

/// The end of a migration at its destination.
pub(crate) enum Arrival {
    /// The guest runs here.
    Runs(MigrationReceived),
    /// Everything is here, and the word to run did not come. The guest waits for another word.
    Waits(ApiError),
    /// The VM is not this host's, and what came of it is of no use.
    Discarded(ApiError),
}

/// Takes in the VM that comes over the stream in `files`.
pub(crate) fn receive(
    snapshot_source: &SharedSnapshotSource,
    migration: &Migration,
    config: &VmConfig,
    files: Vec<OwnedFd>,
) -> Arrival {
    let begun = exclusive(snapshot_source).and_then(|source| {
        match locked(&source.machine).custody() {
            Custody::Incoming => {}
            _ => {
                let message = "the VM was not started to come from another host";
                return Err(ApiError::new(ErrorCode::Conflict, message));
            }
        }
        Ok((link(&mut files.into_iter())?, source))
    });
    let (mut link, source) = match begun {
        Ok(begun) => begun,
        Err(error) => return Arrival::Discarded(error),
    };
    let arrived = take_in(&source, migration, config, &mut link);
    let received = match arrived {
        Ok(received) => received,
        Err(error) => return discard(&mut link, error),
    };
    // The word that everything is here goes out once the machine says so, and not before.
    let answered = set(&source, Custody::Arrived).and_then(|()| {
        let ready = link.write_all(&Reply::Ready.encode());
        ready.map_err(|(_, error)| ApiError::internal(&error))
    });
    if let Err(error) = answered {
        // A source without the answer never gives the VM away.
        return discard(&mut link, error);
    }
    link.set_patience(WORD_PATIENCE);
    match word(&mut link) {
        Ok(Word::Go) => {}
        Ok(Word::Abort) => {
            let message = "the other host keeps the VM";
            return Arrival::Discarded(ApiError::new(ErrorCode::Conflict, message));
        }
        Err(error) => return Arrival::Waits(error),
    }
    let runs = set(&source, Custody::Here).and_then(|()| locked(&source.machine).resume());
    if let Err(error) = runs {
        let _ = locked(&source.machine).set_custody(Custody::Incoming);
        return discard(&mut link, error);
    }
    // Without this answer the source waits to be told; the guest runs here in any case.
    if let Err((_, error)) = link.write_all(&Reply::Running.encode()) {
        tracing::warn!(%error, "the other host was not told that the VM runs here");
    }
    Arrival::Runs(received)
}

/// Tells the source that the VM is never run here.
fn discard(link: &mut Link, error: ApiError) -> Arrival {
    let _ = link.write_all(&Reply::Failed(error.message.clone()).encode());
    Arrival::Discarded(error)
}

fn set(source: &SnapshotSource, custody: Custody) -> Result<()> {
    let set = locked(&source.machine).set_custody(custody);
    set.map_err(|error| ApiError::internal(&error))
}

/// The source's last word.
enum Word {
    Go,
    Abort,
}

fn word(link: &mut Link) -> Result<Word> {
    let unknown = |reason: String| {
        let message = format!(
            "the VM has arrived, and the other host has not said that it may run here: {reason}"
        );
        ApiError::new(ErrorCode::Timeout, message).advise(
            "look there; then say `clone migrate --confirm` on both hosts if it is not there, or \
             `clone migrate --cancel` on both if it is",
        )
    };
    let mut header = [0; RECORD_BYTES];
    let read = link.read_exact(&mut header);
    read.map_err(|error| unknown(error.to_string()))?;
    match Record::decode(&header, &MachineSizes::default()) {
        Ok(Record::Go) => Ok(Word::Go),
        Ok(Record::Abort { .. }) => Ok(Word::Abort),
        Ok(other) => Err(unknown(format!("it said {other:?}"))),
        Err(error) => Err(unknown(error.to_string())),
    }
}

/// Receives memory, disks and state, and puts the machine there.
fn take_in(
    source: &SnapshotSource,
    migration: &Migration,
    config: &VmConfig,
    link: &mut Link,
) -> Result<MigrationReceived> {
    link.set_patience(SOURCE_PATIENCE);
    let memory = Arc::clone(source.dirty_tracker.memory());
    let mut disks = ArrivingDisks::of(&source.disks);
    let received = clone_migration::receive(link, &memory, &mut disks, snapshot::MAX_BYTES);
    let received = received.map_err(failed)?;
    let state = checked(&received.state, config)?;
    let mut machine = locked(&source.machine);
    let mut paused = machine.pause().map_err(machine_error)?;
    let restored = paused.restore(&state);
    restored.map_err(|error| machine_error(error.into()))?;
    migration.set_cpu(cpu::features_of(CpuProfile::of_saved(&state.vcpus)));
    Ok(MigrationReceived {
        bytes: received.bytes,
        data_pages: received.data_pages,
    })
}

fn checked(bytes: &[u8], config: &VmConfig) -> Result<MachineState> {
    let refuse = |reason: String| {
        let message = format!("the machine's state cannot be used: {reason}");
        ApiError::new(ErrorCode::InvalidConfig, message)
    };
    let state = snapshot::decode(bytes).map_err(|error| refuse(error.to_string()))?;
    let shape = Shape::of(config, &vec![0; config.disks.len()]);
    fits::check_fits(&state, &shape).map_err(refuse)?;
    Ok(state)
}

/// The disks whose writes come with the VM: those with a layer of their own, which is empty.
struct ArrivingDisks(Vec<Option<Arc<Mutex<Disk>>>>);

impl ArrivingDisks {
    fn of(disks: &[SnapshotDisk]) -> Self {
        let takes_writes = |disk: &Arc<Mutex<Disk>>| {
            let disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
            disk.is_top_empty()
        };
        let disks = disks.iter().map(|disk| &disk.disk);
        Self(
            disks
                .map(|disk| takes_writes(disk).then(|| Arc::clone(disk)))
                .collect(),
        )
    }

    fn with(&mut self, disk: u32, act: impl FnOnce(&mut Disk) -> io::Result<()>) -> io::Result<()> {
        let disk = self.0.get(disk as usize).and_then(Option::as_ref);
        let disk = disk.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        act(&mut disk.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Blocks for ArrivingDisks {
    fn sizes(&self) -> Vec<u64> {
        let size = |disk: &Option<Arc<Mutex<Disk>>>| {
            let disk = disk
                .as_ref()?
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            Some(disk.size())
        };
        self.0.iter().map(|disk| size(disk).unwrap_or(0)).collect()
    }

    fn write(&mut self, disk: u32, offset: u64, content: &[u8]) -> io::Result<()> {
        self.with(disk, |disk| disk.write_at(content, offset))
    }

    fn zero(&mut self, disk: u32, offset: u64, len: u64) -> io::Result<()> {
        let unmap = true;
        self.with(disk, |disk| {
            disk.call(Request::WriteZeroes { offset, len, unmap })
        })
    }
}
