//! What a change can have broken: which crates and guest tests a test run is for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::paths;
use crate::process::{cargo, output};

/// The guest test that runs what pages show, and the pages.
const BOOK: (&str, &[&str]) = ("guest_book", &["docs", "README.md", "examples"]);
/// The guest test that installs the package, and what goes into the package alone.
const PACKAGE: (&str, &[&str]) = ("guest_package", &["packaging"]);
/// The crate whose tests read the pages.
const READS_PAGES: &str = "army";
/// What all crates are built by.
const BUILDS_ALL: [&str; 4] = ["Cargo.toml", "Cargo.lock", ".cargo", ".config"];

/// The part of the workspace that a test run is for.
pub(super) struct Scope {
    /// The crates; `None` for all.
    crates: Option<BTreeSet<String>>,
    /// The beginnings of the names of guest-test binaries' ids; `None` for all.
    guest_tests: Option<BTreeSet<String>>,
}

impl Scope {
    pub(super) fn everything() -> Self {
        Self {
            crates: None,
            guest_tests: None,
        }
    }

    /// What differs from the commit `rev`, files that git does not track included.
    pub(super) fn changed_since(rev: &str) -> Result<Self> {
        let git = |words: &[&str]| {
            let mut git = Command::new("git");
            output(git.args(words).current_dir(paths::workspace()))
        };
        let tracked = git(&["diff", "--name-only", rev, "--"])?;
        let new = git(&["ls-files", "--others", "--exclude-standard"])?;
        let metadata = output(&mut cargo(&[
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
        ]))?;
        let crates = Crates::parse(&metadata)?;
        Ok(crates.affected_by(tracked.lines().chain(new.lines())))
    }

