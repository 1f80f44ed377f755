//! Checks a VM's files before anything is set up.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clone_api::config::Overlay;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_image::ImageError;
use clone_image::kernel::{KernelCache, MAX_KERNEL_BYTES, least_memory};
use clone_start::error::{Result, failed};

use crate::cache;

// A kernel that is refused at a boot must be refused in a template too.
const _: () = assert!(clone_template::MAX_KERNEL_BYTES == MAX_KERNEL_BYTES);

/// Checks the files that `config` names, and reports all problems at once.
pub(crate) fn check_files(config: &VmConfig) -> Result<()> {
    let mut problems = Vec::new();
    let mut check = |field: String, path: &Path, write: bool| {
        let opened = File::options().read(true).write(write).open(path);
        let problem = match opened.and_then(|file| file.metadata()) {
            Ok(metadata) if metadata.is_dir() => "is a directory".to_owned(),
            Ok(_) => return,
            Err(error) => error.to_string(),
        };
        problems.push(format!("  {field}: {}: {problem}", path.display()));
    };
    check("kernel".into(), &config.kernel, false);
    if let Some(initrd) = &config.initrd {
        check("initrd".into(), initrd, false);
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let write = !disk.read_only && disk.overlay == Overlay::None;
        check(format!("disks[{index}]"), &disk.path, write);
        for (number, image) in disk.backing.iter().enumerate() {
            check(
                format!("disks[{index}].backing[{number}]"),
                &image.path,
                false,
            );
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::InvalidConfig,
        format!("the VM's files cannot be opened:\n{}", problems.join("\n")),
    )
    .advise("check the paths and their permissions; disks are opened for writing unless they are `ro` or have an overlay"))
}

/// Returns the kernel to boot: a `vmlinux` from the cache if it can be entered directly, since
/// decompression in the guest is slow; otherwise the file itself.
///
/// A damaged kernel is always refused, since it would hang when booted.
pub fn boot_kernel(kernel: &Path) -> Result<PathBuf> {
    let cached = match cache::dir("kernels") {
        Some(dir) => KernelCache::open(dir).and_then(|cache| cache.vmlinux(kernel)),
        None => return whole(kernel),
    };
    match cached {
        Ok(cached) if cached.pvh => Ok(cached.vmlinux),
        Ok(_) => Ok(kernel.to_owned()),
        // Either the kernel or the cache could not be read or written.
        Err(error @ ImageError::Io { .. }) => {
            tracing::warn!(%error, "the kernel is booted as it is");
            whole(kernel)
        }
        Err(error) => Err(no_kernel(&error)),
    }
}

/// Checks that the guest's RAM has room for `kernel`, the one that is booted, and its initrd.
pub(crate) fn check_memory(config: &VmConfig, kernel: &Path) -> Result<()> {
    let initrd = match &config.initrd {
        Some(path) => {
            let about = fs::metadata(path).map_err(failed("look at the initrd", path))?;
            about.len()
        }
        None => 0,
    };
    let least = least_memory(kernel, initrd).map_err(|error| no_kernel(&error))?;
    if config.memory.0 >= least {
        return Ok(());
    }
    let least = least.div_ceil(1 << 20);
    let with = if initrd > 0 { " with its initrd" } else { "" };
    let message = format!(
        "memory: {} is too small: the kernel {}{with} needs at least {least} MiB",
        config.memory,
        config.kernel.display()
    );
    let advice = format!("--memory {least}M, and more for what the guest is to do");
    Err(ApiError::new(ErrorCode::InvalidConfig, message).advise(advice))
}

/// Returns the file itself if it is a complete kernel.
fn whole(kernel: &Path) -> Result<PathBuf> {
    clone_image::kernel::extract_vmlinux(kernel)
        .map(|_| kernel.to_owned())
        .map_err(|error| no_kernel(&error))
}

fn no_kernel(error: &ImageError) -> ApiError {
    ApiError {
        code: ErrorCode::InvalidConfig,
        ..ApiError::internal(error)
    }
    .advise("use a bzImage (as in /boot/vmlinuz-…) or an ELF vmlinux for x86-64")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clone_api::Bytes;

    /// A kernel file that says it takes up 40 MiB from 16 MiB on.
    fn kernel(dir: &Path) -> PathBuf {
        let mut image = vec![0; 4096];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&(16u64 << 20).to_le_bytes());
        image[0x260..0x264].copy_from_slice(&(40u32 << 20).to_le_bytes());
        let path = dir.join("vmlinuz");
        fs::write(&path, image).unwrap();
        path
    }

    #[test]
    fn too_little_memory_is_told_with_what_the_kernel_needs() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel(dir.path());
        let initrd = dir.path().join("initrd");
        fs::write(&initrd, vec![0; 3 << 20]).unwrap();
        let mut config = VmConfig {
            kernel: kernel.clone(),
            memory: Bytes::mib(71),
            ..VmConfig::default()
        };
        let error = check_memory(&config, &kernel).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        assert!(
            error.message.contains("needs at least 72 MiB"),
            "{}",
            error.message
        );
        config.memory = Bytes::mib(72);
        check_memory(&config, &kernel).unwrap();
        config.initrd = Some(initrd);
        let error = check_memory(&config, &kernel).unwrap_err();
        assert!(
            error.message.contains("needs at least 78 MiB"),
            "{}",
            error.message
        );
        config.memory = Bytes::mib(78);
        check_memory(&config, &kernel).unwrap();
    }
}
