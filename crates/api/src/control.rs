//! The requests and answers of the control socket.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkpoint_name::CheckpointName;
use crate::config::VmConfig;
use crate::jail::{JailStatus, RequiredJail};

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices are stopped; it can go on.
    Paused,
    /// It is a clone that is ready and waits to be given its name.
    Standby,
    /// It is on its way from another host, where it runs.
    Incoming,
    /// It has arrived from another host, where it may still be: it waits for the word to run.
    Arrived,
    /// It was given to another host, which has not said that it runs there: it waits to be told.
    Moved,
    /// The guest has ended; the process is about to.
    Stopping,
}

/// What a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: VmState,
    /// The host's id of its process.
    pub pid: u32,
    /// When its process started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// The version of the program that runs it.
    pub version: String,
    /// Its description, with everything filled in that was left to us.
    pub config: VmConfig,
    /// How complete the jail of its process is.
    #[serde(default)]
    pub jail: JailStatus,
    /// Why shared directories are not served any more, by their tags. Everything in them fails in
    /// the guest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub share_failures: BTreeMap<String, String>,
    /// Its last rewind, which has ended the connections to its guest; absent where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewound: Option<LastRewind>,
    /// When its start reached each of its stages, in order. Not all starts have all of them.
    #[serde(default)]
    pub timeline: Vec<StageTime>,
}

/// A rewind to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LastRewind {
    /// The checkpoint.
    pub checkpoint: CheckpointName,
    /// When it was complete, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub monotonic_ns: u64,
}

/// When a start reached a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StageTime {
    /// The stage.
    pub stage: StartStage,
    /// In nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub monotonic_ns: u64,
}

/// The stages of a start, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum StartStage {
    /// Its process runs.
    Spawned,
    /// It has read what it is to be.
    Described,
    /// All that it uses of the host is open.
    Opened,
    /// It is jailed.
    Jailed,
    /// Its memory is mapped, with what is brought in ahead.
    Mapped,
    /// KVM's VM, its CPUs and devices are made and have their state.
    Built,
    /// KVM has mapped what is brought in ahead.
    PreFaulted,
    /// It waits for its name, or to run.
    Ready,
    /// As a standby it was given its name.
    Adopted,
    /// Devices and CPUs were let run.
    Resumed,
    /// The guest ran its first instruction.
    Entered,
}

/// The name that a standby is given; it runs from then on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Adoption {
    /// The name of the VM, whose directory has been renamed to it.
    pub name: String,
    /// The layers that its jail must have.
    #[serde(default)]
    pub required_jail: RequiredJail,
}

/// The pages of RAM that a guest has touched: runs of page numbers, of 4 KiB each and counted by
/// RAM offset; the first of a run and the one after its last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TouchedPages {
    /// Pages that it has read, and shares.
    pub read: Vec<(u64, u64)>,
    /// Pages that it has written, and has a copy of.
    pub written: Vec<(u64, u64)>,
}

/// What a VM uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VmStats {
    /// Memory.
    pub memory: MemoryStats,
    /// Processor time.
    pub cpu: CpuStats,
    /// The balloon; absent where the VM has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonStatus>,
    /// Counters of each device by the device's name, as in `block0`.
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
}

/// Memory of the VM's process, as the host counts it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MemoryStats {
    /// The RAM that the guest was promised.
    pub guest_bytes: u64,
    /// Pages in RAM, shared ones counted whole.
    pub resident_bytes: u64,
    /// Pages that only this process has: what would come free with it.
    pub private_bytes: u64,
    /// Pages in swap.
    pub swapped_bytes: u64,
    /// Of the guest's RAM alone, by where its pages are from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestPages>,
}

/// The guest's RAM in the host's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct GuestPages {
    /// Pages that only this guest has.
    pub private_bytes: u64,
    /// Pages of templates that are mapped; all clones share one copy.
    pub shared_bytes: u64,
    /// Pages that only this guest has, in swap.
    pub swapped_bytes: u64,
    /// The same by memory layer of the template, from the base up.
    pub layers: Vec<LayerPages>,
}

