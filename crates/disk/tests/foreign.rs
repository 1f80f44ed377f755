//! Images of other programs: recognised, refused, and made usable by the command that the refusal names.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clone_disk::{Disk, DiskError, DiskSpec, EngineKind, Format, ImageSpec, LayerHeader, Writes};

/// Runs a command line as a reader of the message would.
fn shell(line: &str, directory: &Path) -> Output {
    Command::new("sh")
        .args(["-ec", line])
        .current_dir(directory)
        .output()
        .unwrap()
}

fn run(line: &str, directory: &Path) {
    let output = shell(line, directory);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {errors}");
}

/// A raw disk with something to lose.
fn content() -> Vec<u8> {
    (0..1 << 20).map(|at: u32| (at / 700) as u8).collect()
}

fn advice_of(path: &Path) -> (String, String) {
    match Format::detect(path) {
        Err(DiskError::Unusable { reason, advice, .. }) => (reason, advice),
        other => panic!("{}: {other:?}", path.display()),
    }
}

/// The command of an advice that has more to say.
fn command_of(advice: &str) -> &str {
    let from = advice.find("qemu-img").unwrap();
    advice[from..].split("; ").next().unwrap()
}

fn read_all(path: &Path, format: Format) -> Vec<u8> {
    let spec = DiskSpec::image(path, format, true);
    let mut disk = Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap();
    let mut bytes = vec![0; 1 << 20];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn images_of_other_programs_are_refused_with_a_command_that_converts_them() {
    let directory = tempfile::tempdir().unwrap();
    // A name that a shell, QEMU's options and a terminal would each trip over.
    let odd = directory.path().join("it's, a $(disk) é");
    std::fs::create_dir(&odd).unwrap();
    std::fs::write(odd.join("plain.raw"), content()).unwrap();
    for (format, options, name) in [
        ("vmdk", "subformat=monolithicSparse", "VMDK"),
        ("vmdk", "subformat=streamOptimized", "VMDK"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK"),
        ("vhdx", "subformat=dynamic", "VHDX"),
        ("vpc", "subformat=dynamic", "VHD"),
        ("vpc", "subformat=fixed", "VHD"),
        ("vdi", "static=off", "VDI"),
        ("qcow", "", "qcow image of version 1"),
        ("qed", "", "QED"),
        ("parallels", "", "Parallels"),
    ] {
        let with = match options {
            "" => String::new(),
            options => format!("-o {options}"),
        };
        let line = format!("qemu-img convert -f raw -O {format} {with} plain.raw disk.img");
        run(&line, &odd);
        let image = odd.join("disk.img");
        let (reason, advice) = advice_of(&image);
        assert!(reason.contains(name), "{format} {options}: {reason}");
        assert!(advice.contains("format=raw"), "{advice}");
        run(command_of(&advice), Path::new("/"));
        let read = read_all(&odd.join("disk.qcow2"), Format::Qcow2);
        // VHD rounds sizes up to its geometry, so only what there was is compared.
        assert!(read == content(), "{format} {options}");
        for left in std::fs::read_dir(&odd).unwrap() {
            let path = left.unwrap().path();
            if !path.ends_with("plain.raw") {
                std::fs::remove_file(path).unwrap();
            }
        }
    }
}

#[test]
fn an_encrypted_image_is_converted_with_its_passphrase() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::write(at.join("PASSPHRASE_FILE"), "secret").unwrap();
    let secret = "--object secret,id=s,file=PASSPHRASE_FILE";
    run(
        &format!("qemu-img create {secret} -f luks -o key-secret=s,iter-time=10 a.luks 1M"),
        at,
    );
    let made = at.join("a,b.luks");
    std::fs::rename(at.join("a.luks"), &made).unwrap();
    let (reason, advice) = advice_of(&made);
    assert!(reason.contains("LUKS"), "{reason}");
    run(command_of(&advice), at);
    let qcow2 = at.join("c.qcow2");
    run(
        &format!(
            "qemu-img create {secret} -f qcow2 \
             -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 c.qcow2 1M"
        ),
        at,
    );
    let refused = DiskSpec::image(&qcow2, Format::Qcow2, true).check();
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("encrypted"), "{refused}");
    run(command_of(&refused), at);
    assert!(read_all(&at.join("c-converted.qcow2"), Format::Qcow2) == [0; 1 << 20]);
}

#[test]
fn compressed_disks_are_refused_with_the_program_that_unpacks_them() {
    let directory = tempfile::tempdir().unwrap();
    let plain = directory.path().join("plain");
    std::fs::write(&plain, content()).unwrap();
    for program in ["gzip", "xz"] {
        let packed = directory.path().join("disk.img.packed");
        run(
            &format!("{program} -c plain > disk.img.packed"),
            directory.path(),
        );
        let (reason, advice) = advice_of(&packed);
        assert!(reason.contains(program), "{reason}");
        run(advice.split("; ").next().unwrap(), Path::new("/"));
        assert!(std::fs::read(directory.path().join("disk.img")).unwrap() == content());
    }
    for (magic, word) in [
        (&b"\x28\xb5\x2f\xfd"[..], "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"BZh91AY&SY", "bzip2"),
        (b"PK\x03\x04", "unzip"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\x3a\xff\x26\xed", "simg2img"),
    ] {
        let path = directory.path().join("x.img");
        std::fs::write(&path, [magic, &[0; 4096]].concat()).unwrap();
        let (_, advice) = advice_of(&path);
        assert!(advice.contains(word), "{advice}");
    }
}

#[test]
fn what_are_the_bytes_of_a_disk_is_a_raw_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let mut iso = vec![0; 65_536];
    iso[32_769..32_774].copy_from_slice(b"CD001");
    let mut boot = vec![0x5a; 65_536];
    boot[510..512].copy_from_slice(&[0x55, 0xaa]);
    for bytes in [iso, boot, vec![0; 4096], b"QFI".to_vec(), b"x".to_vec()] {
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Format::detect(&path).unwrap(), Format::Raw);
    }
}

