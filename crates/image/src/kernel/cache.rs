//! The cache of extracted kernels.
//!
//! `DIR/<hash>.vmlinux` is the kernel extracted from the bzImage with that BLAKE3 hash; `DIR/<hash>.json` says what it
//! must look like. Both are written under a temporary name and renamed, the description last, so a crash leaves
//! either nothing or a whole entry. `DIR/<hash of a path>.seen` remembers the size, inode and times of the files last
//! seen together: as long as none of them changed, a start need not hash a hundred megabytes again. Anything that
//! does not fit is thrown away and made anew. Any number of processes may use one directory at once.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::{debug, info_span, warn};

use super::{KernelFormat, inspect, read_kernel, vmlinux_of};
use crate::{ImageError, Result};

/// A directory of extracted kernels.
#[derive(Clone, Debug)]
pub struct KernelCache {
    dir: PathBuf,
}

/// A kernel that is ready to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedKernel {
    /// The ELF `vmlinux`: in the cache, or the caller's own file if that was one already.
    pub vmlinux: PathBuf,
    /// It has a PVH entry point.
    pub pvh: bool,
    /// True if nothing had to be extracted.
    pub reused: bool,
}

/// The expected size and hash of an entry's file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    format: u32,
    bytes: u64,
    blake3: String,
    pvh: bool,
}

const ENTRY_FORMAT: u32 = 1;
/// Write permission for the group or for others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// What tells that a file is still the one seen before: nobody changes content without changing the inode's ctime.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    dev: u64,
    ino: u64,
    bytes: u64,
    ctime: i64,
    ctime_ns: i64,
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self {
            dev: meta.dev(),
            ino: meta.ino(),
            bytes: meta.len(),
            ctime: meta.ctime(),
            ctime_ns: meta.ctime_nsec(),
        })
    }
}

impl Stamp {
    /// True once a change from now on is sure to show: timestamps are coarse, and two writes in one tick look alike.
    fn is_settled(&self) -> bool {
        let now = clone_base::clock::since_1970();
        i64::try_from(now.as_secs()).is_ok_and(|now| now > self.ctime + 1)
    }
}

/// A kernel and its extracted file as they were when both had been checked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    key: String,
    kernel: Stamp,
    vmlinux: Stamp,
}

