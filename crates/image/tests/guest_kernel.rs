//! The kernel cache with a stock distribution kernel, which `CLONE_TEST_BZIMAGE` names.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use clone_image::kernel::{KernelCache, KernelFormat, inspect};

#[test]
fn a_stock_kernel_is_extracted_once_and_reused() {
    let Some(kernel) = std::env::var_os("CLONE_TEST_BZIMAGE").map(PathBuf::from) else {
        panic!(
            "set CLONE_TEST_BZIMAGE to a stock bzImage (`cargo xtask testbed` makes target/assets/guest/bzImage)"
        );
    };
    let info = inspect(&kernel).unwrap();
    assert_eq!(info.format, KernelFormat::BzImage);
    assert!(info.version.is_some(), "a stock kernel says its version");
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::open(dir.path()).unwrap();
    let first = cache.vmlinux(&kernel).unwrap();
    assert!(!first.reused);
    assert_eq!(inspect(&first.vmlinux).unwrap().format, KernelFormat::Elf);
    assert!(cache.vmlinux(&kernel).unwrap().reused);
}
