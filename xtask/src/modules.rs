//! Kernel modules and what they depend on, in the order in which they load.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// A module, unpacked.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

impl Module {
    /// The module without its signature, which costs an emulated CPU more to check than all else
    /// about a small module. The package that it came from was checked.
    pub(crate) fn without_signature(&self) -> &[u8] {
        const END: &[u8] = b"~Module signature appended~\n";
        // Before the end mark: 8 bytes of kinds and lengths, then the signature's length.
        const HEADER: usize = 12;
        let cut = || {
            let rest = self.content.strip_suffix(END)?;
            let len = u32::from_be_bytes(*rest.last_chunk()?);
            rest.get(..rest.len().checked_sub(HEADER + len as usize)?)
        };
        cut().unwrap_or(&self.content)
    }
}

/// Finds `wanted` and their dependencies below `folder` (a kernel's modules), each after what it
/// needs. Names that are not there are built into the kernel, or missing: loading would tell.
pub(crate) fn closure(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    index(folder, &mut files)?;
    let mut loaded = Vec::new();
    for name in wanted {
        add(name, &files, &mut loaded)?;
    }
    Ok(loaded)
}

/// Modules go by names with underscores, their files often by names with hyphens.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn index(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            index(&entry.path(), files)?;
        } else if let Some(name) = entry.file_name().to_string_lossy().strip_suffix(".ko.xz") {
            files.insert(normal(name), entry.path());
        }
    }
    Ok(())
}

fn add(name: &str, files: &HashMap<String, PathBuf>, loaded: &mut Vec<Module>) -> Result<()> {
    let name = normal(name);
    let Some(path) = files.get(&name) else {
        return Ok(());
    };
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let unpacked = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .output()
        .context("cannot run xz")?;
    anyhow::ensure!(
        unpacked.status.success(),
        "cannot unpack {}",
        path.display()
    );
    for dependency in dependencies(&unpacked.stdout) {
        add(&dependency, files, loaded)?;
    }
    loaded.push(Module {
        name,
        content: unpacked.stdout,
    });
    Ok(())
}

/// The `depends=` field of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = module
        .windows(FIELD.len())
        .position(|window| window == FIELD)
    else {
        return Vec::new();
    };
    let value = module[at + FIELD.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_cut_off_and_nothing_else() {
        let module = |content: &[u8]| Module {
            name: "m".to_owned(),
            content: content.to_vec(),
        };
        let mut signed = b"code".to_vec();
        signed.extend_from_slice(b"sig-");
        signed.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 4]);
        signed.extend_from_slice(b"~Module signature appended~\n");
        assert_eq!(module(&signed).without_signature(), b"code");
        assert_eq!(module(b"code").without_signature(), b"code");
        // A length beyond the file is no signature.
        let absurd = b"code\0\0\x02\0\0\0\0\0\0\0\xFF\xFF~Module signature appended~\n";
        assert_eq!(module(absurd).without_signature(), absurd);
    }

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        assert_eq!(
            dependencies(b"x\0depends=kvm,ccp\0name=kvm_amd\0"),
            ["kvm", "ccp"]
        );
        assert!(dependencies(b"x\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
