//! Opens the files of a VM's disks from the description.

use std::path::Path;

use clone_api::config::{DiskConfig, DiskFormat, Overlay};
use clone_api::{ApiError, ErrorCode};
use clone_disk::{DiskError, DiskFiles, DiskSpec, Format, ImageSpec, Writes};

use crate::document::ForkDisk;
use crate::error::Result;
use crate::shared_file::SharedFile;

/// Detects the formats that the description does not give, from the images' names and contents.
pub fn find_formats(disk: &mut DiskConfig) -> Result<()> {
    disk.format = Some(format_of(disk)?);
    for index in 0..disk.backing.len() {
        let image = &disk.backing[index];
        if image.format.is_none() {
            let found = detect(disk, &image.path)?;
            disk.backing[index].format = Some(found);
        }
    }
    Ok(())
}

/// The format of a disk's image, as the description gives it, or as name and content agree.
fn format_of(disk: &DiskConfig) -> Result<DiskFormat> {
    match disk.format {
        Some(format) => Ok(format),
        None => detect(disk, &disk.path),
    }
}

fn detect(disk: &DiskConfig, path: &Path) -> Result<DiskFormat> {
    match Format::detect(path) {
        Ok(Format::Raw) => Ok(DiskFormat::Raw),
        Ok(Format::Qcow2) => Ok(DiskFormat::Qcow2),
        Err(error) => Err(disk_error(disk, &error)),
    }
}

fn image(path: &Path, format: DiskFormat) -> ImageSpec {
    ImageSpec {
        path: path.to_owned(),
        format: match format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
        },
    }
}

/// The described image with its backing files, all opened read-only and checked.
pub fn described(disk: &DiskConfig) -> Result<DiskSpec> {
    let mut disk = disk.clone();
    find_formats(&mut disk)?;
    let spec = image_of(&as_base(&disk));
    spec.check().map_err(|error| disk_error(&disk, &error))?;
    Ok(spec)
}

/// The files that clones of a booted VM share below its disk's own writes, at the paths that the
/// caller gave.
pub fn as_base(disk: &DiskConfig) -> ForkDisk {
    let image = |path: &Path, format: Option<DiskFormat>| {
        let file = SharedFile::named(path.to_owned());
        (file, format.unwrap_or(DiskFormat::Raw))
    };
    let backing = disk.backing.iter();
    ForkDisk {
        base: Some(image(&disk.path, disk.format)),
        backing: backing.map(|it| image(&it.path, it.format)).collect(),
        layers: match &disk.overlay {
            Overlay::Kept(layer) => vec![SharedFile::named(layer.clone())],
            Overlay::None | Overlay::Ephemeral => Vec::new(),
        },
    }
}

/// Opens the image of a shared disk for reading, without the layers over it.
pub fn open_image(shared: &ForkDisk) -> Result<DiskFiles> {
    let files = image_of(shared).open();
    let files = files.map_err(|error| ApiError::internal(&error))?;
    check_shared(shared, &files)?;
    Ok(files)
}

/// Opens and locks the files of a disk; `shared` gives those that a clone has instead of the
/// described image.
pub fn open(
    disk: &DiskConfig,
    shared: Option<&ForkDisk>,
    layers_dir: Option<&Path>,
) -> Result<DiskFiles> {
    let spec = spec_of(disk, shared, layers_dir)?;
    let files = spec
        .check()
        .and_then(|()| spec.open())
        .map_err(|error| disk_error(disk, &error))?;
    if let Some(shared) = shared {
        check_shared(shared, &files)?;
    }
    Ok(files)
}

fn spec_of(
    disk: &DiskConfig,
    shared: Option<&ForkDisk>,
    layers_dir: Option<&Path>,
) -> Result<DiskSpec> {
    let writes = match &disk.overlay {
        Overlay::None if disk.read_only => Writes::Refused,
        Overlay::None => Writes::Base,
        Overlay::Kept(layer) => Writes::Layer(layer.clone()),
        Overlay::Ephemeral => Writes::Ephemeral(layers_dir.map(Path::to_owned)),
    };
    let Some(shared) = shared else {
        return Ok(DiskSpec {
            writes,
            ..described(disk)?
        });
    };
    let layers = shared.layers.iter().map(|layer| layer.path.clone());
    Ok(DiskSpec {
        layers: layers.collect(),
        writes,
        ..image_of(shared)
    })
}

/// The image and its backing files, all read-only.
fn image_of(shared: &ForkDisk) -> DiskSpec {
    let of = |(file, format): &(SharedFile, DiskFormat)| image(&file.path, *format);
    DiskSpec {
        base: shared.base.as_ref().map(of),
        backing: shared.backing.iter().map(of).collect(),
        layers: Vec::new(),
        writes: Writes::Refused,
    }
}

