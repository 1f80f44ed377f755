//! Hostile directories, links and files of templates. The tests of forks cover what such templates
//! make a fork touch.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::testing::{Place, tamper};

#[test]
fn a_directory_or_a_file_that_another_user_may_write_to_is_refused() {
    let place = Place::new();
    drop(place.make("a", None));
    let dir = place.path("a");
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let refusal = || place.store().open("a").unwrap_err();
    for (path, open, shut) in [
        (dir.clone(), [0o770, 0o707, 0o1777], 0o700),
        (dir.join("kernel"), [0o420, 0o402, 0o666], 0o400),
        (dir.join(names::MANIFEST), [0o420, 0o402, 0o666], 0o400),
    ] {
        for open in open {
            mode(&path, open);
            let error = refusal();
            assert!(error.message.contains("other users can write"), "{error}");
            assert!(error.advice.unwrap().contains("go-w"));
        }
        mode(&path, shut);
    }
    place.store().open("a").unwrap();
    // Only root can give files away.
    if rustix::process::geteuid().is_root() {
        for path in [dir.clone(), dir.join("state")] {
            std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
            let error = refusal();
            assert!(error.message.contains("user 4711"), "{error}");
            assert!(error.advice.unwrap().contains("chown"));
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
    }
}

#[test]
fn links_are_followed_nowhere_on_the_way_to_a_template() {
    let place = Place::new();
    drop(place.make("a", None));
    let store = place.dir.path().join("store");
    symlink(store.join("a"), store.join("link")).unwrap();
    symlink(&store, place.dir.path().join("way")).unwrap();
    for path in [store.join("link"), place.dir.path().join("way/a")] {
        let error = Template::open(&path).unwrap_err();
        assert!(error.message.contains("symbolic link"), "{error}");
        let advice = error.advice.unwrap();
        assert!(
            advice.ends_with(store.join("a").to_str().unwrap()),
            "{advice}"
        );
    }
    let error = NewTemplate::begin(&place.dir.path().join("way/b")).unwrap_err();
    assert!(error.message.contains("symbolic link"), "{error}");
    // The store itself is the caller's word.
    let resolved = folder::resolved(&place.dir.path().join("way/new")).unwrap();
    assert_eq!(resolved, store.join("new"));
}

#[test]
fn links_pipes_devices_and_directories_are_no_files_of_a_template() {
    for file in [
        "memory-0.layer",
        "state",
        "disk-0.raw",
        "kernel",
        "manifest.json",
    ] {
        let place = Place::new();
        drop(place.make("a", None));
        let path = place.path("a").join(file);
        let kept = place.dir.path().join("kept");
        fs::rename(&path, &kept).unwrap();
        let refused = |what: &str| {
            let error = place.store().open("a").unwrap_err();
            assert!(
                error.message.contains("no plain file"),
                "{file}, {what}: {error}"
            );
        };
        // Even to the right content.
        symlink(&kept, &path).unwrap();
        refused("link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused("directory");
        fs::remove_dir(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        refused("pipe");
        fs::remove_file(&path).unwrap();
        let null = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        if rustix::fs::mknodat(rustix::fs::CWD, &path, kind, 0o400.into(), null).is_ok() {
            refused("device");
        }
    }
}

#[test]
fn templates_of_one_kernel_hold_one_copy_of_it() {
    let place = Place::new();
    let inode = |name: &str| fs::metadata(place.path(name).join("kernel")).unwrap().ino();
    for name in ["a", "b", "c"] {
        place.make(name, None).verify(|_| {}).unwrap();
    }
    assert_eq!((inode("a"), inode("a")), (inode("b"), inode("c")));
    // One that arrives takes it, too.
    let mut stream = Vec::new();
    let elsewhere = Place::new();
    send(&elsewhere.make("x", None), &mut stream).unwrap();
    receive(
        &place.path("d"),
        None,
        &mut stream.as_slice(),
        &place.verified,
    )
    .unwrap();
    assert_eq!(inode("a"), inode("d"));
    place.store().remove("a").unwrap();
    place.store().open("b").unwrap().verify(|_| {}).unwrap();
    // A damaged one is shared by nobody.
    tamper(&place.path("b").join("kernel"), |file| {
        file.write_all_at(b"other", 0).unwrap();
    });
    let new = place.make("e", None);
    assert_ne!(inode("b"), inode("e"));
    new.verify(|_| {}).unwrap();
}
