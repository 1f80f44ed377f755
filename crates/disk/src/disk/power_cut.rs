//! Power cuts at every moment: of what was not yet made durable, any part may be on the disk or
//! not, in pieces of a sector. What was flushed must be there, and the rest must be a state that
//! the disk was in since.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::Disk;
use crate::engine::EngineKind;
use crate::op_kind::OpKind;
use crate::request::Request;
use crate::spec::{DiskFiles, Format, WriteFile};

const SECTOR: usize = 512;
const SECTORS: usize = 64;

#[derive(Clone, Debug)]
enum Step {
    Write {
        sector: usize,
        count: usize,
        value: u8,
    },
    Zero {
        sector: usize,
        count: usize,
    },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SECTORS, 1..17usize).prop_map(|(s, c)| (s, c.min(SECTORS - s)));
    prop_oneof![
        4 => (range.clone(), 1u8..=255).prop_map(|((sector, count), value)| {
            Step::Write { sector, count, value }
        }),
        1 => range.prop_map(|(sector, count)| Step::Zero { sector, count }),
        2 => Just(Step::Flush),
    ]
}

fn copy(file: &File) -> File {
    let copy = tempfile::tempfile().unwrap();
    let len = file.metadata().unwrap().len();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    copy.write_all_at(&bytes, 0).unwrap();
    copy
}

fn open(base: &File, top: File) -> Disk {
    let files = DiskFiles {
        base: Some((base.try_clone().unwrap(), Format::Raw)),
        backing: Vec::new(),
        layers: Vec::new(),
        writes: WriteFile::Layer {
            file: top,
            durable: true,
        },
    };
    Disk::open(files, EngineKind::Blocking).unwrap()
}

fn content(disk: &mut Disk) -> Vec<u8> {
    let mut bytes = vec![0; SECTORS * SECTOR];
    disk.read_at(&mut bytes, 0).unwrap();
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

/// A step that was taken: the log's length after it, and the content then.
struct Taken {
    log_len: usize,
    flush: bool,
    model: Vec<u8>,
}

fn take(disk: &mut Disk, model: &mut [u8], step: &Step) -> Taken {
    let at = |sector: usize| (sector * SECTOR) as u64;
    match *step {
        Step::Write {
            sector,
            count,
            value,
        } => {
            disk.write_at(&vec![value; count * SECTOR], at(sector))
                .unwrap();
            model[sector..sector + count].fill(value);
        }
        Step::Zero { sector, count } => {
            let (offset, len, unmap) = (at(sector), at(count), true);
            disk.call(Request::WriteZeroes { offset, len, unmap })
                .unwrap();
            model[sector..sector + count].fill(0);
        }
        Step::Flush => disk.call(Request::Flush).unwrap(),
    }
    Taken {
        log_len: disk.engine.log.len(),
        flush: matches!(step, Step::Flush),
        model: model.to_vec(),
    }
}

/// The top's file after a power cut behind the first `cut` ops; `lost` tells, piece by piece, what
/// of the writes that were not made durable is gone.
fn after_cut(disk: &Disk, fresh: &File, cut: usize, mut lost: impl Iterator<Item = bool>) -> File {
    let file = copy(fresh);
    let log = &disk.engine.log[..cut];
    let durable = log
        .iter()
        .rposition(|(op, _)| matches!(op.kind, OpKind::Sync));
    for (position, (op, bytes)) in log.iter().enumerate() {
        let safe = durable.is_some_and(|sync| position < sync);
        let mut apply = |offset: u64, piece: &[u8]| {
            if safe || !lost.next().unwrap() {
                file.write_all_at(piece, offset).unwrap();
            }
        };
        match op.kind {
            OpKind::Write(_) => {
                let mut done = 0;
                while done < bytes.len() {
                    let at = op.offset + done as u64;
                    // Pieces end where sectors of the file end.
                    let len = (SECTOR - at as usize % SECTOR).min(bytes.len() - done);
                    apply(at, &bytes[done..done + len]);
                    done += len;
                }
            }
            OpKind::Discard { len } => apply(op.offset, &vec![0; len as usize]),
            _ => {}
        }
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_power_cut_keeps_what_was_flushed_and_invents_nothing(
        steps in prop::collection::vec(step(), 1..16),
        seed in any::<u64>(),
    ) {
        let base = tempfile::tempfile().unwrap();
        let mut model: Vec<u8> = (0..SECTORS).map(|sector| sector as u8 + 100).collect();
        for (sector, value) in model.iter().enumerate() {
            base.write_all_at(&[*value; SECTOR], (sector * SECTOR) as u64).unwrap();
        }
        let top = tempfile::tempfile().unwrap();
        let mut disk = open(&base, top.try_clone().unwrap());
        let fresh = copy(&top);
        let start = Taken { log_len: 0, flush: true, model: model.clone() };
        let mut taken = vec![start];
        for step in &steps {
            taken.push(take(&mut disk, &mut model, step));
        }
        let mut random = seed | 1;
        for cut in 0..=disk.engine.log.len() {
            let coin = std::iter::from_fn(|| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                Some(random & 4 != 0)
            });
            let file = after_cut(&disk, &fresh, cut, coin);
            let seen = content(&mut open(&base, file));
            let flushed = taken.iter().rposition(|t| t.flush && t.log_len <= cut).unwrap();
            // The step that was cut in two counts too.
            let under_way = taken.iter().position(|t| t.log_len > cut).unwrap_or(taken.len() - 1);
            for (sector, value) in seen.iter().enumerate() {
                let possible = taken[flushed..=under_way.max(flushed)]
                    .iter()
                    .any(|state| state.model[sector] == *value);
                prop_assert!(possible, "cut after {cut} ops: sector {sector} holds {value}");
            }
        }
    }
}
