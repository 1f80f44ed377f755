//! Which files a disk is made of: locks, formats, parts that do not belong together.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;

use clone_disk::{Disk, DiskError, DiskSpec, EngineKind, Format, Request, Writes};

fn image(directory: &Path, name: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, [3; 65_536]).unwrap();
    path
}

fn open(spec: &DiskSpec) -> Result<Disk, DiskError> {
    Disk::open(spec.open()?, EngineKind::Blocking)
}

fn over(base: &Path, layers: Vec<std::path::PathBuf>, top: &Path) -> DiskSpec {
    DiskSpec {
        layers,
        writes: Writes::Layer(top.to_owned()),
        ..DiskSpec::image(base, Format::Raw, false)
    }
}

#[test]
fn a_file_that_is_written_belongs_to_one_disk() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "base.img");
    let reader = DiskSpec::image(&base, Format::Raw, true);
    let writer = DiskSpec::image(&base, Format::Raw, false);
    let first = open(&writer).unwrap();
    assert!(matches!(open(&writer), Err(DiskError::InUse { .. })));
    assert!(matches!(open(&reader), Err(DiskError::InUse { .. })));
    drop(first);
    let _readers = (open(&reader).unwrap(), open(&reader).unwrap());
    assert!(matches!(open(&writer), Err(DiskError::InUse { .. })));
}

#[test]
fn a_frozen_layer_may_be_used_by_siblings_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "base.img");
    let [first, second, third] = ["1", "2", "3"].map(|name| directory.path().join(name));
    let mut parent = open(&over(&base, Vec::new(), &first)).unwrap();
    parent.write_at(&[4; 1000], 0).unwrap();
    let top = over(&base, Vec::new(), &second).open().unwrap().writes;
    let clone_disk::WriteFile::Layer { file, durable } = top else {
        panic!("a layer was asked for");
    };
    parent.freeze(file, durable).unwrap();
    parent.write_at(&[5; 500], 0).unwrap();
    let mut child = open(&over(&base, vec![first], &third)).unwrap();
    child.write_at(&[6; 100], 0).unwrap();
    let (mut seen, mut expected) = ([0; 1001], [4; 1001]);
    child.read_at(&mut seen, 0).unwrap();
    expected[..100].fill(6);
    expected[1000] = 3;
    assert_eq!(seen, expected);
    parent.read_at(&mut seen, 0).unwrap();
    expected[..500].fill(5);
    assert_eq!(seen, expected);
}

#[test]
fn layers_in_the_wrong_order_or_of_another_disk_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "base.img");
    let paths: Vec<_> = (0..3)
        .map(|n| directory.path().join(n.to_string()))
        .collect();
    for n in 0..3 {
        let mut disk = open(&over(&base, paths[..n].to_vec(), &paths[n])).unwrap();
        disk.call(Request::Flush).unwrap();
    }
    let good = DiskSpec {
        layers: paths.clone(),
        writes: Writes::Refused,
        ..DiskSpec::image(&base, Format::Raw, true)
    };
    assert!(open(&good).is_ok());
    for layers in [vec![1, 0, 2], vec![0, 2], vec![1, 2]] {
        let layers = layers
            .into_iter()
            .map(|n: usize| paths[n].clone())
            .collect();
        let refused = open(&DiskSpec {
            layers,
            ..good.clone()
        });
        assert!(matches!(refused, Err(DiskError::Mismatch(_))));
    }
    // A base that is larger than what the layers were made for.
    std::fs::write(&base, [3; 131_072]).unwrap();
    assert!(matches!(open(&good), Err(DiskError::Mismatch(_))));
}

