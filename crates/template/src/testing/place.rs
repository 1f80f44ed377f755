//! Test support: a directory for templates of machines that never ran.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use clone_api::config::{DiskConfig, NetConfig, NetMode, Overlay};
use clone_api::control::CpuFeatures;
use clone_api::shape::Ceilings;
use clone_api::{Shape, VmConfig};
use clone_disk::{Disk, DiskSpec, EngineKind, Format};
use clone_memory::{Checksums, GuestMemory, LayerWriter, PageSet, RamLayout};
use clone_start::disks;
use clone_start::error::Result;
use clone_start::fits::kinds;
use clone_vmm::machine::{BoardState, MachineState, VmClock};
use clone_vmm::pci::virtio_pci::VirtioPciState;
use clone_vmm::snapshot;
use clone_vmm::vcpu::VcpuState;
use vm_memory::{Bytes, GuestAddress};

use crate::Verified;
use crate::{NewTemplate, Parts, Store, Template};

/// RAM of the machines, in bytes.
pub const RAM: u64 = 16 << 20;
/// The kernel that a template's guest would reboot into.
const KERNEL: &[u8] = b"a kernel";

/// A directory for a test, with a store of templates and a runtime directory in it.
#[derive(Debug)]
pub struct Place {
    /// The directory; it goes with this.
    pub dir: tempfile::TempDir,
    /// The record of verified templates: `run` in the directory.
    pub verified: Verified,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// Makes an empty place.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        let verified = Verified::in_dir(run);
        Self { dir, verified }
    }

    /// The place's store.
    pub fn store(&self) -> Store {
        Store::at(self.dir.path().join("store"))
    }

    /// The path of the template `name` in the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.store().path(name).unwrap()
    }

    fn image(&self) -> PathBuf {
        let path = self.dir.path().join("disk.img");
        fs::write(&path, [7; 8192]).unwrap();
        path
    }

    /// Makes a template of a VM that never ran, over `parent` if given.
    pub fn make(&self, name: &str, parent: Option<&Template>) -> Template {
        let mut new = NewTemplate::begin(&self.path(name)).unwrap();
        self.fill(&mut new, parent).unwrap();
        new.commit(self.parts(parent), Some(&self.verified))
            .unwrap()
    }

    /// Gives a new template all of its files.
    pub fn fill(&self, new: &mut NewTemplate, parent: Option<&Template>) -> Result<()> {
        let layout = RamLayout::new(RAM).unwrap();
        let mut below = None;
        if let Some(parent) = parent {
            new.share_memory(parent)?;
            below = Some(parent.memory()?.top().id());
        }
        let memory = GuestMemory::anonymous(&layout).unwrap();
        let mark = if parent.is_some() { 2u64 } else { 1 };
        memory.ram().write_obj(mark, GuestAddress(8192)).unwrap();
        let file = new.memory_file()?;
        let mut writer = LayerWriter::new(file, "memory", layout, below).unwrap();
        let pages: PageSet = std::iter::once(2..4).collect();
        writer.copy(&memory, &pages).unwrap();
        writer.finish(Checksums::Yes).unwrap();
        let shape = Shape::of(&self.config(), &[0]);
        let state = MachineState {
            vcpus: vec![VcpuState::blank()],
            board: BoardState::fresh(),
            clock: VmClock { nanoseconds: 1 },
            devices: kinds(&shape).into_iter().map(device_state).collect(),
        };
        let mut file = new.state_file()?;
        file.write_all(&snapshot::encode(&state).unwrap()).unwrap();
        match parent {
            Some(parent) => {
                new.share_kernel(parent)?;
                new.share_disk(parent, 0, usize::MAX)?;
                let file = new.disk_layer_file(0)?;
                let frozen = written_disk(parent).frozen(0).unwrap();
                frozen.export(&file).unwrap();
                Ok(())
            }
            None => {
                new.kernel_file()?.write_all(KERNEL).unwrap();
                new.copy_disk(&disks::as_base(&self.config().disks[0]))
            }
        }
    }

    /// The description of the VM that never ran, with every host resource that can be requested.
    pub fn config(&self) -> VmConfig {
        VmConfig {
            name: "never-was".into(),
            kernel: "/never/was".into(),
            memory: clone_api::Bytes(RAM),
            disks: vec![DiskConfig {
                path: self.image(),
                overlay: Overlay::Ephemeral,
                ..DiskConfig::default()
            }],
            net: vec![NetConfig {
                mode: NetMode::Bridge,
                bridge: Some("never-was".into()),
                neighbours: true,
                ..NetConfig::default()
            }],
            ..VmConfig::default()
        }
    }

    /// The parts of a manifest that are not determined by the files.
    pub fn parts(&self, parent: Option<&Template>) -> Parts {
        Parts {
            parent: parent.map(|parent| parent.manifest().id.clone()),
            agent_version: None,
            shape: Shape::of(&self.config(), &[0]),
            ceilings: Ceilings::of(&self.config()),
            cpu: CpuFeatures::default(),
            created_unix_ms: 5,
        }
    }
}

/// The disk of a template, whose second page a VM has written since.
fn written_disk(template: &Template) -> Disk {
    let spec = DiskSpec {
        writes: clone_disk::Writes::Ephemeral(None),
        ..DiskSpec::image(template.dir().join("disk-0.raw"), Format::Raw, true)
    };
    let mut disk = Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap();
    disk.write_at(&[9; 4096], 4096).unwrap();
    disk.freeze(tempfile::tempfile().unwrap(), false).unwrap();
    disk
}

/// The saved state of a device of this kind which no driver has seen, and that has no state of its
/// own.
pub fn device_state(kind: u32) -> VirtioPciState {
    // The first field is the kind; all others are zero.
    let mut bytes = [0; 64];
    bytes[0] = u8::try_from(kind).unwrap();
    postcard::from_bytes(&bytes).unwrap()
}
