//! The host's directories that are mounted at boot: the `clone.mount=TAG:/PATH` arguments on the
//! kernel's command line.
//!
//! In a clone they are mounted already: its kernel goes on with the mounts of its template.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

/// The name of the argument.
const WORD: &str = "clone.mount=";

/// Mounts all of them. A share that cannot be mounted is reported on the console, and the guest goes
/// on without it.
pub(crate) fn mount_all() {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for (tag, path) in wanted(&cmdline) {
        if let Err(error) = mount_one(tag, path) {
            crate::say(&format!("cannot mount the share {tag} at {path}: {error}"));
        }
    }
}

/// The tags and their places.
fn wanted(cmdline: &str) -> impl Iterator<Item = (&str, &str)> {
    let words = cmdline.split_whitespace();
    let shares = words.filter_map(|word| word.strip_prefix(WORD));
    let pairs = shares.filter_map(|share| share.split_once(':'));
    pairs.filter(|(tag, path)| !tag.is_empty() && path.starts_with('/'))
}

fn mount_one(tag: &str, path: &str) -> io::Result<()> {
    // An agent that is started again finds its mounts.
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    let is_mounted = |mut fields: std::str::Split<'_, char>| {
        fields.next() == Some(tag) && fields.next() == Some(path)
    };
    if mounts.any(is_mounted) {
        return Ok(());
    }
    fs::create_dir_all(Path::new(path))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount(tag, path, "virtiofs", flags, c"")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_tags_and_places() {
        let line = "quiet clone.mount=src:/mnt/src ip=:::: clone.mount=a:b clone.mount=:/x \
                    clone.mount=b:/c:d";
        let found: Vec<_> = wanted(line).collect();
        assert_eq!(found, [("src", "/mnt/src"), ("b", "/c:d")]);
    }
}