/// Checks that the opened files are those that `shared` identifies.
fn check_shared(shared: &ForkDisk, files: &DiskFiles) -> Result<()> {
    let images = shared.base.iter().chain(&shared.backing);
    let opened = files.base.iter().chain(&files.backing);
    for ((shared, _), (file, _)) in images.zip(opened) {
        shared.check(file)?;
    }
    for (shared, file) in shared.layers.iter().zip(&files.layers) {
        shared.check(file)?;
    }
    Ok(())
}

/// Converts an error of a disk to one for the user, with advice.
pub fn disk_error(disk: &DiskConfig, error: &DiskError) -> ApiError {
    let internal = ApiError::internal(error);
    let message = format!("disk {}: {}", disk.path.display(), internal.message);
    match error {
        DiskError::InUse { .. } => ApiError::new(ErrorCode::Conflict, message).advise(
            "another VM uses it: share it with `ro`, or give each VM its own layer (overlay=…)",
        ),
        DiskError::Unusable {
            path,
            reason,
            advice,
        } => {
            let message = format!("disk {}: {reason}", path.display());
            ApiError::new(ErrorCode::InvalidConfig, message).advise(advice)
        }
        DiskError::Image { remedy, .. } => {
            ApiError::new(ErrorCode::InvalidConfig, message).advise(remedy.advice(&disk.path))
        }
        DiskError::Mismatch(_) => ApiError::new(ErrorCode::InvalidConfig, message),
        _ => ApiError {
            message,
            ..internal
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clone_api::config::BackingConfig;
    use clone_disk::{Disk, EngineKind};

    #[test]
    fn a_disk_in_use_elsewhere_is_told_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = DiskConfig {
            path,
            ..DiskConfig::default()
        };
        let _first = open(&disk, None, None).unwrap();
        let error = open(&disk, None, None).unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        let shared = DiskConfig {
            overlay: Overlay::Ephemeral,
            ..disk
        };
        assert_eq!(
            open(&shared, None, None).unwrap_err().code,
            ErrorCode::Conflict
        );
    }

    fn qemu_img(words: &[&str], dir: &Path) {
        let made = std::process::Command::new("qemu-img")
            .args(words)
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(made.status.success(), "{words:?}");
    }

    #[test]
    fn a_disk_of_another_format_is_refused_with_the_command_and_taken_raw_only_by_word() {
        let dir = tempfile::tempdir().unwrap();
        qemu_img(
            &["create", "-q", "-f", "vmdk", "disk.vmdk", "1M"],
            dir.path(),
        );
        let mut disk = DiskConfig {
            path: dir.path().join("disk.vmdk"),
            ..DiskConfig::default()
        };
        let error = find_formats(&mut disk).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        assert!(error.message.contains("VMDK"), "{}", error.message);
        let advice = error.advice.unwrap();
        assert!(advice.contains("qemu-img convert -f vmdk"), "{advice}");
        disk.format = Some(DiskFormat::Raw);
        open(&disk, None, None).unwrap();
    }

    #[test]
    fn a_backing_file_is_taken_by_word_and_is_below_the_clones_too() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below, too.raw");
        std::fs::write(&below, vec![7; 1 << 20]).unwrap();
        let words = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            "below, too.raw",
            "a.qcow2",
        ];
        qemu_img(&words, dir.path());
        let mut disk = DiskConfig {
            path: dir.path().join("a.qcow2"),
            overlay: Overlay::Ephemeral,
            ..DiskConfig::default()
        };
        let error = open(&disk, None, None).unwrap_err();
        assert!(
            error.message.contains("below, too.raw"),
            "{}",
            error.message
        );
        assert!(error.advice.unwrap().contains("backing=FILE"));
        disk.backing.push(BackingConfig {
            path: below.clone(),
            format: None,
        });
        find_formats(&mut disk).unwrap();
        assert_eq!(disk.backing[0].format, Some(DiskFormat::Raw));
        let first_byte = |files: DiskFiles| {
            let mut opened = Disk::open(files, EngineKind::Blocking).unwrap();
            let mut byte = [0];
            opened.read_at(&mut byte, 4096).unwrap();
            byte[0]
        };
        assert_eq!(first_byte(open(&disk, None, None).unwrap()), 7);
        let base = as_base(&disk);
        assert_eq!(first_byte(open(&disk, Some(&base), None).unwrap()), 7);
        assert_eq!(first_byte(described(&disk).unwrap().open().unwrap()), 7);
    }
}
