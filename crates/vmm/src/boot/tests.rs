use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::ram;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_bytes(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Entry, BootError> {
    let mut initrd = initrd.map(file);
    let source = BootSource {
        kernel: &mut file(kernel),
        initrd: initrd.as_mut(),
        cmdline,
        rsdp: ACPI_TABLES,
    };
    load(&ram(64 << 20), source)
}

/// A bzImage of protocol 2.12 with 4 setup sectors and a payload.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + 4096];
    image[0x1F1] = 4;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020C_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x22C..0x230].copy_from_slice(&0x7FFF_FFFF_u32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&1_u16.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode() {
    let entry = load_bytes(&bzimage(), Some(b"disk"), "quiet").unwrap();
    assert!(
        matches!(entry, Entry::Linux64 { rip: 0x10_0200, .. }),
        "{entry:?}"
    );
}

#[test]
fn an_initrd_that_does_not_fit_says_so() {
    let error = load_bytes(&bzimage(), Some(&vec![1; 60 << 20]), "").unwrap_err();
    assert_eq!(
        error.to_string(),
        "RAM of 64 MiB is too small for the kernel and an initrd of 60 MiB"
    );
}

#[test]
fn a_32_bit_kernel_is_refused() {
    let mut image = bzimage();
    image[0x236] = 0;
    assert!(matches!(
        load_bytes(&image, None, ""),
        Err(BootError::NoEntry)
    ));
}

#[test]
fn a_command_line_that_linux_would_cut_is_refused() {
    let long = "a".repeat(CMDLINE_MAX);
    assert!(matches!(
        load_bytes(&bzimage(), None, &long),
        Err(BootError::Cmdline(2048))
    ));
}

#[test]
fn the_memory_map_covers_ram_around_the_hole_and_reserves_ecam() {
    let ram = GuestRam::from_ranges(&[
        (GuestAddress(0), 64 << 20),
        (GuestAddress(1 << 32), 32 << 20),
    ])
    .unwrap();
    let map = MemoryMap::of(&ram);
    let kinds: Vec<_> = map
        .0
        .iter()
        .map(|&(start, size, kind)| (start, start + size, kind))
        .collect();
    assert_eq!(
        kinds,
        [
            (0, 0x9_FC00, MemoryKind::Ram),
            (0x9_FC00, 0x10_0000, MemoryKind::Reserved),
            (0x10_0000, 64 << 20, MemoryKind::Ram),
            (0xE000_0000, 0xE010_0000, MemoryKind::Reserved),
            (1 << 32, (1 << 32) + (32 << 20), MemoryKind::Ram),
        ]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_kernels_are_refused_or_loaded_but_never_crash(
        at in 0usize..0x270, bytes in prop::collection::vec(any::<u8>(), 1..16), cut in 0usize..4096,
    ) {
        let mut image = bzimage();
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        image.truncate(image.len() - cut);
        let _ = load_bytes(&image, Some(b"x"), "");
        image[..4].copy_from_slice(b"\x7FELF");
        let _ = load_bytes(&image, None, "");
    }
}
