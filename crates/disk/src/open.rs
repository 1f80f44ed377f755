//! Assembles a disk from its open files.

use std::fs::File;
use std::sync::Arc;

use crate::block_map::BlockMap;
use crate::disk::{Disk, Stack};
use crate::engine::{Engine, EngineKind, Target};
use crate::error::{DiskError, io_error};
use crate::layer::{self, LayerHeader};
use crate::qcow2::{Backing, Qcow2Image};
use crate::remedy::Remedy;
use crate::room;
use crate::spec::{DiskFiles, Format, WriteFile};

/// The unit that guests address, in bytes.
const SECTOR: u64 = 512;

impl Disk {
    /// Assembles a disk. Opens no path, and makes the engine here because a jail may later forbid
    /// the system call that makes an io_uring.
    ///
    /// # Errors
    /// [`DiskError::Image`] for broken or hostile images, [`DiskError::Mismatch`] for files that do
    /// not belong together, [`DiskError::Io`] for errors of the host.
    pub fn open(files: DiskFiles, engine: EngineKind) -> Result<Self, DiskError> {
        let DiskFiles {
            base,
            backing,
            layers,
            writes,
        } = files;
        let into_base = matches!(writes, WriteFile::Base);
        let read_only = matches!(writes, WriteFile::Refused);
        if into_base && (base.is_none() || !layers.is_empty()) {
            return Err(DiskError::Mismatch(
                "writes can go into the base only where no layer lies over it".to_owned(),
            ));
        }
        let base = base
            .map(|(file, format)| open_base(file, format, backing, into_base))
            .transpose()?;
        let layered = !layers.is_empty() || matches!(writes, WriteFile::Layer { .. });
        let (target, size) = match (base, layered) {
            (None, false) => {
                return Err(DiskError::Mismatch(
                    "neither an image nor a layer".to_owned(),
                ));
            }
            (Some((target, size)), false) => {
                let engine = new_engine(engine, vec![target])?;
                return Ok(Self::new(engine, None, size, read_only));
            }
            (Some((target, size)), true) => (Some(target), size),
            (None, true) => (None, 0),
        };
        let (mut stack, files) = open_stack(target.is_some(), size, layers, writes)?;
        let size = stack.top().virtual_size.next_multiple_of(SECTOR);
        let files: Vec<Arc<File>> = files.into_iter().map(Arc::new).collect();
        if let Some(top) = files.last().filter(|_| stack.writable) {
            stack.room = room::of_layer(top, stack.durable)?;
        }
        let files: Vec<Target> = files.into_iter().map(Target::File).collect();
        // Without a base, nothing is read from target 0, but the layers are still numbered from 1.
        let lowest = target.unwrap_or_else(|| files[0].clone());
        let targets = std::iter::once(lowest).chain(files).collect();
        Ok(Self::new(
            new_engine(engine, targets)?,
            Some(stack),
            size,
            read_only,
        ))
    }
}

fn new_engine(kind: EngineKind, targets: Vec<Target>) -> Result<Engine, DiskError> {
    Engine::new(kind, targets).map_err(io_error("set up the disk's input and output"))
}

fn open_base(
    file: File,
    format: Format,
    backing: Vec<(File, Format)>,
    writable: bool,
) -> Result<(Target, u64), DiskError> {
    match format {
        Format::Raw if !backing.is_empty() => Err(DiskError::Mismatch(
            "a raw image has no backing files".to_owned(),
        )),
        Format::Raw => {
            let size = crate::size_of(&file)?.next_multiple_of(SECTOR);
            if size == 0 {
                return Err(DiskError::Image {
                    format: "raw",
                    reason: "it is empty".to_owned(),
                    remedy: Remedy::Unknown,
                });
            }
            Ok((Target::File(Arc::new(file)), size))
        }
        Format::Qcow2 => {
            let backing = backing.into_iter().map(|(file, format)| match format {
                Format::Raw => Backing::Raw(file),
                Format::Qcow2 => Backing::Qcow2(file),
            });
            let image = Qcow2Image::open(file, writable, backing.collect())?;
            let size = image.size();
            Ok((Target::Qcow2(Arc::new(image)), size))
        }
    }
}

/// Opens the layers, lowest first and the writable one last, and merges their maps.
fn open_stack(
    has_base: bool,
    base_size: u64,
    layers: Vec<File>,
    writes: WriteFile,
) -> Result<(Stack, Vec<File>), DiskError> {
    let mut headers: Vec<LayerHeader> = Vec::new();
    let mut map = BlockMap::default();
    let mut files = layers;
    let frozen = files.len();
    let durable = match writes {
        WriteFile::Layer { file, durable } => {
            files.push(file);
            Some(durable)
        }
        WriteFile::Refused | WriteFile::Base => None,
    };
    for (index, file) in files.iter().enumerate() {
        let top = index == frozen;
        let header = if top && crate::size_of(file)? == 0 {
            new_top(file, base_size, &headers, durable == Some(true))?
        } else {
            LayerHeader::read(file)?
        };
        Stack::check_next(&headers, base_size, &header)?;
        // `check_next` bounds the number of layers below 254.
        layer::load_map(file, &header, &mut map, index as u8 + 1, top)?;
        headers.push(header);
    }
    let mut stack = Stack::new(has_base, headers, map);
    stack.writable = durable.is_some();
    stack.durable = durable == Some(true);
    Ok((stack, files))
}

/// Makes a layer over `below` from an empty file.
fn new_top(
    file: &File,
    base_size: u64,
    below: &[LayerHeader],
    durable: bool,
) -> Result<LayerHeader, DiskError> {
    let size = below.last().map_or(base_size, |header| header.virtual_size);
    let mut header = LayerHeader::new(size, below.last().map(|header| header.id))?;
    header.block_size = below
        .last()
        .map_or(header.block_size, |header| header.block_size);
    layer::create(file, &header)?;
    if durable {
        file.sync_all()
            .map_err(io_error("make the new layer durable"))?;
    }
    Ok(header)
}
