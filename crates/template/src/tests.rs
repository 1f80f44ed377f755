//! Templates exist as a whole or not at all, are shared and removed, and are refused after a
//! change, with the name of the changed file.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::testing::{FORMAT_1, Place, RAM, as_format_1, rewrite_text, tamper};

pub(super) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_template_is_read_back_verified_listed_and_removed() {
    let place = Place::new();
    let made = place.make("a", None);
    assert_eq!(made.manifest().id.len(), 32);
    made.verify(|_| {}).unwrap();
    let store = place.store();
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    let again = listed[0].1.as_ref().unwrap();
    assert_eq!(again.manifest(), made.manifest());
    let lies_on = again.parent().unwrap();
    assert_eq!(lies_on.disks[0].base.as_ref().unwrap().1, DiskFormat::Raw);
    assert_eq!(
        lies_on.boot.unwrap().kernel.path,
        place.path("a").join("kernel")
    );
    drop((made, listed));
    store.remove("a").unwrap();
    assert_eq!(names(&place.dir.path().join("store")), [""; 0]);
    assert_eq!(store.open("a").unwrap_err().code, ErrorCode::NotFound);
}

#[test]
fn a_template_in_use_is_not_removed() {
    let place = Place::new();
    let held = place.make("a", None);
    let error = place.store().remove("a").unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    drop(held);
    place.store().remove("a").unwrap();
}

#[test]
fn a_difference_shares_its_parents_files_and_outlives_it() {
    let place = Place::new();
    let parent = place.make("a", None);
    let child = place.make("b", Some(&parent));
    let inode = |path: PathBuf| fs::metadata(path).unwrap().ino();
    let shared =
        |name: &str| inode(place.path("a").join(name)) == inode(place.path("b").join(name));
    assert!(shared("memory-0.layer") && shared("disk-0.raw"));
    assert_eq!(child.content().parent.as_ref(), Some(&parent.manifest().id));
    drop(parent);
    place.store().remove("a").unwrap();
    child.verify(|_| {}).unwrap();
    let mut page = [0; 4096];
    child.memory().unwrap().read(2, &mut page).unwrap();
    assert_eq!(page[0], 2);
}

#[test]
fn what_is_damaged_does_not_become_whole_by_being_shared() {
    let place = Place::new();
    let parent = place.make("a", None);
    tamper(&place.path("a").join("disk-0.raw"), |opened| {
        opened.write_all_at(&[8], 0).unwrap();
    });
    // Whoever shares it has verified it; had it been hashed again, the damage would be described.
    let child = place.make("b", Some(&parent));
    let error = child.verify(|_| {}).unwrap_err();
    assert!(error.message.contains("disk-0.raw"), "{error:?}");
}

#[test]
fn a_flat_template_has_one_layer_and_the_same_memory() {
    let place = Place::new();
    let parent = place.make("a", None);
    let child = place.make("b", Some(&parent));
    let mut done = 0;
    let flat = flatten(&place.verified, &child, &place.path("flat"), |bytes| {
        done += bytes
    });
    let flat = flat.unwrap();
    assert_eq!(done, bytes_to_flatten(&child));
    assert_eq!(flat.content().memory.layers.len(), 1);
    let mut pages = [vec![0; RAM as usize], vec![1; RAM as usize]];
    child.memory().unwrap().read(0, &mut pages[0]).unwrap();
    flat.memory().unwrap().read(0, &mut pages[1]).unwrap();
    assert!(pages[0] == pages[1]);
    let disk = fs::read(flat.path("disk-0.raw")).unwrap();
    assert_eq!(disk, [[7; 4096], [9; 4096]].concat());
}

#[test]
fn what_was_not_committed_leaves_nothing_and_what_a_dead_maker_left_is_swept() {
    let place = Place::new();
    let mut new = NewTemplate::begin(&place.path("a")).unwrap();
    place.fill(&mut new, None).unwrap();
    drop(new);
    let store = place.dir.path().join("store");
    assert_eq!(names(&store), [""; 0]);
    // As a maker leaves it that was killed: whole files, no manifest, no lock.
    fs::create_dir(store.join(".a.tmp-0123")).unwrap();
    fs::write(store.join(".a.tmp-0123/memory-0.layer"), "x").unwrap();
    // One that is alive is not disturbed.
    let alive = NewTemplate::begin(&place.path("b")).unwrap();
    place.make("a", None);
    assert_eq!(names(&store).len(), 2);
    drop(alive);
    assert_eq!(names(&store), ["a"]);
}

