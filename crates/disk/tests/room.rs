//! Layers on a file system that is nearly full, in a mount namespace of their own.
#![allow(clippy::unwrap_used)]

use std::io;
use std::path::Path;
use std::process::Command;

use clone_disk::{Disk, DiskSpec, EngineKind, Format, Writes};

/// Set where the test runs in its namespace: the directory with the small file system.
const SMALL: &str = "CLONE_TEST_SMALL_FILE_SYSTEM";
const MIB: u64 = 1 << 20;

/// Runs the test `name` again, with a file system of 64 MiB. Other users than root need user
/// namespaces for that.
fn again_in_a_namespace(name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let script = r#"mount -t tmpfs -o size=64m tmpfs "$0" && exec "$1" --exact "$2" --nocapture"#;
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .args([dir.path(), &program, Path::new(name)])
        .env(SMALL, dir.path())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

/// A disk of 1 GiB whose writes are in a layer in `dir`.
fn disk(dir: &Path, base: &Path) -> Disk {
    let spec = DiskSpec {
        writes: Writes::Ephemeral(Some(dir.to_owned())),
        ..DiskSpec::image(base, Format::Raw, false)
    };
    Disk::open(spec.open().unwrap(), EngineKind::Blocking).unwrap()
}

/// Writes mebibytes from `from` on until that is refused, and returns how many there are.
fn fill(disk: &mut Disk, from: u64, count: u64) -> u64 {
    let data = vec![7; MIB as usize];
    for number in 0..count {
        if let Err(error) = disk.write_at(&data, (from + number) * MIB) {
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            return number;
        }
    }
    count
}

#[test]
fn a_guest_that_fills_its_disk_leaves_room_to_others_and_goes_on() {
    let Some(dir) = std::env::var_os(SMALL) else {
        return again_in_a_namespace(
            "a_guest_that_fills_its_disk_leaves_room_to_others_and_goes_on",
        );
    };
    let dir = Path::new(&dir);
    let base = tempfile::NamedTempFile::new().unwrap();
    base.as_file().set_len(1024 * MIB).unwrap();
    let mut greedy = disk(dir, base.path());
    let filled = fill(&mut greedy, 0, 1024);
    assert!((28..=32).contains(&filled), "{filled} MiB of 64");
    // What it holds is its own: to read, to write again, and to give back.
    let mut sector = [0; 512];
    greedy.read_at(&mut sector, (filled - 1) * MIB).unwrap();
    assert_eq!(sector, [7; 512]);
    assert_eq!(fill(&mut greedy, 0, filled), filled);
    greedy.read_at(&mut sector, 512 * MIB).unwrap();
    assert_eq!(sector, [0; 512]);
    // Others have the half of what is left.
    let mut other = disk(dir, base.path());
    let others = fill(&mut other, 0, 1024);
    assert!((14..=18).contains(&others), "{others} MiB of 32");
    // And a third still finds some.
    let mut third = disk(dir, base.path());
    assert!(fill(&mut third, 0, 1024) >= 4);
    drop(other);
    drop(third);
    // What is given back can be written again.
    let discard = clone_disk::Request::Discard {
        offset: 0,
        len: filled * MIB,
    };
    greedy.call(discard).unwrap();
    assert!(fill(&mut greedy, 600, 8) == 8);
}
