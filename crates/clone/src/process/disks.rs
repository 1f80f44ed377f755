//! The disks of a VM: from the description to open files, and to devices.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use clone_api::config::{DiskConfig, DiskFormat, Overlay};
use clone_api::{ApiError, ErrorCode};
use clone_disk::{Disk, DiskError, DiskFiles, DiskSpec, EngineKind, Format, ImageSpec, Writes};
use clone_vmm::devices::block::{Block, BlockConfig, BlockState};

use super::devices;
use super::start::ForkDisk;
use crate::error::Result;

/// Where layers that end with their VM are kept: on a disk, since they may grow beyond memory.
const EPHEMERAL_DIR: &str = "/var/tmp";

/// The format of a disk's image, as told or as name and content agree.
pub fn format_of(disk: &DiskConfig) -> Result<DiskFormat> {
    if let Some(format) = disk.format {
        return Ok(format);
    }
    match Format::detect(&disk.path) {
        Ok(Format::Raw) => Ok(DiskFormat::Raw),
        Ok(Format::Qcow2) => Ok(DiskFormat::Qcow2),
        Err(error) => Err(told(disk, &error).advise("tell it: format=raw or format=qcow2")),
    }
}

/// Opens and locks the files of a disk; with `shared` those that a clone has instead of the
/// described image.
pub(super) fn open(disk: &DiskConfig, shared: Option<&ForkDisk>) -> Result<DiskFiles> {
    let image = |path: &Path, format: DiskFormat| ImageSpec {
        path: path.to_owned(),
        format: match format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
        },
    };
    let (base, layers) = match shared {
        None => (Some(image(&disk.path, format_of(disk)?)), Vec::new()),
        Some(ForkDisk { base, layers }) => {
            let base = base.as_ref().map(|(path, format)| image(path, *format));
            (base, layers.clone())
        }
    };
    let spec = DiskSpec {
        base,
        backing: Vec::new(),
        layers,
        writes: match &disk.overlay {
            Overlay::None if disk.read_only => Writes::Refused,
            Overlay::None => Writes::Base,
            Overlay::Kept(layer) => Writes::Layer(layer.clone()),
            Overlay::Ephemeral => ephemeral(),
        },
    };
    spec.open().map_err(|error| told(disk, &error))
}

/// A nameless file where the host has room for one, else memory.
fn ephemeral() -> Writes {
    let dir = Path::new(EPHEMERAL_DIR);
    match clone_disk::ephemeral(Some(dir)) {
        Ok(_) => Writes::Ephemeral(Some(dir.to_owned())),
        Err(error) => {
            tracing::warn!(%error, "an ephemeral layer is kept in memory");
            Writes::Ephemeral(None)
        }
    }
}

/// The device of a disk, new or as it was `saved`, and the disk behind it.
pub(super) fn device(
    disk: &DiskConfig,
    files: DiskFiles,
    saved: Option<&[u8]>,
) -> Result<(Block, Arc<Mutex<Disk>>)> {
    let opened = Disk::open(files, EngineKind::Uring).map_err(|error| told(disk, &error))?;
    let opened = Arc::new(Mutex::new(opened));
    let state = match saved {
        Some(bytes) => BlockState::decode(bytes).map_err(|error| ApiError::internal(&error))?,
        None => BlockState::fresh(&BlockConfig {
            id: serial_number(&disk.path),
            queues: 1,
            limits: devices::limits(disk.rate_limit.as_ref()),
        }),
    };
    let device = Block::new(Arc::clone(&opened) as _, state);
    Ok((device.map_err(|error| ApiError::internal(&error))?, opened))
}

/// What the guest sees under `/dev/disk/by-id`: the image's name.
fn serial_number(path: &Path) -> String {
    let name = path.file_stem().unwrap_or_default().as_bytes();
    let plain = |&c: &u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    name.iter()
        .filter(|c| plain(c))
        .map(|&c| c as char)
        .collect()
}

fn told(disk: &DiskConfig, error: &DiskError) -> ApiError {
    let told = ApiError::internal(error);
    let message = format!("disk {}: {}", disk.path.display(), told.message);
    match error {
        DiskError::InUse { .. } => ApiError::new(ErrorCode::Conflict, message).advise(
            "another VM uses it: share it with `ro`, or give each VM its own layer (overlay=…)",
        ),
        DiskError::Image { .. } | DiskError::Mismatch(_) => {
            ApiError::new(ErrorCode::InvalidConfig, message)
        }
        _ => ApiError { message, ..told },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_plain() {
        assert_eq!(serial_number(Path::new("/a/débian 12.raw")), "dbian12");
    }

    #[test]
    fn a_disk_in_use_elsewhere_is_told_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = DiskConfig {
            path,
            ..DiskConfig::default()
        };
        let _first = open(&disk, None).unwrap();
        let error = open(&disk, None).unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        let shared = DiskConfig {
            overlay: Overlay::Ephemeral,
            ..disk
        };
        assert_eq!(open(&shared, None).unwrap_err().code, ErrorCode::Conflict);
    }
}