#[test]
fn a_layer_is_not_taken_for_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.img");
    std::fs::write(&base, content()).unwrap();
    let layer = directory.path().join("layer.img");
    let spec = DiskSpec {
        writes: Writes::Layer(layer.clone()),
        ..DiskSpec::image(&base, Format::Raw, false)
    };
    drop(Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap());
    LayerHeader::read(&std::fs::File::open(&layer).unwrap()).unwrap();
    let (reason, advice) = advice_of(&layer);
    assert!(reason.contains("layer"), "{reason}");
    assert!(advice.contains("overlay="), "{advice}");
}

fn qcow2(directory: &Path, name: &str, options: &str) -> PathBuf {
    run(
        &format!("qemu-img create -q -f qcow2 {options} {name} 1M"),
        directory,
    );
    directory.join(name)
}

fn refusal(image: &Path, read_only: bool) -> String {
    let spec = DiskSpec::image(image, Format::Qcow2, read_only);
    spec.check().unwrap_err().to_string()
}

#[test]
fn every_refusal_of_a_qcow2_image_carries_a_command_that_helps() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    for (name, options, word) in [
        ("l2.qcow2", "-o extended_l2=on", "second-level"),
        ("zstd.qcow2", "-o compression_type=zstd", "compression"),
        ("data.qcow2", "-o data_file=data.raw", "data file"),
    ] {
        let image = qcow2(at, name, options);
        let refused = refusal(&image, true);
        assert!(refused.contains(word), "{refused}");
        run(command_of(&refused), at);
        let copy = at.join(name.replace(".qcow2", "-converted.qcow2"));
        DiskSpec::image(copy, Format::Qcow2, false).check().unwrap();
    }
    let image = qcow2(at, "snap.qcow2", "");
    run("qemu-img snapshot -c one snap.qcow2", at);
    let refused = refusal(&image, true);
    assert!(refused.contains("snapshots"), "{refused}");
    run(command_of(&refused), at);
    DiskSpec::image(at.join("snap-converted.qcow2"), Format::Qcow2, false)
        .check()
        .unwrap();
}

#[test]
fn an_image_that_was_not_closed_is_repaired_before_it_is_written() {
    let directory = tempfile::tempdir().unwrap();
    for (bit, read_only_works) in [(1u8, true), (2, false)] {
        let image = qcow2(directory.path(), "disk.qcow2", "-o lazy_refcounts=on");
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[79] |= bit;
        std::fs::write(&image, bytes).unwrap();
        let read = DiskSpec::image(&image, Format::Qcow2, true).check();
        assert_eq!(read.is_ok(), read_only_works);
        let refused = refusal(&image, false);
        // QEMU's tool returns 2 or 3 for what it could not mend.
        run(command_of(&refused), directory.path());
        DiskSpec::image(&image, Format::Qcow2, false)
            .check()
            .unwrap();
    }
}

#[test]
fn a_backing_file_is_asked_for_by_option_or_made_part_of_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::write(at.join("below.raw"), content()).unwrap();
    let image = qcow2(at, "top.qcow2", "-F raw -b below.raw");
    let refused = refusal(&image, true);
    assert!(refused.contains("below.raw"), "{refused}");
    assert!(refused.contains("backing=FILE"), "{refused}");
    run(command_of(&refused), at);
    assert!(read_all(&at.join("top-converted.qcow2"), Format::Qcow2) == content());
    let mut spec = DiskSpec::image(&image, Format::Qcow2, true);
    spec.backing.push(ImageSpec {
        path: at.join("below.raw"),
        format: Format::Raw,
    });
    spec.check().unwrap();
    // One that is given where none is needed is a mistake; a chain is checked to its end.
    spec.base = Some(ImageSpec {
        path: at.join("top-converted.qcow2"),
        format: Format::Qcow2,
    });
    assert!(spec.check().is_err());
}

#[test]
fn names_and_contents_that_disagree_are_told_with_the_word_to_say() {
    let directory = tempfile::tempdir().unwrap();
    let image = qcow2(directory.path(), "cloud.img", "");
    let (reason, advice) = advice_of(&image);
    assert!(
        reason.contains("qcow2") && advice.contains("format=qcow2"),
        "{advice}"
    );
    let raw = directory.path().join("raw.qcow2");
    std::fs::write(&raw, content()).unwrap();
    let (_, advice) = advice_of(&raw);
    assert!(advice.contains("format=raw"), "{advice}");
    let upper = qcow2(directory.path(), "UPPER.QCOW2", "");
    assert_eq!(Format::detect(&upper).unwrap(), Format::Qcow2);
}
