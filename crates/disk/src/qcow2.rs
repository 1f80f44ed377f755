//! qcow2 images: a strict check of the header, then the `imago` crate for everything else.
//!
//! The header is checked before `imago` reads the file, because an image may be hostile, and tables
//! are read whole into memory by sizes in it. Paths in a header are never followed: a backing file
//! is used only if the caller opened one. Calls here block; threads are left to the engine.
//!
//! Source: QEMU's `docs/interop/qcow2.rst`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use vm_memory::VolatileSlice;

use crate::ZEROS;
use crate::buffer::Buffers;
use crate::error::{DiskError, io_error};
use crate::op_kind::OpKind;
use crate::remedy::Remedy;

/// The first bytes of every qcow2 image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The largest virtual size that is accepted, since the memory that a header can make us allocate
/// grows with it.
const MAX_SIZE: u64 = 64 << 40;
/// The largest first-level table that is accepted, in bytes (16 TiB of disk with 64 KiB clusters).
const MAX_L1_BYTES: u64 = 4 << 20;
/// The largest refcount table that is accepted, in bytes, as in QEMU.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

type Image = FormatAccess<imago::file::File>;

/// The checked header of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// The size of a cluster in bytes.
    pub cluster_size: u64,
    /// The backing file in the header, for people: it must not be trusted as a path, and bytes that
    /// are not UTF-8 are replaced.
    pub backing_file: Option<String>,
    /// Whether the reference counts were not written when the image was last used. The image must
    /// not be written before they are repaired.
    pub dirty: bool,
}

impl Qcow2Header {
    /// Reads and checks the header of `file`.
    ///
    /// # Errors
    /// [`DiskError::Image`] with the reason where the image is broken, hostile or uses features
    /// that are not supported; [`DiskError::Io`] where it cannot be read.
    pub fn read(file: &File) -> Result<Self, DiskError> {
        let file_size = crate::size_of(file)?;
        let mut bytes = [0u8; 104];
        file.read_exact_at(&mut bytes[..72], 0)
            .map_err(|_| refused("shorter than a header"))?;
        if bytes[..4] != MAGIC {
            return Err(refused("no qcow2 magic number"));
        }
        match be32(&bytes, 4) {
            2 => {}
            3 => file
                .read_exact_at(&mut bytes, 0)
                .map_err(|_| refused("shorter than a header"))?,
            1 => return Err(refused("it has version 1").remedied(Remedy::Convert("qcow"))),
            version => return Err(refused(format!("version {version} is not supported"))),
        }
        let header = Self::check(&bytes, file_size)?;
        let backing_file = backing_name(file, &bytes, header.cluster_size)?;
        Ok(Self {
            backing_file,
            ..header
        })
    }

