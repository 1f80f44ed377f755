//! What can be found out about a VM's files before anything is set up.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use clone_api::config::Overlay;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_image::kernel::KernelCache;

use super::cache;
use crate::error::Result;

/// Finds everything that is wrong with the files that `config` names.
pub(super) fn check_files(config: &VmConfig) -> Result<()> {
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

/// The kernel to boot: a `vmlinux` from the cache where it can be entered directly, since a guest
/// unpacks itself slowly; otherwise the file as it is.
pub(super) fn boot_kernel(kernel: &Path) -> Result<PathBuf> {
    // Whether it is a kernel at all is told in any case.
    clone_image::kernel::inspect(kernel).map_err(|error| {
        ApiError {
            code: ErrorCode::InvalidConfig,
            ..ApiError::internal(&error)
        }
        .advise("use a bzImage (as in /boot/vmlinuz-…) or an ELF vmlinux for x86-64")
    })?;
    let cached = cache::dir("kernels")
        .ok_or_else(|| io::Error::other("no home directory").into())
        .and_then(
            |dir| -> std::result::Result<_, Box<dyn std::error::Error>> {
                Ok(KernelCache::open(dir)?.vmlinux(kernel)?)
            },
        );
    match cached {
        Ok(cached) if cached.pvh => Ok(cached.vmlinux),
        Ok(_) => Ok(kernel.to_owned()),
        Err(error) => {
            tracing::debug!(%error, "the kernel is booted as it is");
            Ok(kernel.to_owned())
        }
    }
}