/// What a guest has of one memory layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LayerPages {
    /// The layer's own pages, mapped.
    pub shared_bytes: u64,
    /// Pages that were the layer's, and that the guest has changed.
    pub private_bytes: u64,
}

/// Processor time of the VM's process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CpuStats {
    /// In user space, guest time included.
    pub user_us: u64,
    /// In the host's kernel.
    pub system_us: u64,
}

/// The size wanted of the balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonTarget {
    /// How much of the guest's RAM the balloon should hold.
    pub size: crate::units::Bytes,
}

/// What the balloon holds and what the guest tells of its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BalloonStatus {
    /// How much it should hold.
    pub target_bytes: u64,
    /// How much it holds.
    pub actual_bytes: u64,
    /// What the guest last told; absent until its driver has told anything. Asking for this
    /// also asks the guest, whose answer the next one gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMemoryStats>,
    /// How old that is, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_age_ms: Option<u64>,
}

/// The guest's own view of its memory (virtio 1.2, 5.5.6.3). Each figure is absent where the
/// guest's driver does not tell it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct GuestMemoryStats {
    /// Swapped in since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in_bytes: Option<u64>,
    /// Swapped out since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out_bytes: Option<u64>,
    /// Faults that needed the disk, since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Faults that did not, since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Unused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// All that the guest's kernel manages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// What could be had without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Cached file content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches_bytes: Option<u64>,
    /// Processes killed because memory ran out, since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
}

/// Where the serial console is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ConsoleInfo {
    /// The Unix stream socket that carries its bytes both ways.
    pub socket: String,
    /// The file with its latest output; what is older is in the same path with `.old` added.
    pub log: String,
    /// How much of the output the two files keep.
    pub log_limit_bytes: u64,
    /// How many are attached.
    pub attached: u32,
}

/// A snapshot to be taken.
///
/// With the request come open files, as ancillary data (`SCM_RIGHTS`) of the message that begins
/// it, each open for reading and writing and empty: one for the memory layer, one for the machine's
/// state, and for each disk in `disks` two: one for the layer that takes its writes from now on,
/// and one for what was written before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// What the snapshot holds.
    pub kind: SnapshotKind,
    /// The disks whose writes so far are frozen, in the order of the description. What is written
    /// to other disks goes where it went.
    pub disks: Vec<u32>,
    /// Whether the kernel and the initial RAM disk that the VM boots are written as well. Their
    /// files come after those of the memory and the state.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kernel: bool,
    /// The layers that the snapshot builds on. Where it is absent, a diff builds on all layers of
    /// the VM's parent, and a saved state on none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseLayers>,
    /// Whether the guest stays paused after a snapshot that succeeded. One more file comes last,
    /// empty as the others: the VM writes to it before the guest runs again, since what was saved
    /// is void from then on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stay_paused: bool,
}

/// The lowest layers of a VM's memory and disks, which a saved state builds on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BaseLayers {
    /// The number of memory layers.
    pub memory: u32,
    /// The number of layers of each disk of the VM, in the order of the description.
    pub disks: Vec<u32>,
}

/// What a snapshot holds, and what becomes of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// All of memory, and everything written over the disks' base images.
    #[default]
    Full,
    /// What changed since the template or the kept snapshot that the VM has as its parent. It
    /// is the parent of the next one, unless the VM has checkpoints.
    Diff,
    /// As `diff`, for a fork that happens at once: nothing is checksummed, and the VM's parent
    /// stays the same.
    Fork,
    /// The state of this VM itself, to which it is set back later: what changed since the layers
    /// of [`SnapshotRequest::base`]. It is checksummed, and the VM's parent stays the same.
    Save,
}

/// A snapshot that was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SnapshotTaken {
    /// The memory layer's id.
    pub memory_layer: String,
    /// The id of the layer that it lies on; absent for one that holds all of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_parent: Option<String>,
    /// How much of memory the layer holds.
    pub memory_bytes: u64,
    /// How much the machine's state takes.
    pub state_bytes: u64,
    /// What was frozen of each disk of the request.
    pub disks: Vec<DiskTaken>,
    /// Whether a kernel was written; a clone of an older template has none.
    #[serde(default)]
    pub kernel: bool,
    /// Whether an initial RAM disk was written.
    #[serde(default)]
    pub initrd: bool,
    /// Whether the snapshot is the VM's parent now, on which the next diff builds. While the VM has
    /// checkpoints its parent stays the same, since it may be rewound to before the snapshot.
    #[serde(default)]
    pub is_parent: bool,
    /// The CPU features that the guest sees.
    pub cpu: CpuFeatures,
    /// How long each stage took.
    pub times: SnapshotTimes,
}