    /// Checks the fixed part of the header.
    fn check(bytes: &[u8; 104], file_size: u64) -> Result<Self, DiskError> {
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(refused(format!("cluster size of 2^{cluster_bits} bytes")));
        }
        let cluster_size = 1u64 << cluster_bits;
        let virtual_size = be64(bytes, 24);
        if virtual_size == 0 || virtual_size > MAX_SIZE || !virtual_size.is_multiple_of(512) {
            return Err(refused(format!("virtual size of {virtual_size} bytes")));
        }
        if be32(bytes, 32) != 0 {
            return Err(refused("it is encrypted").remedied(Remedy::Decrypt("qcow2")));
        }
        if be32(bytes, 60) != 0 {
            return Err(refused("it has internal snapshots").remedied(Remedy::Plain));
        }
        // Each 8-byte entry refers to a cluster of entries, each of which refers to a cluster.
        let per_l1_entry = cluster_size / 8 * cluster_size;
        let l1_bytes = u64::from(be32(bytes, 36)) * 8;
        if l1_bytes < virtual_size.div_ceil(per_l1_entry) * 8 {
            return Err(refused("first-level table shorter than the disk"));
        }
        table(
            "first-level table",
            be64(bytes, 40),
            l1_bytes,
            MAX_L1_BYTES,
            cluster_size,
            file_size,
        )?;
        let refcounts = u64::from(be32(bytes, 56)) * cluster_size;
        table(
            "refcount table",
            be64(bytes, 48),
            refcounts,
            MAX_REFCOUNT_TABLE_BYTES,
            cluster_size,
            file_size,
        )?;
        // Version 2 has none of this, and the bytes are zero.
        let incompatible = be64(bytes, 72);
        for (bit, feature, remedy) in [
            (1, "it is marked as corrupt", Remedy::Repair),
            (2, "it has an external data file", Remedy::Plain),
            (3, "its compression type is not supported", Remedy::Plain),
            (4, "it has extended second-level entries", Remedy::Plain),
        ] {
            if incompatible & (1 << bit) != 0 {
                return Err(refused(feature).remedied(remedy));
            }
        }
        if incompatible >> 5 != 0 {
            let unknown = format!("unknown features {incompatible:#x}");
            return Err(refused(unknown).remedied(Remedy::Plain));
        }
        if be32(bytes, 4) == 3 && be32(bytes, 96) > 6 {
            return Err(refused("refcounts wider than 64 bits"));
        }
        Ok(Self {
            virtual_size,
            cluster_size,
            backing_file: None,
            dirty: incompatible & 1 != 0,
        })
    }

    /// Checks that the image can be used as requested: with or without a backing file, for writing
    /// or not.
    pub(crate) fn check_use(&self, writable: bool, has_backing: bool) -> Result<(), DiskError> {
        match &self.backing_file {
            Some(name) if !has_backing => {
                let why = format!(
                    "it needs the backing file {name:?}, and names in images are not followed"
                );
                return Err(refused(why).remedied(Remedy::GiveBacking));
            }
            None if has_backing => {
                return Err(refused("a backing file was given, and it has none"));
            }
            _ => {}
        }
        if writable && self.dirty {
            let why = "it was not closed properly, and its counts of references may be wrong";
            return Err(refused(why).remedied(Remedy::Repair));
        }
        Ok(())
    }
}

/// Checks that a table is inside the file and aligned.
fn table(
    name: &str,
    offset: u64,
    len: u64,
    max_len: u64,
    cluster_size: u64,
    file_size: u64,
) -> Result<(), DiskError> {
    if len == 0 || len > max_len {
        return Err(refused(format!("{name} of {len} bytes")));
    }
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= file_size.next_multiple_of(cluster_size));
    if offset < cluster_size || !offset.is_multiple_of(cluster_size) || !inside {
        return Err(refused(format!("{name} outside of the file")));
    }
    Ok(())
}

/// The backing file's name in the header.
fn backing_name(
    file: &File,
    bytes: &[u8; 104],
    cluster_size: u64,
) -> Result<Option<String>, DiskError> {
    let (offset, len) = (be64(bytes, 8), be32(bytes, 16));
    if offset == 0 {
        return Ok(None);
    }
    if len > 1023
        || offset
            .checked_add(u64::from(len))
            .is_none_or(|end| end > cluster_size)
    {
        return Err(refused("backing file name outside of the header"));
    }
    let mut name = vec![0; len as usize];
    file.read_exact_at(&mut name, offset)
        .map_err(|_| refused("backing file name outside of the file"))?;
    Ok(Some(String::from_utf8_lossy(&name).into_owned()))
}

/// A file of a chain of backing files, opened by the caller.
pub(crate) enum Backing {
    /// A raw image: the end of a chain.
    Raw(File),
    /// A qcow2 image.
    Qcow2(File),
}

/// An open qcow2 image with its backing files.
pub(crate) struct Qcow2Image {
    image: Image,
    size: u64,
}

impl Qcow2Image {
    /// Opens `file` over `backing`, nearest first.
    pub(crate) fn open(
        file: File,
        writable: bool,
        backing: Vec<Backing>,
    ) -> Result<Self, DiskError> {
        let mut below: Option<Arc<Image>> = None;
        for part in backing.into_iter().rev() {
            let image = match part {
                Backing::Raw(file) if below.is_none() => open_raw(file)?,
                Backing::Raw(_) => return Err(refused("a raw backing file cannot have another")),
                Backing::Qcow2(file) => open_one(file, false, below.take())?,
            };
            below = Some(Arc::new(image));
        }
        let image = open_one(file, writable, below)?;
        let size = image.size();
        Ok(Self { image, size })
    }

