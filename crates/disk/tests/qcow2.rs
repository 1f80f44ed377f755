//! qcow2 images against QEMU's own tool, and hostile headers.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use clone_disk::{Disk, DiskSpec, EngineKind, Format, ImageSpec, Qcow2Header, Request, Writes};
use proptest::prelude::*;

const SIZE: u64 = 8 << 20;

/// Runs `qemu-img`, which the project's tests require.
fn qemu_img(words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "qemu-img {words:?}: {text}{errors}"
    );
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn create(path: &Path, options: &str) {
    let size = SIZE.to_string();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        text(path),
        &size,
    ]);
}

fn open(spec: &DiskSpec) -> Disk {
    Disk::open(spec.open().unwrap(), EngineKind::Worker).unwrap()
}

#[test]
fn qemu_finds_what_was_written_and_no_fault() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=4096",
        "refcount_bits=1",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        let plain = directory.path().join("disk.raw");
        create(&image, options);
        std::fs::File::create(&plain)
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        let mut disks = [
            open(&DiskSpec::image(&image, Format::Qcow2, false)),
            open(&DiskSpec::image(&plain, Format::Raw, false)),
        ];
        for disk in &mut disks {
            for n in 0..40u64 {
                let bytes = vec![n as u8 + 1; 5000 + 512 * n as usize];
                disk.write_at(&bytes, n * 131_072 + 777 * n).unwrap();
            }
            let (offset, len) = (3 << 17, 300_000);
            disk.call(Request::WriteZeroes {
                offset,
                len,
                unmap: true,
            })
            .unwrap();
            let (offset, len) = (1 << 20, 131_072);
            disk.call(Request::WriteZeroes {
                offset,
                len,
                unmap: false,
            })
            .unwrap();
            disk.call(Request::Flush).unwrap();
        }
        drop(disks);
        qemu_img(&["check", "-q", text(&image)]);
        qemu_img(&["compare", "-q", text(&image), text(&plain)]);
    }
}

#[test]
fn compressed_clusters_of_qemu_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let plain = directory.path().join("disk.raw");
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 1000) as u8).collect();
    std::fs::write(&plain, &bytes).unwrap();
    let image = directory.path().join("disk.qcow2");
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&plain),
        text(&image),
    ]);
    let mut disk = open(&DiskSpec::image(&image, Format::Qcow2, true));
    let mut read = vec![0; SIZE as usize];
    disk.read_at(&mut read, 0).unwrap();
    assert!(read == bytes);
}

#[test]
fn a_backing_file_is_used_where_it_is_given_and_never_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let below = directory.path().join("below.raw");
    std::fs::write(&below, vec![7; SIZE as usize]).unwrap();
    let image = directory.path().join("disk.qcow2");
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        text(&below),
        text(&image),
    ];
    qemu_img(&words);
    let mut spec = DiskSpec::image(&image, Format::Qcow2, false);
    let refused = Disk::open(spec.open().unwrap(), EngineKind::Worker)
        .err()
        .unwrap();
    assert!(refused.to_string().contains("below.raw"), "{refused}");
    spec.backing.push(ImageSpec {
        path: below.clone(),
        format: Format::Raw,
    });
    let mut disk = open(&spec);
    disk.write_at(&[9; 512], 512).unwrap();
    let mut sectors = [0; 1536];
    disk.read_at(&mut sectors, 0).unwrap();
    assert_eq!((sectors[0], sectors[512], sectors[1024]), (7, 9, 7));
    drop(disk);
    assert!(std::fs::read(&below).unwrap().iter().all(|byte| *byte == 7));
    // One given to an image that has none is refused as well.
    let alone = directory.path().join("alone.qcow2");
    create(&alone, "compat=1.1");
    spec.base = Some(ImageSpec {
        path: alone,
        format: Format::Qcow2,
    });
    assert!(Disk::open(spec.open().unwrap(), EngineKind::Worker).is_err());
}