#[test]
fn a_stack_ten_deep_reads_each_block_from_where_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "base.img");
    let paths: Vec<_> = (0..10)
        .map(|n| directory.path().join(n.to_string()))
        .collect();
    for n in 0..10 {
        let mut disk = open(&over(&base, paths[..n].to_vec(), &paths[n])).unwrap();
        disk.write_at(&[10 + n as u8; 4096], 4096 * n as u64)
            .unwrap();
        disk.write_at(&[10 + n as u8; 512], 61_440).unwrap();
        disk.call(Request::Flush).unwrap();
    }
    let spec = DiskSpec {
        layers: paths,
        writes: Writes::Refused,
        ..DiskSpec::image(&base, Format::Raw, true)
    };
    let mut disk = open(&spec).unwrap();
    let mut bytes = vec![0; 65_536];
    disk.read_at(&mut bytes, 0).unwrap();
    for block in 0..15 {
        let expected = if block < 10 { 10 + block as u8 } else { 3 };
        assert!(
            bytes[block * 4096..][..4096]
                .iter()
                .all(|byte| *byte == expected),
            "{block}"
        );
    }
    assert_eq!((bytes[61_440], bytes[61_952]), (19, 3));
}

#[test]
fn only_layers_that_were_flushed_are_kept_and_ephemeral_ones_never() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "base.img");
    let spec = DiskSpec {
        writes: Writes::Ephemeral(Some(directory.path().to_owned())),
        ..DiskSpec::image(&base, Format::Raw, false)
    };
    let mut disk = open(&spec).unwrap();
    disk.write_at(&[9; 4096], 0).unwrap();
    disk.call(Request::Flush).unwrap();
    drop(disk);
    let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "something was left behind");
    assert_eq!(std::fs::read(&base).unwrap(), [3; 65_536]);
}

#[test]
fn a_format_is_guessed_only_where_name_and_content_agree() {
    let directory = tempfile::tempdir().unwrap();
    let raw = image(directory.path(), "disk.img");
    assert_eq!(Format::detect(&raw).unwrap(), Format::Raw);
    let named = image(directory.path(), "disk.qcow2");
    assert!(Format::detect(&named).is_err());
    std::fs::write(&named, b"QFI\xfb and more").unwrap();
    assert_eq!(Format::detect(&named).unwrap(), Format::Qcow2);
    std::fs::write(&raw, b"QFI\xfb and more").unwrap();
    assert!(
        Format::detect(&raw).is_err(),
        "a guest can write this to a raw disk"
    );
}

#[test]
fn what_is_no_disk_is_refused_without_waiting() {
    let directory = tempfile::tempdir().unwrap();
    for path in [
        directory.path(),
        Path::new("/dev/zero"),
        Path::new("/nowhere/disk.img"),
    ] {
        let refused = open(&DiskSpec::image(path, Format::Raw, true));
        assert!(
            matches!(refused, Err(DiskError::Open { .. })),
            "{}",
            path.display()
        );
    }
    let empty = directory.path().join("empty.img");
    File::create(&empty).unwrap();
    assert!(matches!(
        open(&DiskSpec::image(&empty, Format::Raw, true)),
        Err(DiskError::Image { .. })
    ));
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "base.img");
    let mut disk = open(&DiskSpec::image(&base, Format::Raw, true)).unwrap();
    assert!(disk.write_at(&[0], 0).is_err());
    assert!(
        disk.call(Request::Discard {
            offset: 0,
            len: 512
        })
        .is_err()
    );
    assert!(disk.call(Request::Flush).is_ok());
    assert!(disk.freeze(tempfile::tempfile().unwrap(), false).is_err());
    assert_eq!(std::fs::read(&base).unwrap(), [3; 65_536]);
}

#[test]
fn a_disk_tells_every_file_it_needs_before_any_is_opened() {
    let spec = over(
        Path::new("/a"),
        vec!["/b".into(), "/c".into()],
        Path::new("/d"),
    );
    let paths: Vec<_> = spec
        .paths()
        .into_iter()
        .map(|(p, w)| (p.to_str().unwrap(), w))
        .collect();
    assert_eq!(
        paths,
        [("/a", false), ("/b", false), ("/c", false), ("/d", true)]
    );
}