/// What was frozen of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DiskTaken {
    /// Which, in the order of the description.
    pub index: u32,
    /// How many layers of the parent lie below what its file holds.
    pub parent_layers: u32,
    /// Whether its file holds a layer; where nothing was written it is empty.
    pub written: bool,
}

/// A migration of the VM to another host. The first two files that come with the request are what
/// the VM reads from and writes to: the stream to the other host. They are followed by two empty
/// files for each disk of the request, for what the guest writes meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// The lowest layers of memory and of each disk that the other host has; what is above them is
    /// sent.
    pub base: BaseLayers,
    /// The disks whose writes are sent, in the order of the description. The other disks must have
    /// the same content on both hosts.
    pub disks: Vec<u32>,
    /// The most bytes to send in a second while the guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// The longest expected pause of the guest, in milliseconds. A guest that writes so fast that its
    /// pause would be longer stays where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pause_ms: Option<u64>,
}

/// A VM that has arrived, and runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MigrationReceived {
    /// The bytes that came.
    pub bytes: u64,
    /// The pages that came with their content.
    pub data_pages: u64,
}

/// A VM that now runs on another host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MigrationDone {
    /// The bytes that were sent.
    pub bytes: u64,
    /// The pages that were sent with their content, each time that they were.
    pub data_pages: u64,
    /// The pages that were told to be zero.
    pub zero_pages: u64,
    /// The pages that were told to equal another one.
    pub equal_pages: u64,
    /// The bytes of disks that were sent.
    pub disk_bytes: u64,
    /// How often memory was sent while the guest ran.
    pub rounds: u32,
    /// From the pause of the guest here until the other host said that it runs, in microseconds.
    pub pause_us: u64,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
}

/// Whether the VM is to run here, and how far its migration is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MigrationStatus {
    /// Who may run the VM.
    pub custody: Custody,
    /// The CPU features that the guest sees; absent for a VM that was booted here, whose guest sees
    /// those of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuFeatures>,
    /// The migration that is going on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<MigrationProgress>,
}

/// Who may run a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Custody {
    /// This process.
    #[default]
    Here,
    /// The host that it comes from; not all of it is here.
    Incoming,
    /// The source host, until a confirmation gives this process the right to run the guest.
    Arrived,
    /// The destination host, unless a cancellation returns the right to run the guest to this process.
    Moved,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MigrationProgress {
    /// How often memory was sent so far.
    pub round: u32,
    /// The bytes that were sent so far.
    pub sent_bytes: u64,
    /// The bytes of memory that this round still has to send.
    pub left_bytes: u64,
    /// Whether the guest is paused for the last of it.
    pub paused: bool,
}

/// What a guest was told of its CPU, as far as hosts differ in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// The CPU's maker, as in `AuthenticAMD`.
    pub vendor: String,
    /// Feature bits by CPUID leaf and register, as in `7.ebx`.
    pub features: BTreeMap<String, u32>,
}

/// How long the stages of a snapshot took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SnapshotTimes {
    /// Copying memory while the guest ran.
    pub copy_us: u64,
    /// The pause of the guest, whole.
    pub pause_us: u64,
    /// Of the pause: stopping vCPUs and devices.
    pub stop_us: u64,
    /// Of the pause: copying what had changed meanwhile.
    pub last_copy_us: u64,
    /// Of the pause: reading the machine's state.
    pub save_us: u64,
    /// Of the pause: freezing disks.
    pub freeze_us: u64,
    /// After the pause: checksums, and the disks' files.
    pub finish_us: u64,
    /// How much memory was copied within the pause, in bytes.
    pub last_copy_bytes: u64,
}
