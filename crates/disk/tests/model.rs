//! Disks of every make against a plain array: writes, zeros and discards, many at once, with
//! flushes, freezes, clean and unclean ends in between.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::PathBuf;

use clone_disk::{
    Buffer, Completion, Disk, DiskSpec, EngineKind, Format, Request, WriteFile, Writes,
};
use imago::FormatCreateBuilder;
use proptest::prelude::*;

const SECTOR: usize = 512;
const SECTORS: usize = 601;

#[derive(Clone, Debug)]
enum Change {
    Write {
        sector: usize,
        count: usize,
        value: u8,
    },
    Zero {
        sector: usize,
        count: usize,
        unmap: bool,
    },
    Discard {
        sector: usize,
        count: usize,
    },
}

#[derive(Clone, Debug)]
enum Step {
    /// Changes under way together; those that overlap an earlier one are left out.
    Batch(Vec<Change>),
    Flush,
    Freeze,
    /// Ended in order and opened again.
    Reopen,
    /// Killed, and opened again from what its files hold.
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Raw,
    Qcow2,
    None,
}

impl Change {
    fn range(&self) -> std::ops::Range<usize> {
        match *self {
            Self::Write { sector, count, .. }
            | Self::Zero { sector, count, .. }
            | Self::Discard { sector, count } => sector..sector + count,
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    let range = (0..SECTORS, prop_oneof![3 => 1usize..20, 1 => 1usize..200])
        .prop_map(|(sector, count)| (sector, count.min(SECTORS - sector)));
    prop_oneof![
        4 => (range.clone(), 1u8..=255).prop_map(|((sector, count), value)| {
            Change::Write { sector, count, value }
        }),
        1 => (range.clone(), any::<bool>()).prop_map(|((sector, count), unmap)| {
            Change::Zero { sector, count, unmap }
        }),
        1 => range.prop_map(|(sector, count)| Change::Discard { sector, count }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => prop::collection::vec(change(), 1..12).prop_map(Step::Batch),
        2 => Just(Step::Flush),
        1 => Just(Step::Freeze),
        1 => Just(Step::Reopen),
        2 => Just(Step::Kill),
    ]
}

/// A disk of layers beside what it should hold, one value for each sector.
struct Rig {
    directory: tempfile::TempDir,
    engine: EngineKind,
    spec: DiskSpec,
    files: usize,
    disk: Option<Disk>,
    model: Vec<u8>,
    /// What the disk held at the last flush and after each batch since.
    since_flush: Vec<Vec<u8>>,
}

impl Rig {
    fn new(base: Base, engine: EngineKind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base");
        let mut model: Vec<u8> = (0..SECTORS)
            .map(|sector| (sector % 251 + 1) as u8)
            .collect();
        let format = match base {
            Base::Raw => {
                let bytes: Vec<u8> = model.iter().flat_map(|value| [*value; SECTOR]).collect();
                std::fs::write(&path, bytes).unwrap();
                Format::Raw
            }
            Base::Qcow2 => {
                make_qcow2(&path, (SECTORS * SECTOR) as u64);
                fill_qcow2(&path, &model);
                Format::Qcow2
            }
            Base::None => {
                model.fill(0);
                Format::Raw
            }
        };
        let mut spec = DiskSpec::image(&path, format, false);
        spec.writes = Writes::Layer(directory.path().join("layer-0"));
        if base == Base::None {
            // A first layer has its size from a base; this one is then used without.
            let sizing = File::create_new(&path).unwrap();
            sizing.set_len((SECTORS * SECTOR) as u64).unwrap();
            drop(Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap());
            spec.base = None;
        }
        let mut rig = Self {
            directory,
            engine,
            spec,
            files: 1,
            disk: None,
            since_flush: vec![model.clone()],
            model,
        };
        rig.open();
        rig
    }

    fn open(&mut self) {
        self.disk = Some(Disk::open(self.spec.open().unwrap(), self.engine).unwrap());
    }

    fn disk(&mut self) -> &mut Disk {
        self.disk.as_mut().unwrap()
    }

    fn new_path(&mut self) -> PathBuf {
        self.files += 1;
        self.directory.path().join(format!("layer-{}", self.files))
    }

    /// The value of each sector, all of whose bytes must agree.
    fn content(&mut self) -> Vec<u8> {
        let mut bytes = vec![0xee; SECTORS * SECTOR];
        self.disk().read_at(&mut bytes, 0).unwrap();
        let sectors = bytes.chunks_exact(SECTOR);
        sectors
            .map(|sector| {
                assert!(
                    sector.iter().all(|byte| *byte == sector[0]),
                    "a torn sector"
                );
                sector[0]
            })
            .collect()
    }

    fn batch(&mut self, changes: &[Change]) {
        let mut taken = vec![false; SECTORS];
        let mut memory = Vec::new();
        let mut discards = Vec::new();
        let disk = self.disk.as_mut().unwrap();
        let mut count = 0;
        for change in changes {
            if taken[change.range()].contains(&true) {
                continue;
            }
            taken[change.range()].fill(true);
            count += 1;
            let offset = (change.range().start * SECTOR) as u64;
            let len = change.range().len() * SECTOR;
            let request = match change {
                Change::Write { value, .. } => {
                    self.model[change.range()].fill(*value);
                    let mut bytes = vec![*value; len].into_boxed_slice();
                    // Two buffers, cut where no sector ends.
                    let cut = len / 2 + 7;
                    let start = bytes.as_mut_ptr();
                    // SAFETY: `memory` keeps the bytes until the batch is drained.
                    let first = unsafe { Buffer::new(start, cut) };
                    // SAFETY: as above.
                    let second = unsafe { Buffer::new(start.wrapping_add(cut), len - cut) };
                    memory.push(bytes);
                    Request::Write {
                        offset,
                        buffers: vec![first, second].into(),
                    }
                }
                Change::Zero { unmap, .. } => {
                    self.model[change.range()].fill(0);
                    Request::WriteZeroes {
                        offset,
                        len: len as u64,
                        unmap: *unmap,
                    }
                }
                Change::Discard { .. } => {
                    discards.push(change.range());
                    Request::Discard {
                        offset,
                        len: len as u64,
                    }
                }
            };
            disk.submit(count, request);
        }
        let mut answers: Vec<Completion> = Vec::new();
        disk.drain(&mut answers).unwrap();
        assert_eq!(answers.len() as u64, count);
        answers
            .into_iter()
            .for_each(|answer| answer.result.unwrap());
        let content = self.content();
        for sector in discards.into_iter().flatten() {
            if content[sector] == 0 {
                self.model[sector] = 0;
            }
        }
        assert_eq!(content, self.model);
        self.since_flush.push(self.model.clone());
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Batch(changes) => return self.batch(changes),
            Step::Flush => self.disk().call(Request::Flush).unwrap(),
            Step::Freeze => self.freeze(),
            Step::Reopen => {
                self.disk().seal(false).unwrap();
                self.disk = None;
                self.open();
            }
            Step::Kill => self.kill(),
        }
        let content = self.content();
        assert_eq!(content, self.model, "after {step:?}");
        self.since_flush = vec![self.model.clone()];
    }

    fn freeze(&mut self) {
        let path = self.new_path();
        let next = DiskSpec {
            writes: Writes::Layer(path.clone()),
            ..DiskSpec::image("unused", Format::Raw, false)
        };
        let next = DiskSpec { base: None, ..next };
        let WriteFile::Layer { file, durable } = next.open().unwrap().writes else {
            panic!("a layer was asked for");
        };
        self.disk().freeze(file, durable).unwrap();
        if let Writes::Layer(old) = std::mem::replace(&mut self.spec.writes, Writes::Layer(path)) {
            self.spec.layers.push(old);
        }
    }

    /// Nothing in memory is saved: what counts is in the files, as their copies show it.
    fn kill(&mut self) {
        let copy = self.new_path();
        if let Writes::Layer(top) = &self.spec.writes {
            std::fs::copy(top, &copy).unwrap();
        }
        self.disk = None;
        self.spec.writes = Writes::Layer(copy);
        self.open();
        let content = self.content();
        for (sector, value) in content.iter().enumerate() {
            let possible = self.since_flush.iter().any(|state| state[sector] == *value);
            assert!(
                possible,
                "sector {sector} holds {value}, which it never did since the flush"
            );
        }
        self.model = content;
    }
}

fn make_qcow2(path: &std::path::Path, size: u64) {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    let file = imago::file::File::try_from(file).unwrap();
    imago::qcow2::Qcow2::<_>::create_builder(file)
        .size(size)
        .create()
        .unwrap();
}

fn fill_qcow2(path: &std::path::Path, values: &[u8]) {
    let spec = DiskSpec::image(path, Format::Qcow2, false);
    let mut disk = Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap();
    for (sector, value) in values.iter().enumerate() {
        disk.write_at(&[*value; SECTOR], (sector * SECTOR) as u64)
            .unwrap();
    }
    disk.call(Request::Flush).unwrap();
}

/// Plain images, without layers.
fn plain(format: Format, engine: EngineKind, batches: &[Vec<Change>]) {
    let mut rig = Rig::new(
        if format == Format::Raw {
            Base::Raw
        } else {
            Base::Qcow2
        },
        engine,
    );
    rig.disk = None;
    rig.spec.writes = Writes::Base;
    rig.open();
    for batch in batches {
        rig.batch(batch);
        rig.disk().call(Request::Flush).unwrap();
    }
    rig.disk = None;
    rig.open();
    assert_eq!(rig.content(), rig.model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layers_hold_what_an_array_would(
        steps in prop::collection::vec(step(), 1..25),
        base in prop_oneof![Just(Base::Raw), Just(Base::Qcow2), Just(Base::None)],
        engine in prop_oneof![
            Just(EngineKind::Uring), Just(EngineKind::Worker), Just(EngineKind::Blocking)
        ],
    ) {
        let mut rig = Rig::new(base, engine);
        for step in &steps {
            rig.run(step);
        }
    }

    #[test]
    fn images_hold_what_an_array_would(
        batches in prop::collection::vec(prop::collection::vec(change(), 1..10), 1..10),
        format in prop_oneof![Just(Format::Raw), Just(Format::Qcow2)],
        engine in prop_oneof![
            Just(EngineKind::Uring), Just(EngineKind::Worker), Just(EngineKind::Blocking)
        ],
    ) {
        plain(format, engine, &batches);
    }
}

#[test]
fn this_host_offers_the_ring_that_the_other_tests_are_about() {
    let rig = Rig::new(Base::Raw, EngineKind::Uring);
    let forbidden = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let expected = forbidden.is_ok_and(|value| value.trim() == "0");
    assert_eq!(rig.disk.unwrap().uses_ring(), expected);
}

#[test]
fn writes_to_neighbouring_sectors_of_one_block_all_survive() {
    for engine in [EngineKind::Uring, EngineKind::Worker] {
        for _ in 0..20 {
            let mut rig = Rig::new(Base::Raw, engine);
            let changes: Vec<Change> = (0..64)
                .map(|sector| Change::Write {
                    sector: sector * 7 % 64,
                    count: 1,
                    value: 200,
                })
                .collect();
            rig.batch(&changes);
        }
    }
}
