//! Kernel modules for an initramfs: finds them, orders them by dependencies, and decompresses them.
//!
//! Dependencies are read from the module itself (`depends=` in its `.modinfo`), so a kernel package
//! that was only unpacked, without running `depmod`, is sufficient.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::decompress::{BoundedError, Compression, read_bounded};
use crate::kernel::Elf;
use crate::{ImageError, Result};

/// The size limit of an uncompressed module, larger than any existing one.
const MAX_MODULE: u64 = 256 << 20;
/// Module trees are five or six directories deep.
const MAX_DEPTH: usize = 16;

/// A decompressed module.
pub(super) struct Module {
    /// The name with underscores, as the kernel has it.
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// The modules below a directory, by name.
struct Found {
    dir: PathBuf,
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
}

/// `virtio-blk.ko.xz` and `virtio_blk` are the same module.
fn name_of(file: &str) -> Option<String> {
    let (stem, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| stem.replace('-', "_"))
}

impl Found {
    fn new(dir: &Path) -> Result<Self> {
        let mut files = HashMap::new();
        let mut todo = vec![(dir.to_owned(), 0)];
        while let Some((here, depth)) = todo.pop() {
            for item in
                std::fs::read_dir(&here).map_err(ImageError::io("read the modules in", &here))?
            {
                let item = item.map_err(ImageError::io("read the modules in", &here))?;
                let kind = item
                    .file_type()
                    .map_err(ImageError::io("read the status of", item.path()))?;
                if kind.is_dir() && depth < MAX_DEPTH {
                    todo.push((item.path(), depth + 1));
                } else if let Some(name) = item.file_name().to_str().and_then(name_of) {
                    files.insert(name, item.path());
                }
            }
        }
        // Missing in a directory that somebody put together by hand.
        let builtin = std::fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin
            .lines()
            .filter_map(|line| name_of(line.rsplit('/').next()?))
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            files,
            builtin,
        })
    }

    /// Adds a module after its dependencies. `needed_by` is for the error message.
    fn add(&self, name: &str, needed_by: &[String], order: &mut Vec<Module>) -> Result<()> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            let by = needed_by
                .last()
                .map(|by| format!(" (needed by {by})"))
                .unwrap_or_default();
            return Err(ImageError::Unsupported {
                what: format!("{} has no module {name}{by}", self.dir.display()),
                advice: "give the modules directory of the very kernel that is to boot".to_owned(),
            });
        };
        if needed_by.contains(&name) {
            return Err(ImageError::malformed(
                path.display().to_string(),
                "it needs itself",
            ));
        }
        let bytes = read(path)?;
        let mut above = needed_by.to_vec();
        above.push(name.clone());
        for need in depends(path, &bytes)? {
            self.add(&need, &above, order)?;
        }
        order.push(Module { name, bytes });
        Ok(())
    }
}

/// The modules of these names and all that they need, in the order they must be loaded. Names of what is built into
/// the kernel are left out; `optional` ones may be missing.
pub(super) fn collect(dir: &Path, required: &[String], optional: &[String]) -> Result<Vec<Module>> {
    let found = Found::new(dir)?;
    let mut order = Vec::new();
    for name in required {
        found.add(name, &[], &mut order)?;
    }
    for name in optional
        .iter()
        .filter(|name| found.files.contains_key(&name.replace('-', "_")))
    {
        found.add(name, &[], &mut order)?;
    }
    Ok(order)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(ImageError::io("open the module", path))?;
    let mut packed = Vec::new();
    BufReader::new(file)
        .take(MAX_MODULE)
        .read_to_end(&mut packed)
        .map_err(ImageError::io("read the module", path))?;
    let Some(compression) = Compression::detect(&packed) else {
        return Ok(packed);
    };
    let reader = compression.reader(&packed[..]).map_err(BoundedError::Io);
    reader
        .and_then(|reader| read_bounded(reader, MAX_MODULE))
        .map_err(|e| {
            let reason = match e {
                BoundedError::TooLong => format!("it decompresses to more than {MAX_MODULE} bytes"),
                BoundedError::Io(e) => e.to_string(),
            };
            ImageError::malformed(format!("the module {}", path.display()), reason)
        })
}

/// The names in `depends=` of the module's `.modinfo`.
fn depends(path: &Path, bytes: &[u8]) -> Result<Vec<String>> {
    let bad = |reason| ImageError::malformed(format!("the module {}", path.display()), reason);
    let info = Elf::parse(bytes)
        .and_then(|elf| elf.section(".modinfo"))
        .map_err(bad)?;
    let info = info.ok_or_else(|| bad("it has no .modinfo".to_owned()))?;
    let list = info
        .split(|&b| b == 0)
        .find_map(|line| line.strip_prefix(b"depends="));
    let list = String::from_utf8_lossy(list.unwrap_or_default()).into_owned();
    Ok(list
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}