    /// The size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Executes an op and waits for it.
    pub(crate) fn execute(&self, offset: u64, kind: OpKind) -> io::Result<()> {
        match kind {
            OpKind::Read(buffers) => {
                // Layers round their size up to blocks, so they may request bytes beyond the end.
                let inside = self.size.saturating_sub(offset).min(buffers.len());
                buffers.range(inside, buffers.len() - inside).fill_zero();
                if inside == 0 {
                    return Ok(());
                }
                let slices = volatile(&buffers.range(0, inside));
                let (vector, _guard) = IoVectorMut::from_volatile_slice(&slices);
                self.image.readv(vector, offset)
            }
            OpKind::Write(buffers) | OpKind::Fill { buffers, .. } => {
                let slices = volatile(&buffers);
                let (vector, _guard) = IoVector::from_volatile_slice(&slices);
                self.image.writev(vector, offset)
            }
            OpKind::Sync => {
                self.image.flush()?;
                self.image.sync()
            }
            OpKind::Zero { len, punch: false } => {
                let result = self.image.write_zeroes(offset, len);
                self.or_by_hand(result, offset, len)
            }
            OpKind::Zero { len, punch: true } => {
                let result = self.discard(offset, len);
                self.or_by_hand(result, offset, len)
            }
            OpKind::Discard { len } => match self.discard(offset, len) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                result => result,
            },
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: an image is used by one thread at a time (its disk's worker, or the caller of a
        // blocking disk), and no mapping is held between calls.
        unsafe { self.image.discard_to_zero_unsafe(offset, len) }
    }

    /// Writes zeros where the image cannot have clusters of zeros (version 2).
    fn or_by_hand(&self, result: io::Result<()>, offset: u64, len: u64) -> io::Result<()> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            result => return result,
        }
        let mut done = 0;
        while done < len {
            let chunk = ZEROS
                .len()
                .min(usize::try_from(len - done).unwrap_or(usize::MAX));
            self.image.write(&ZEROS[..chunk], offset + done)?;
            done += chunk as u64;
        }
        Ok(())
    }
}

/// Converts the buffers to `imago`'s type.
fn volatile(buffers: &Buffers) -> Vec<VolatileSlice<'static>> {
    buffers
        .iter()
        // SAFETY: `Buffer::new` was promised that the memory stays mapped until the op is over,
        // and the slices do not outlive the op.
        .map(|buffer| unsafe { VolatileSlice::new(buffer.address(), buffer.len()) })
        .collect()
}

fn open_raw(file: File) -> Result<Image, DiskError> {
    let file = imago::file::File::try_from(file).map_err(io_error("open the raw backing file"))?;
    let raw = Raw::builder(file)
        .open(DenyImplicitOpenGate::default())
        .map_err(io_error("open the raw backing file"))?;
    Ok(FormatAccess::new(raw))
}

fn open_one(file: File, writable: bool, below: Option<Arc<Image>>) -> Result<Image, DiskError> {
    let header = Qcow2Header::read(&file)?;
    header.check_use(writable, below.is_some())?;
    let file = imago::file::File::try_from(file).map_err(io_error("open the qcow2 image"))?;
    let image = Qcow2::<_, Arc<Image>>::builder(file)
        .write(writable)
        .backing(below)
        .open(DenyImplicitOpenGate::default())
        .map_err(|error| refused(error.to_string()))?;
    Ok(FormatAccess::new(image))
}

/// Makes a refusal. Unless a better remedy is known, it advises QEMU's repair.
fn refused(reason: impl Into<String>) -> DiskError {
    DiskError::Image {
        format: "qcow2",
        reason: reason.into(),
        remedy: Remedy::Repair,
    }
}

impl DiskError {
    fn remedied(mut self, better: Remedy) -> Self {
        if let Self::Image { remedy, .. } = &mut self {
            *remedy = better;
        }
        self
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(field)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(field)
}
