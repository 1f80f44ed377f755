//! Files that are no raw disks, whatever they are called: images of other programs, and compressed ones.
//!
//! Taken for raw, such a file shows a guest its container in place of its disk, and the first write destroys it. A
//! guest can write any of these bytes to its own raw disk, so the caller's word (`format=raw`) is always believed.
//! An ISO image is not among them: its bytes are those of the disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{DiskError, io_error};
use crate::layer;
use crate::remedy::Remedy;

/// Where a signature stands.
#[derive(Clone, Copy)]
enum At {
    Start(u64),
    /// So many bytes before the end.
    End(u64),
}

struct Signature {
    at: At,
    bytes: &'static [u8],
    name: &'static str,
    remedy: Remedy,
}

const fn sign(at: At, bytes: &'static [u8], name: &'static str, remedy: Remedy) -> Signature {
    Signature {
        at,
        bytes,
        name,
        remedy,
    }
}

use At::{End, Start};
use Remedy::{Convert, Decrypt, Desparse, Extract, GiveBase, Unpack};

/// The formats that QEMU reads have its names; sources are QEMU's `block/*.c` and the formats' own documents.
const SIGNATURES: [Signature; 27] = [
    sign(Start(0), b"KDMV", "a VMDK image", Convert("vmdk")),
    sign(Start(0), b"COWD", "a VMDK image", Convert("vmdk")),
    sign(
        Start(0),
        &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0],
        "a VMDK image",
        Convert("vmdk"),
    ),
    sign(
        Start(0),
        b"# Disk DescriptorFile",
        "the description of a VMDK image",
        Convert("vmdk"),
    ),
    sign(Start(0), b"vhdxfile", "a VHDX image", Convert("vhdx")),
    sign(Start(0), b"conectix", "a VHD image", Convert("vpc")),
    sign(End(512), b"conectix", "a VHD image", Convert("vpc")),
    sign(End(511), b"conectix", "a VHD image", Convert("vpc")),
    sign(
        Start(64),
        &[0x7f, 0x10, 0xda, 0xbe],
        "a VDI image",
        Convert("vdi"),
    ),
    sign(
        Start(0),
        b"QFI\xfb\0\0\0\x01",
        "a qcow image of version 1",
        Convert("qcow"),
    ),
    sign(Start(0), b"QED\0", "a QED image", Convert("qed")),
    sign(
        Start(0),
        b"LUKS\xba\xbe",
        "a LUKS-encrypted image",
        Decrypt("luks"),
    ),
    sign(
        Start(0),
        b"WithoutFreeSpace",
        "a Parallels image",
        Convert("parallels"),
    ),
    sign(
        Start(0),
        b"WithouFreSpacExt",
        "a Parallels image",
        Convert("parallels"),
    ),
    sign(
        Start(0),
        b"Bochs Virtual HD Image",
        "a Bochs image",
        Convert("bochs"),
    ),
    sign(
        Start(0),
        b"#!/bin/sh\n#V2.0 Format\n",
        "a cloop image",
        Convert("cloop"),
    ),
    sign(End(512), b"koly", "a DMG image", Convert("dmg")),
    sign(
        Start(0),
        &[0x3a, 0xff, 0x26, 0xed],
        "an Android sparse image",
        Desparse,
    ),
    sign(
        Start(0),
        &layer::MAGIC,
        "a layer of writes over another image",
        GiveBase,
    ),
    sign(
        Start(0),
        &[0x1f, 0x8b, 8],
        "compressed with gzip",
        Unpack("gzip -dc"),
    ),
    sign(
        Start(0),
        b"\xfd7zXZ\0",
        "compressed with xz",
        Unpack("xz -dc"),
    ),
    sign(
        Start(0),
        &[0x28, 0xb5, 0x2f, 0xfd],
        "compressed with zstd",
        Unpack("zstd -dc"),
    ),
    sign(
        Start(4),
        b"1AY&SY",
        "compressed with bzip2",
        Unpack("bzip2 -dc"),
    ),
    sign(
        Start(0),
        &[0x04, 0x22, 0x4d, 0x18],
        "compressed with lz4",
        Unpack("lz4 -dc"),
    ),
    sign(Start(0), b"PK\x03\x04", "a ZIP archive", Extract("unzip")),
    sign(
        Start(0),
        b"7z\xbc\xaf\x27\x1c",
        "a 7-Zip archive",
        Extract("7z x"),
    ),
    sign(Start(0), b"!<arch>\n", "an ar archive", Extract("ar x")),
];

/// Refuses a file that is known to be something other than a raw or qcow2 disk.
///
/// # Errors
/// [`DiskError::Unusable`] with the command that makes a disk of it.
pub(crate) fn refuse(file: &File, path: &Path) -> Result<(), DiskError> {
    let metadata = file.metadata().map_err(io_error("look at the image"))?;
    // A block device has no container around its bytes.
    if !metadata.is_file() {
        return Ok(());
    }
    for signature in &SIGNATURES {
        if !has(file, metadata.len(), signature)? {
            continue;
        }
        let or_raw = "or, if the guest itself wrote this to its disk: format=raw";
        return Err(DiskError::Unusable {
            path: path.to_owned(),
            reason: format!("it is {}, not a raw disk", signature.name),
            advice: format!("{}; {or_raw}", signature.remedy.advice(path)),
        });
    }
    Ok(())
}

fn has(file: &File, len: u64, signature: &Signature) -> Result<bool, DiskError> {
    let at = match signature.at {
        Start(at) => at,
        End(before) => match len.checked_sub(before) {
            Some(at) => at,
            None => return Ok(false),
        },
    };
    if at + signature.bytes.len() as u64 > len {
        return Ok(false);
    }
    let mut bytes = vec![0; signature.bytes.len()];
    file.read_exact_at(&mut bytes, at)
        .map_err(io_error("read the start of the image"))?;
    Ok(bytes == signature.bytes)
}
