//! Running a command in the testbed with some files in its memory instead of behind 9p.
//!
//! A process that is killed while it waits for 9p leaves a request under way, whose answer the
//! device may still write into pages that are somebody else's by then: the testbed's kernel has
//! died of corrupted memory under tests that kill machines all the time. So what those run from,
//! programs and disk images, is unpacked into memory first. It is faster, too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Testbed;
use crate::process::run;

/// Unpacks an archive into a memory file system of its own, puts each file of it over the one of
/// the same path, and goes on as the command.
const SCRIPT: &str = r#"
set -e
mount -t tmpfs -o size=60% tmpfs /mnt
tar -xS -f "$1" -C /mnt
shift
while [ "$1" != -- ]; do
    mount --bind "/mnt$1" "$1"
    shift
done
shift
exec "$@"
"#;

/// The command `words`, for [`super::execute`], with these files (absolute paths) in memory, for it
/// and its children alone. They travel in `archive`, which is made, in a folder that the testbed
/// sees.
pub(crate) fn in_memory(
    archive: &Path,
    files: &[PathBuf],
    words: &[OsString],
) -> Result<Vec<OsString>> {
    let mut wrapped: Vec<OsString> = ["unshare", "--mount"].map(OsString::from).into();
    wrapped.extend(unpacked(archive, files, words)?);
    Ok(wrapped)
}

/// Puts these files into a testbed's memory, for all commands that are run in it afterwards.
pub(crate) fn load(testbed: &Testbed, archive: &Path, files: &[PathBuf]) -> Result<()> {
    let words = unpacked(archive, files, &["true".into()])?;
    let loaded = super::command(testbed, &words).status();
    let _ = std::fs::remove_file(archive);
    anyhow::ensure!(
        loaded.context("cannot run in a testbed")?.success(),
        "cannot copy files into the testbed's memory"
    );
    Ok(())
}

/// Packs the files, and returns the command that unpacks them and goes on as `words`.
fn unpacked(archive: &Path, files: &[PathBuf], words: &[OsString]) -> Result<Vec<OsString>> {
    let mut pack = Command::new("tar");
    // Holes stay holes: 9p does not know them.
    pack.args(["--create", "--sparse", "--file"]).arg(archive);
    pack.arg("--directory=/").args(
        files
            .iter()
            .map(|path| path.strip_prefix("/").unwrap_or(path)),
    );
    run(&mut pack)?;
    let mut wrapped: Vec<OsString> = ["sh", "-c", SCRIPT, "sh"].map(OsString::from).into();
    wrapped.push(archive.into());
    wrapped.extend(files.iter().map(OsString::from));
    wrapped.push("--".into());
    wrapped.extend(words.iter().cloned());
    Ok(wrapped)
}