impl KernelCache {
    /// Opens a cache directory and makes it if it is missing.
    ///
    /// # Errors
    /// If the directory cannot be made, or another user could put a kernel into it.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(ImageError::io("create the kernel cache", &dir))?;
        let meta = fs::metadata(&dir).map_err(ImageError::io("look at the kernel cache", &dir))?;
        let ours = [0, rustix::process::geteuid().as_raw()].contains(&meta.uid());
        if ours && meta.mode() & WRITABLE_BY_OTHERS == 0 {
            return Ok(Self { dir });
        }
        let reason = "other users can write to it (chmod go-w helps where it is yours)";
        let error = std::io::Error::new(std::io::ErrorKind::PermissionDenied, reason);
        Err(ImageError::io("rely on the kernel cache", &dir)(error))
    }

    /// The `vmlinux` of this kernel: the file itself if it is one, else the cached or newly extracted one.
    ///
    /// # Errors
    /// [`ImageError::Kernel`] for a damaged or hostile kernel, [`ImageError::Io`] for a cache that cannot be written.
    pub fn vmlinux(&self, kernel: &Path) -> Result<CachedKernel> {
        let _span = info_span!("kernel_cache", kernel = %kernel.display()).entered();
        let bad = |reason| ImageError::Kernel {
            path: kernel.to_owned(),
            reason,
        };
        if inspect(kernel)?.format == KernelFormat::Elf {
            let (_, facts) = vmlinux_of(read_kernel(kernel)?).map_err(bad)?;
            return Ok(CachedKernel {
                vmlinux: kernel.to_owned(),
                pvh: facts.pvh,
                reused: true,
            });
        }
        if let Some(hit) = self.unchanged(kernel) {
            return Ok(hit);
        }
        let stamp = Stamp::of(kernel);
        let bytes = read_kernel(kernel)?;
        let key = blake3::hash(&bytes).to_hex().to_string();
        let found = match self.checked(&key) {
            Some(hit) => hit,
            None => {
                let (elf, facts) = vmlinux_of(bytes).map_err(bad)?;
                self.store(&key, &elf, facts.pvh)?;
                CachedKernel {
                    vmlinux: self.vmlinux_path(&key),
                    pvh: facts.pvh,
                    reused: false,
                }
            }
        };
        // Only if the file did not change while it was read: else its stamp says nothing of what was hashed.
        if let (Some(before), Some(after), Some(vmlinux)) =
            (stamp, Stamp::of(kernel), Stamp::of(&found.vmlinux))
            && before == after
            && after.is_settled()
            && vmlinux.is_settled()
        {
            let seen = Seen {
                key,
                kernel: after,
                vmlinux,
            };
            self.write(&self.seen_path(kernel), &to_json(&seen))?;
        }
        Ok(found)
    }

    fn vmlinux_path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.vmlinux"))
    }

    fn entry_path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.json"))
    }

    fn seen_path(&self, kernel: &Path) -> PathBuf {
        let path = fs::canonicalize(kernel).unwrap_or_else(|_| kernel.to_owned());
        self.dir.join(format!(
            "{}.seen",
            blake3::hash(path.as_os_str().as_bytes()).to_hex()
        ))
    }

    /// A hit by stamps alone: neither the kernel nor its extracted file changed since both were last hashed.
    fn unchanged(&self, kernel: &Path) -> Option<CachedKernel> {
        let seen: Seen = read_json(&self.seen_path(kernel))?;
        // The key becomes part of a path: it must be a hash and nothing else.
        blake3::Hash::from_hex(&seen.key).ok()?;
        let vmlinux = self.vmlinux_path(&seen.key);
        if Stamp::of(kernel)? != seen.kernel || Stamp::of(&vmlinux)? != seen.vmlinux {
            return None;
        }
        let entry: Entry =
            read_json(&self.entry_path(&seen.key)).filter(|e: &Entry| e.format == ENTRY_FORMAT)?;
        Some(CachedKernel {
            vmlinux,
            pvh: entry.pvh,
            reused: true,
        })
    }

    /// A hit by content: the extracted file has the length and hash that its description promises.
    fn checked(&self, key: &str) -> Option<CachedKernel> {
        let vmlinux = self.vmlinux_path(key);
        let entry: Entry = read_json(&self.entry_path(key))?;
        let file = File::open(&vmlinux).ok()?;
        let mut hasher = blake3::Hasher::new();
        let whole = entry.format == ENTRY_FORMAT
            && file.metadata().is_ok_and(|meta| meta.len() == entry.bytes)
            && hasher.update_reader(&file).is_ok()
            && hasher.finalize().to_hex().as_str() == entry.blake3;
        if !whole {
            warn!(vmlinux = %vmlinux.display(), "the cached kernel is damaged and will be extracted again");
            return None;
        }
        Some(CachedKernel {
            vmlinux,
            pvh: entry.pvh,
            reused: true,
        })
    }

    fn store(&self, key: &str, elf: &[u8], pvh: bool) -> Result<()> {
        let entry = Entry {
            format: ENTRY_FORMAT,
            bytes: elf.len() as u64,
            blake3: blake3::hash(elf).to_hex().to_string(),
            pvh,
        };
        self.write(&self.vmlinux_path(key), elf)?;
        self.write(&self.entry_path(key), &to_json(&entry))?;
        debug!(key, bytes = elf.len(), "extracted a kernel");
        Ok(())
    }

    /// Puts a file in place at once.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |e| ImageError::io("write the kernel cache's file", path)(e);
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)
            .map_err(failed)?;
        file.write_all(bytes)
            .and_then(|()| file.as_file().sync_data())
            .map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

/// Reads a small description; a missing or damaged one counts as absent.
fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
