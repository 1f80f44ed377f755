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
    fn dependencies_are_read_from_the_module_itself() {
        assert_eq!(
            dependencies(b"x\0depends=kvm,ccp\0name=kvm_amd\0"),
            ["kvm", "ccp"]
        );
        assert!(dependencies(b"x\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