#[test]
fn a_name_that_is_taken_is_refused_at_the_begin_and_at_the_end() {
    let place = Place::new();
    let mut second = NewTemplate::begin(&place.path("a")).unwrap();
    place.fill(&mut second, None).unwrap();
    place.make("a", None);
    let error = second.commit(place.parts(None), None).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    let error = NewTemplate::begin(&place.path("a")).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert_eq!(names(&place.dir.path().join("store")), ["a"]);
}

#[test]
fn a_flipped_bit_in_any_file_is_found_and_the_file_named() {
    for (file, at) in [
        ("memory-0.layer", 8192),
        ("state", 40),
        ("disk-0.raw", 4097),
        ("kernel", 3),
    ] {
        let place = Place::new();
        place
            .make("a", None)
            .ensure_verified(&place.verified)
            .unwrap();
        tamper(&place.path("a").join(file), |opened| {
            let mut byte = [0];
            opened.read_exact_at(&mut byte, at).unwrap();
            opened.write_all_at(&[byte[0] ^ 4], at).unwrap();
        });
        let touched = place.store().open("a").unwrap();
        let error = touched.ensure_verified(&place.verified).unwrap_err();
        assert!(error.message.contains(file), "{file}: {error}");
    }
}

#[test]
fn a_cut_missing_or_swapped_file_is_refused_by_its_name() {
    for file in ["memory-0.layer", "state", "disk-0.raw", "kernel"] {
        let place = Place::new();
        drop(place.make("a", None));
        let path = place.path("a").join(file);
        tamper(&path, |opened| {
            let len = opened.metadata().unwrap().len();
            opened.set_len(len - 1).unwrap();
        });
        let opened = place.store().open("a");
        let error = opened.and_then(|cut| cut.memory().map(drop)).unwrap_err();
        assert!(error.message.contains(file), "{file}: {error}");
        fs::remove_file(&path).unwrap();
        let error = place.store().open("a").unwrap_err();
        assert!(error.message.contains(file), "{file}: {error}");
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        let error = place.store().open("a").unwrap_err();
        assert!(error.message.contains(file), "{file}: {error}");
    }
    let place = Place::new();
    let parent = place.make("a", None);
    place.make("b", Some(&parent));
    let dir = place.path("b");
    fs::rename(dir.join("memory-0.layer"), dir.join("x")).unwrap();
    fs::rename(dir.join("memory-1.layer"), dir.join("memory-0.layer")).unwrap();
    fs::rename(dir.join("x"), dir.join("memory-1.layer")).unwrap();
    let error = place.store().open("b").unwrap_err();
    assert!(error.message.contains("memory-0.layer has"), "{error}");
}

#[test]
fn a_template_is_verified_once_and_again_when_it_was_touched() {
    let place = Place::new();
    let template = place.make("a", None);
    let stamp = place.verified.file(&template.manifest().id);
    assert!(
        stamp.exists(),
        "a template that was just written is verified"
    );
    fs::write(&stamp, "another").unwrap();
    template.ensure_verified(&place.verified).unwrap();
    assert_ne!(fs::read_to_string(&stamp).unwrap(), "another");
}

#[test]
fn a_template_of_the_first_format_is_upgraded_with_the_callers_kernel_and_can_then_travel() {
    let place = Place::new();
    drop(place.make("a", None));
    rewrite_text(&place.path("a"), FORMAT_1, as_format_1);
    let old = place.store().open("a").unwrap();
    assert!(old.parent().unwrap().boot.is_none());
    send(&old, &mut Vec::new()).unwrap_err();
    let path = |name: &str| place.dir.path().join(name);
    fs::write(path("vmlinux"), "the caller's kernel").unwrap();
    fs::write(path("initrd.img"), "the caller's initrd").unwrap();
    let (kernel, initrd) = (path("vmlinux"), path("initrd.img"));
    let target = place.path("b");
    let new = upgrade(&place.verified, &old, &target, &kernel, Some(&initrd)).unwrap();
    new.verify(|_| {}).unwrap();
    assert_eq!(new.manifest().format, manifest::FORMAT);
    let boot = new.parent().unwrap().boot.unwrap();
    let text = |file: &SharedFile| std::io::read_to_string(file.open().unwrap()).unwrap();
    assert_eq!(text(&boot.kernel), "the caller's kernel");
    assert_eq!(text(&boot.initrd.unwrap()), "the caller's initrd");
    // What it has in common with the old one is not copied.
    let inode = |name: &str| {
        fs::metadata(place.path(name).join("memory-0.layer"))
            .unwrap()
            .ino()
    };
    assert_eq!(inode("a"), inode("b"));
    send(&new, &mut Vec::new()).unwrap();
}
