//! Builds the devices of a VM's disks from open files.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use clone_api::ApiError;
use clone_api::config::DiskConfig;
use clone_api::shape::DISK_QUEUES;
use clone_disk::{Disk, DiskFiles, EngineKind};
use clone_start::disks::disk_error;
use clone_start::error::Result;
use clone_vmm::devices::block::{Block, BlockConfig};

use super::rate_limits;

/// Builds the device of a disk, and returns it with the disk behind it.
pub(super) fn device(disk: &DiskConfig, files: DiskFiles) -> Result<(Block, Arc<Mutex<Disk>>)> {
    let opened = Disk::open(files, EngineKind::Uring).map_err(|error| disk_error(disk, &error))?;
    let opened = Arc::new(Mutex::new(opened));
    let config = BlockConfig {
        id: serial_number(&disk.path),
        queues: DISK_QUEUES,
        limits: rate_limits::limits(disk.rate_limit.as_ref()),
    };
    let device = Block::new(Arc::clone(&opened) as _, &config);
    Ok((device.map_err(|error| ApiError::internal(&error))?, opened))
}

/// The serial number that the guest shows under `/dev/disk/by-id`: the image's name.
fn serial_number(path: &Path) -> String {
    let name = path.file_stem().unwrap_or_default().as_bytes();
    let plain = |&c: &u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    name.iter()
        .filter(|c| plain(c))
        .map(|&c| c as char)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_plain() {
        assert_eq!(serial_number(Path::new("/a/débian 12.raw")), "dbian12");
    }
}