#[test]
fn a_stack_over_qcow2_leaves_the_image_alone() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.qcow2");
    create(&image, "compat=1.1");
    let before = std::fs::read(&image).unwrap();
    let spec = DiskSpec {
        writes: Writes::Ephemeral(None),
        ..DiskSpec::image(&image, Format::Qcow2, false)
    };
    let mut disk = open(&spec);
    disk.write_at(&[1; 100], 50).unwrap();
    let mut read = [9; 200];
    disk.read_at(&mut read, 0).unwrap();
    assert_eq!((read[49], read[50], read[149], read[150]), (0, 1, 1, 0));
    drop(disk);
    assert!(std::fs::read(&image).unwrap() == before);
}

#[test]
fn features_that_are_not_supported_are_named() {
    let directory = tempfile::tempdir().unwrap();
    for (options, word) in [
        ("extended_l2=on", "second-level"),
        ("compression_type=zstd", "compression"),
        ("data_file=other.raw", "data file"),
    ] {
        let image = directory.path().join("disk.qcow2");
        let _ = std::fs::remove_file(&image);
        let status = Command::new("qemu-img")
            .current_dir(directory.path())
            .args([
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options,
                "disk.qcow2",
                "1M",
            ])
            .status();
        assert!(status.unwrap().success());
        let spec = DiskSpec::image(&image, Format::Qcow2, false);
        let refused = Disk::open(spec.open().unwrap(), EngineKind::Worker)
            .err()
            .unwrap();
        assert!(refused.to_string().contains(word), "{refused}");
    }
}

#[test]
fn fields_that_would_take_memory_or_lead_out_of_the_file_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.qcow2");
    create(&image, "compat=1.1");
    let good = std::fs::read(&image).unwrap();
    let cases: [(usize, &[u8], &str); 9] = [
        (0, b"QFI!", "magic"),
        (4, &[0, 0, 0, 9], "version"),
        (20, &[0, 0, 0, 40], "cluster size"),
        (24, &[0xff; 8], "virtual size"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (36, &[0xff; 4], "first-level table of"),
        (40, &[0x7f, 0, 0, 0, 0, 0, 0, 0], "outside of the file"),
        (56, &[0xff; 4], "refcount table of"),
        (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "unknown features"),
    ];
    for (at, bytes, word) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&image, bad).unwrap();
        let refused = Qcow2Header::read(&std::fs::File::open(&image).unwrap());
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(word), "{refused}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_damage_to_an_image_harms_the_reader(
        damage in prop::collection::vec((0usize..4096, any::<u8>()), 1..8),
        tables in prop::collection::vec((0usize..0x5_0000, any::<u8>()), 0..4),
        cut in prop::option::of(0u64..0x5_0000),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        std::fs::write(&image, pristine()).unwrap();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        for (at, byte) in damage.into_iter().map(|(at, byte)| (at % 112, byte)).chain(tables) {
            file.write_all_at(&[byte], at as u64).unwrap();
        }
        if let Some(cut) = cut {
            file.set_len(cut).unwrap();
        }
        drop(file);
        let spec = DiskSpec::image(&image, Format::Qcow2, false);
        // Opened or refused, read or failed: what matters is that it comes to an end.
        if let Ok(mut disk) = Disk::open(spec.open().unwrap(), EngineKind::Blocking) {
            let mut bytes = vec![0; 1 << 16];
            let _ = disk.read_at(&mut bytes, 0);
            let _ = disk.write_at(&bytes, 1 << 16);
            let _ = disk.call(Request::Flush);
        }
    }
}

/// A small image with some data, made once.
fn pristine() -> &'static [u8] {
    static IMAGE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    IMAGE.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        create(&image, "compat=1.1");
        let mut disk = open(&DiskSpec::image(&image, Format::Qcow2, false));
        disk.write_at(&[5; 70_000], 0).unwrap();
        drop(disk);
        std::fs::read(&image).unwrap()
    })
}
