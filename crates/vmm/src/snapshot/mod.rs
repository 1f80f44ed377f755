//! A machine's state as bytes that can be kept, sent to another host, and read from an untrusted
//! source.
//!
//! A file of sections: a magic number and a version, then for each section its name, length and
//! checksum, and its content, a value in postcard's encoding. A reader refuses a newer version, a
//! section that it does not know, and anything cut, changed or left over. A section never gets a
//! new field: the file gets a new version.
//!
//! RAM is handled by `clone-memory` and disks by `clone-disk`; `clone` keeps what belongs together.

mod cpu;

pub use cpu::{CpuProfile, Mismatch};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::machine::{BoardState, MachineState, VmClock};
use crate::pci::virtio_pci::VirtioPciState;
use crate::state_codec;
use crate::vcpu::VcpuState;

const MAGIC: [u8; 8] = *b"CLNSTATE";
/// The version that is written, and the newest that is read.
pub const VERSION: u32 = 1;
/// The largest file that is read, in bytes: 32 CPUs take less than 1 MiB.
pub const MAX_BYTES: u64 = 64 << 20;
const HASH_BYTES: usize = 32;

/// The reason for which bytes are not a machine's state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SnapshotError {
    /// The bytes do not begin as a state does.
    #[error("it is not a machine state: the first bytes are not `CLNSTATE`")]
    NotAState,
    /// The format version is newer than this build can read.
    #[error("its format version is {found}, and the newest that this build reads is {VERSION}")]
    TooNew {
        /// The version in the file.
        found: u32,
    },
    /// The file ends within a section.
    #[error("it ends within section `{section}`")]
    Cut {
        /// The section.
        section: &'static str,
    },
    /// Another section stands in the place of this one.
    #[error("section `{wanted}` is missing")]
    Missing {
        /// The missing section.
        wanted: &'static str,
    },
    /// The checksum of a section is wrong.
    #[error("section `{section}` is damaged: its checksum is wrong")]
    Damaged {
        /// The section.
        section: &'static str,
    },
    /// The checksum of a section is right, but its content cannot be decoded.
    #[error("section `{section}` is invalid: {reason}")]
    Nonsense {
        /// The section.
        section: &'static str,
        /// The decoder's error.
        reason: String,
    },
    /// Bytes follow the last section.
    #[error("{bytes} bytes follow its end")]
    TooLong {
        /// The number of bytes.
        bytes: usize,
    },
    /// A section could not be encoded.
    #[error("cannot encode section `{section}`: {reason}")]
    Encode {
        /// The section.
        section: &'static str,
        /// The encoder's error.
        reason: String,
    },
}

/// Encodes a machine's state.
///
/// # Errors
/// [`SnapshotError::Encode`], which plain data does not cause.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    put(&mut bytes, "vcpus", &state.vcpus)?;
    put(&mut bytes, "board", &state.board)?;
    put(&mut bytes, "clock", &state.clock)?;
    put(&mut bytes, "devices", &state.devices)?;
    Ok(bytes)
}

/// Decodes what [`encode`] wrote, here or elsewhere.
///
/// # Errors
/// [`SnapshotError`], with the section. [`crate::machine::Machine::restore`] and KVM decide whether
/// the state fits a machine.
pub fn decode(bytes: &[u8]) -> Result<MachineState, SnapshotError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(SnapshotError::NotAState)?;
    let (version, mut rest) = take::<4>(rest, "header")?;
    match u32::from_le_bytes(version) {
        VERSION => {}
        found if found > VERSION => return Err(SnapshotError::TooNew { found }),
        _ => return Err(SnapshotError::NotAState),
    }
    let vcpus: Vec<VcpuState> = section(&mut rest, "vcpus")?;
    let board: BoardState = section(&mut rest, "board")?;
    let clock: VmClock = section(&mut rest, "clock")?;
    let devices: Vec<VirtioPciState> = section(&mut rest, "devices")?;
    match rest.len() {
        0 => Ok(MachineState {
            vcpus,
            board,
            clock,
            devices,
        }),
        bytes => Err(SnapshotError::TooLong { bytes }),
    }
}

/// A section's name takes eight bytes, filled up with zeros.
fn name_bytes(name: &str) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

fn put(
    bytes: &mut Vec<u8>,
    name: &'static str,
    value: &impl Serialize,
) -> Result<(), SnapshotError> {
    let content = state_codec::encode(value).map_err(|error| SnapshotError::Encode {
        section: name,
        reason: error.to_string(),
    })?;
    bytes.extend(name_bytes(name));
    bytes.extend((content.len() as u64).to_le_bytes());
    bytes.extend(blake3::hash(&content).as_bytes());
    bytes.extend(content);
    Ok(())
}

fn take<'a, const N: usize>(
    bytes: &'a [u8],
    section: &'static str,
) -> Result<([u8; N], &'a [u8]), SnapshotError> {
    let (head, rest) = bytes
        .split_first_chunk()
        .ok_or(SnapshotError::Cut { section })?;
    Ok((*head, rest))
}

/// Decodes the section that `rest` starts with, and leaves what follows it.
fn section<T: DeserializeOwned>(rest: &mut &[u8], name: &'static str) -> Result<T, SnapshotError> {
    let (found, after) = take::<8>(rest, name)?;
    if found != name_bytes(name) {
        return Err(SnapshotError::Missing { wanted: name });
    }
    let (len, after) = take::<8>(after, name)?;
    let (hash, after) = take::<HASH_BYTES>(after, name)?;
    // A length beyond the bytes that are there is never used to reserve memory.
    let (content, after) = usize::try_from(u64::from_le_bytes(len))
        .ok()
        .and_then(|len| after.split_at_checked(len))
        .ok_or(SnapshotError::Cut { section: name })?;
    if blake3::hash(content).as_bytes() != &hash {
        return Err(SnapshotError::Damaged { section: name });
    }
    let value = state_codec::decode(content).map_err(|error| SnapshotError::Nonsense {
        section: name,
        reason: error.to_string(),
    })?;
    *rest = after;
    Ok(value)
}

#[cfg(test)]
mod tests;
