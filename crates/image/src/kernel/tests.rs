use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::bzimage::testing::bzimage;
use super::elf::testing::vmlinux;
use super::*;

/// Compresses as the kernel's build does: the format's own tool where the payload needs one, then the length word.
fn with_length(mut packed: Vec<u8>, length: usize) -> Vec<u8> {
    packed.extend_from_slice(&(length as u32).to_le_bytes());
    packed
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn tool(command: &str, data: &[u8]) -> Vec<u8> {
    let mut words = command.split(' ');
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("this test needs {command}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = data.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let out = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(out.status.success());
    out.stdout
}

fn sample() -> Vec<u8> {
    let mut code: Vec<u8> = (0..300_000u32)
        .flat_map(|i| (i / 7).to_le_bytes())
        .collect();
    // Calls for the x86 filter of xz to work on.
    for at in (0..code.len() - 5).step_by(64) {
        code[at] = 0xe8;
    }
    vmlinux(&code, true)
}

struct Dir {
    dir: tempfile::TempDir,
}

impl Dir {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn cache(&self) -> KernelCache {
        KernelCache::open(self.dir.path().join("cache")).unwrap()
    }

    fn cached(&self) -> Vec<PathBuf> {
        let mut names: Vec<_> = fs::read_dir(self.dir.path().join("cache"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn every_compression_of_the_kernel_build_is_extracted() {
    let elf = sample();
    let lz4: Vec<u8> = {
        let mut out = vec![0x02, 0x21, 0x4c, 0x18];
        for block in elf.chunks(8 << 20) {
            let packed = lz4_flex::block::compress(block);
            out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
            out.extend_from_slice(&packed);
        }
        out
    };
    let payloads = [
        ("gzip", gzip(&elf)),
        (
            "xz",
            with_length(
                tool("xz --check=crc32 --x86 --lzma2=dict=32MiB -c", &elf),
                elf.len(),
            ),
        ),
        (
            "lzma",
            with_length(tool("xz --format=lzma -9 -c", &elf), elf.len()),
        ),
        ("lz4", with_length(lz4, elf.len())),
        (
            "zstd",
            with_length(
                ruzstd::encoding::compress_to_vec(
                    &elf[..],
                    ruzstd::encoding::CompressionLevel::Fastest,
                ),
                elf.len(),
            ),
        ),
    ];
    let dir = Dir::new();
    for (name, payload) in payloads {
        let path = dir.file(name, &bzimage(&payload));
        assert_eq!(
            inspect(&path).unwrap().version.as_deref(),
            Some("6.12.0 (test) #1")
        );
        assert!(
            extract_vmlinux(&path).unwrap() == elf,
            "{name} came out changed"
        );
    }
}

#[test]
fn an_elf_kernel_is_used_where_it_lies() {
    let dir = Dir::new();
    let path = dir.file("vmlinux", &vmlinux(b"code", false));
    let found = dir.cache().vmlinux(&path).unwrap();
    assert_eq!(
        found,
        CachedKernel {
            vmlinux: path,
            pvh: false,
            reused: true
        }
    );
    assert!(dir.cached().is_empty());
}

#[test]
fn a_second_start_reuses_the_extracted_kernel() {
    let dir = Dir::new();
    let path = dir.file("bzImage", &bzimage(&gzip(&sample())));
    let first = dir.cache().vmlinux(&path).unwrap();
    assert!(!first.reused && first.pvh);
    assert!(fs::read(&first.vmlinux).unwrap() == sample());
    let again = dir.cache().vmlinux(&path).unwrap();
    assert_eq!(
        again,
        CachedKernel {
            reused: true,
            ..first.clone()
        }
    );
    // The same content under another name and inode is found by its hash.
    let copy = dir.file("copy", &fs::read(&path).unwrap());
    assert_eq!(dir.cache().vmlinux(&copy).unwrap(), again);
}

#[test]
fn files_that_did_not_change_are_not_hashed_again() {
    let dir = Dir::new();
    let path = dir.file("bzImage", &bzimage(&gzip(&sample())));
    dir.cache().vmlinux(&path).unwrap();
    let seen = || {
        dir.cached()
            .iter()
            .filter(|p| p.extension().is_some_and(|e| e == "seen"))
            .count()
    };
    assert_eq!(
        seen(),
        0,
        "files written this very moment are not trusted by their stamps"
    );
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let hit = dir.cache().vmlinux(&path).unwrap();
    assert_eq!(seen(), 1);
    // A stamp alone now leads to the entry: the kernel is not read.
    assert_eq!(dir.cache().vmlinux(&path).unwrap(), hit);
    // A changed file is noticed.
    let mut bytes = fs::read(&hit.vmlinux).unwrap();
    bytes[1000] ^= 1;
    fs::write(&hit.vmlinux, bytes).unwrap();
    assert!(!dir.cache().vmlinux(&path).unwrap().reused);
}

#[test]
fn a_cache_that_others_may_write_to_is_not_relied_on() {
    use std::os::unix::fs::PermissionsExt;
    let place = Dir::new();
    let dir = place.dir.path().join("cache");
    place.cache();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let error = KernelCache::open(&dir).unwrap_err();
    assert!(matches!(error, ImageError::Io { .. }), "{error}");
}

#[test]
fn a_damaged_cache_entry_is_extracted_again() {
    let dir = Dir::new();
    let path = dir.file("bzImage", &bzimage(&gzip(&sample())));
    let first = dir.cache().vmlinux(&path).unwrap();
    let mut bytes = fs::read(&first.vmlinux).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&first.vmlinux, &bytes).unwrap();
    let again = dir.cache().vmlinux(&path).unwrap();
    assert!(!again.reused);
    assert!(fs::read(&again.vmlinux).unwrap() == sample());
    fs::write(&first.vmlinux, &bytes[..middle]).unwrap();
    assert!(!dir.cache().vmlinux(&path).unwrap().reused);
}

#[test]
fn a_kernel_that_was_replaced_is_not_taken_for_the_old_one() {
    let dir = Dir::new();
    let path = dir.file("bzImage", &bzimage(&gzip(&vmlinux(b"old", true))));
    let old = dir.cache().vmlinux(&path).unwrap();
    dir.file("bzImage", &bzimage(&gzip(&vmlinux(b"new", true))));
    let new = dir.cache().vmlinux(&path).unwrap();
    assert_ne!(old.vmlinux, new.vmlinux);
    assert!(fs::read(new.vmlinux).unwrap() == vmlinux(b"new", true));
}

#[test]
fn a_failed_extraction_leaves_the_cache_empty() {
    let dir = Dir::new();
    let whole = bzimage(&gzip(&sample()));
    let path = dir.file("bzImage", &whole[..whole.len() / 2]);
    let error = dir.cache().vmlinux(&path).unwrap_err().to_string();
    assert!(
        error.contains("truncated") && error.contains("bzImage"),
        "{error}"
    );
    assert!(dir.cached().is_empty());
}

fn error_of(image: &[u8]) -> String {
    let dir = Dir::new();
    extract_vmlinux(&dir.file("k", image))
        .unwrap_err()
        .to_string()
}

#[test]
fn hostile_headers_are_named() {
    assert!(error_of(b"").contains("neither a bzImage"));
    assert!(error_of(b"#!/bin/sh\necho no kernel\n").contains("neither a bzImage"));
    let good = bzimage(&gzip(&sample()));
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        error_of(&image)
    };
    assert!(with(0x206, &[0x00, 0x02]).contains("2.00 is older"));
    assert!(with(0x248, &u32::MAX.to_le_bytes()).contains("truncated"));
    assert!(with(0x24c, &u32::MAX.to_le_bytes()).contains("truncated"));
    assert!(with(0x24c, &2u32.to_le_bytes()).contains("only 2 bytes"));
    // A payload that ends early, where the length word is then part of the stream.
    assert!(!with(0x24c, &5000u32.to_le_bytes()).is_empty());
}

#[test]
fn a_payload_that_lies_about_its_length_is_refused_without_being_decompressed_whole() {
    let bomb = gzip(&vec![0; 64 << 20]);
    let mut payload = bomb.clone();
    let end = payload.len();
    payload[end - 4..].copy_from_slice(&4096u32.to_le_bytes());
    assert!(error_of(&bzimage(&payload)).contains("more than the promised 4096"));
    payload[end - 4..].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(error_of(&bzimage(&payload)).contains("at most"));
}

#[test]
fn other_formats_are_named_with_advice() {
    let lzo = [&[0x89, b'L', b'Z', b'O', 0, 13, 10, 26, 10][..], &[0; 100]].concat();
    assert!(error_of(&bzimage(&lzo)).contains("CONFIG_KERNEL_ZSTD"));
    let bzip2 = [&b"BZh91AY&SY"[..], &[0; 100]].concat();
    assert!(error_of(&bzimage(&bzip2)).contains("bzip2-compressed, which is not supported"));
    assert!(error_of(&bzimage(&gzip(b"not a kernel"))).contains("not a vmlinux"));
    let mut arm = sample();
    arm[18] = 183;
    assert!(error_of(&arm).contains("not for x86-64"));
    assert!(error_of(&sample()[..100]).contains("it ends before offset"));
}

proptest! {
    #[test]
    fn no_damaged_kernel_causes_a_panic(
        hits in prop::collection::vec((0usize..4000, any::<u8>()), 1..12),
        cut in 0usize..4000,
        gz in any::<bool>(),
    ) {
        let elf = vmlinux(&[7; 1500], true);
        let mut image = if gz { bzimage(&gzip(&elf)) } else { elf };
        for (at, value) in hits {
            let length = image.len();
            image[at % length] = value;
        }
        image.truncate(image.len().max(cut));
        let _ = fuzz_vmlinux(&image, 1 << 20);
        let shorter = image.len().min(cut);
        let _ = fuzz_vmlinux(&image[..shorter], 1 << 20);
    }
}

#[test]
fn the_memory_that_a_kernel_needs_is_told_from_its_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    // One segment of 5000 bytes at 16 MiB.
    fs::write(&path, testing::vmlinux(&[7; 5000], true)).unwrap();
    let of_elf = least_memory(&path, 3 << 20).unwrap();
    assert_eq!(of_elf, (16 << 20) + 5000 + (6 << 20) + WORKING_MEMORY);
    let mut image = super::bzimage::testing::bzimage(b"whatever");
    image[0x258..0x260].copy_from_slice(&(16u64 << 20).to_le_bytes());
    image[0x260..0x264].copy_from_slice(&(40u32 << 20).to_le_bytes());
    fs::write(&path, &image).unwrap();
    assert_eq!(least_memory(&path, 0).unwrap(), (56 << 20) + WORKING_MEMORY);
    image[0x258..0x260].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, &image).unwrap();
    assert!(least_memory(&path, 0).is_err());
    assert!(least_memory(&path, u64::MAX).is_err());
}
