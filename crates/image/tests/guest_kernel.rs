//! A stock distribution kernel and its modules, from the assets that `CLONE_TEST_ASSETS` names.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use clone_image::kernel::{KernelCache, KernelFormat, inspect};
use clone_image::{InitramfsInit, InitramfsSpec, build_initramfs};

fn asset(name: &str) -> PathBuf {
    let dir = std::env::var_os("CLONE_TEST_ASSETS")
        .expect("CLONE_TEST_ASSETS is not set: run this by `cargo xtask test --guest`");
    PathBuf::from(dir).join("guest-kernel").join(name)
}

#[test]
fn a_stock_kernel_is_extracted_once_and_reused() {
    let kernel = asset("bzImage");
    let info = inspect(&kernel).unwrap();
    assert_eq!(info.format, KernelFormat::BzImage);
    assert!(info.version.is_some(), "a stock kernel says its version");
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::open(dir.path()).unwrap();
    let first = cache.vmlinux(&kernel).unwrap();
    assert!(!first.reused && first.pvh);
    assert_eq!(inspect(&first.vmlinux).unwrap().format, KernelFormat::Elf);
    assert!(cache.vmlinux(&kernel).unwrap().reused);
}

#[test]
fn a_stock_kernels_modules_are_found_with_all_that_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = InitramfsSpec::new(dir.path().join("initramfs"), InitramfsInit::SwitchRoot);
    spec.busybox = Some(asset("busybox"));
    spec.modules_dir = Some(asset("modules"));
    spec.required_modules = vec!["virtio_blk".to_owned(), "virtio_net".to_owned()];
    let modules = build_initramfs(&spec).unwrap().modules;
    let place = |name: &str| modules.iter().position(|module| module == name).unwrap();
    assert!(place("failover") < place("net_failover"));
    assert!(place("net_failover") < place("virtio_net"));
    assert!(place("vsock") < place("vmw_vsock_virtio_transport"));
}