    /// Cargo's arguments for the crates.
    pub(super) fn packages(&self) -> Vec<String> {
        match &self.crates {
            None => vec!["--workspace".to_owned()],
            Some(crates) => {
                let words = crates.iter().map(|name| ["-p".to_owned(), name.clone()]);
                words.flatten().collect()
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.crates.as_ref().is_some_and(BTreeSet::is_empty)
    }

    /// Whether any guest test is in it, unless only `unit` tests are asked for.
    pub(super) fn needs_guests(&self, unit: bool) -> bool {
        !unit
            && self
                .guest_tests
                .as_ref()
                .is_none_or(|tests| !tests.is_empty())
    }

    /// Whether the guest tests of the binary with this id are in it.
    pub(super) fn holds_guest_test(&self, id: &str) -> bool {
        let tests = self.guest_tests.as_ref();
        tests.is_none_or(|tests| tests.iter().any(|begin| id.starts_with(begin.as_str())))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(crates) = &self.crates else {
            return write!(f, "all crates, all guest tests");
        };
        let list = |names: Vec<&str>| match names.is_empty() {
            true => "none".to_owned(),
            false => names.join(" "),
        };
        let guests = self.guest_tests.iter().flatten();
        let guests = guests.map(|begin| begin.trim_end_matches(':')).collect();
        write!(
            f,
            "crates that the change can have broken: {}\nguest tests of: {}",
            list(crates.iter().map(String::as_str).collect()),
            list(guests)
        )
    }
}

/// The workspace's crates.
struct Crates {
    /// The folder of each, relative to the workspace.
    folders: BTreeMap<String, String>,
    /// The crates of the workspace that each depends on.
    dependencies: BTreeMap<String, Vec<String>>,
}

impl Crates {
    /// Reads `cargo metadata --no-deps`.
    fn parse(metadata: &str) -> Result<Self> {
        let metadata: Value = serde_json::from_str(metadata).context("cargo's metadata")?;
        let root = metadata["workspace_root"].as_str().unwrap_or_default();
        let packages = metadata["packages"].as_array();
        let packages = packages.context("cargo's metadata has no packages")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let folder = |package: &Value| {
            let manifest = text(&package["manifest_path"]);
            let folder = Path::new(&manifest).parent().map(Path::to_owned);
            let folder = folder.unwrap_or_default();
            let relative = folder.strip_prefix(root).unwrap_or(&folder);
            relative.to_string_lossy().into_owned()
        };
        let folders: BTreeMap<_, _> = packages
            .iter()
            .map(|package| (text(&package["name"]), folder(package)))
            .collect();
        let dependencies = packages
            .iter()
            .map(|package| {
                let names = package["dependencies"].as_array().into_iter().flatten();
                let names = names.map(|dependency| text(&dependency["name"]));
                let ours = names.filter(|name| folders.contains_key(name)).collect();
                (text(&package["name"]), ours)
            })
            .collect();
        Ok(Self {
            folders,
            dependencies,
        })
    }

    /// The crate that a file belongs to.
    fn owner(&self, file: &str) -> Option<&str> {
        let mut owners = self.folders.iter();
        let owner = owners.find(|(_, folder)| is_below(file, folder));
        owner.map(|(name, _)| name.as_str())
    }

    /// What a change of these files can have broken.
    fn affected_by<'a>(&self, files: impl Iterator<Item = &'a str>) -> Scope {
        let (mut crates, mut guest_tests) = (BTreeSet::new(), BTreeSet::new());
        for file in files {
            if BUILDS_ALL.iter().any(|path| is_below(file, path)) {
                return Scope::everything();
            }
            for (test, paths) in [BOOK, PACKAGE] {
                if paths.iter().any(|path| is_below(file, path)) {
                    crates.insert(READS_PAGES.to_owned());
                    guest_tests.insert(format!("{READS_PAGES}::{test}"));
                }
            }
            if let Some(owner) = self.owner(file) {
                crates.insert(owner.to_owned());
                guest_tests.insert(format!("{owner}::"));
            }
        }
        let mut known = 0;
        while crates.len() > known {
            known = crates.len();
            let dependents = self
                .dependencies
                .iter()
                .filter(|(_, dependencies)| dependencies.iter().any(|name| crates.contains(name)));
            let names: Vec<String> = dependents.map(|(name, _)| name.clone()).collect();
            crates.extend(names);
        }
        Scope {
            crates: Some(crates),
            guest_tests: Some(guest_tests),
        }
    }
}

/// Whether `file` is `path` or below it.
fn is_below(file: &str, path: &str) -> bool {
    let rest = file.strip_prefix(path);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const METADATA: &str = r#"{"workspace_root": "/w", "packages": [
        {"name": "low", "manifest_path": "/w/crates/low/Cargo.toml", "dependencies": [{"name": "serde"}]},
        {"name": "army", "manifest_path": "/w/crates/army/Cargo.toml", "dependencies": [{"name": "low"}]},
        {"name": "top", "manifest_path": "/w/crates/top/Cargo.toml", "dependencies": [{"name": "army"}]},
        {"name": "lowest", "manifest_path": "/w/crates/lowest/Cargo.toml", "dependencies": []}
    ]}"#;

    fn affected(files: &[&str]) -> Scope {
        let crates = Crates::parse(METADATA).unwrap();
        crates.affected_by(files.iter().copied())
    }

    #[test]
    fn a_change_reaches_all_that_depend_on_the_crate_and_no_other() {
        let scope = affected(&["crates/low/src/lib.rs"]);
        assert_eq!(scope.packages(), ["-p", "army", "-p", "low", "-p", "top"]);
        assert!(scope.holds_guest_test("low::guest_x"));
        assert!(!scope.holds_guest_test("lowest::guest_x"));
        assert!(!scope.holds_guest_test("army::guest_x"));
    }

    #[test]
    fn a_page_reaches_the_book_and_a_lock_file_everything() {
        let scope = affected(&["docs/guides/x.md"]);
        assert!(scope.holds_guest_test("army::guest_book"));
        assert!(!scope.holds_guest_test("army::guest_army"));
        let scope = affected(&["docs/x.md", "Cargo.lock"]);
        assert_eq!(scope.packages(), ["--workspace"]);
        assert!(scope.holds_guest_test("low::guest_x"));
    }

    #[test]
    fn no_change_breaks_nothing() {
        let scope = affected(&[]);
        assert!(scope.is_empty() && !scope.holds_guest_test("low::guest_x"));
    }
}
