//! Faults at every step, flipped bits at any place, hostile files, and concurrent makers.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::faults::{Fault, inject};
use super::tests::names;
use super::*;
use crate::testing::{Place, rewrite, tamper};

/// More steps than making a template has.
const MANY: u32 = 100;
/// Tell the process that dies where, and after how many steps.
const STORE: &str = "CLONE_TEST_STORE";
const STEP: &str = "CLONE_TEST_STEP";

/// Makes the template `b` over `a`; a fault comes after so many steps.
fn make_with(fault: Fault, after: u32, place: &Place, store: &Path) -> Result<Template> {
    let parent = Template::open(&store.join("a"))?;
    inject(fault, after);
    let mut new = NewTemplate::begin(&store.join("b"))?;
    place.fill(&mut new, Some(&parent))?;
    new.commit(place.parts(Some(&parent)), None)
}

/// `a` is whole, `b` is whole or not there. Says whether it is.
fn is_made(place: &Place) -> bool {
    let whole = |name: &str| place.store().open(name).unwrap().verify(|_| {}).unwrap();
    whole("a");
    let made = place.path("b").exists();
    if made {
        whole("b");
    }
    made
}

#[test]
fn an_error_at_any_step_leaves_nothing_or_a_whole_template() {
    let place = Place::new();
    drop(place.make("a", None));
    let store = place.dir.path().join("store");
    for after in 0..MANY {
        let made = make_with(Fault::Error, after, &place, &store);
        let left = match is_made(&place) {
            true => vec!["a", "b"],
            false => vec!["a"],
        };
        assert_eq!(names(&store), left, "after {after} steps");
        if made.is_ok() {
            assert!(after > 10, "no fault came after {after} steps");
            return;
        }
        drop(made);
        let _ = fs::remove_dir_all(place.path("b"));
    }
    panic!("there is no end of steps");
}

#[test]
#[ignore = "it dies: the test below starts it, in a process of its own"]
fn a_maker_that_dies() {
    let (Some(store), Ok(step)) = (std::env::var_os(STORE), std::env::var(STEP)) else {
        return;
    };
    let made = make_with(
        Fault::Death,
        step.parse().unwrap(),
        &Place::new(),
        Path::new(&store),
    );
    made.unwrap();
}

#[test]
fn a_death_at_any_step_leaves_nothing_or_a_whole_template_and_the_rest_is_swept() {
    let place = Place::new();
    drop(place.make("a", None));
    let store = place.dir.path().join("store");
    for after in 0..MANY {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "fault_tests::a_maker_that_dies"])
            .env(STORE, &store)
            .env(STEP, after.to_string())
            // What it leaves of its own goes with this test's.
            .env("TMPDIR", place.dir.path())
            .output()
            .unwrap();
        let made = is_made(&place);
        if child.status.success() {
            assert!(made && after > 10, "nobody died after {after} steps");
            return;
        }
        drop(NewTemplate::begin(&place.path("c")).unwrap());
        let left = names(&store);
        assert_eq!(left.len(), 1 + usize::from(made), "after {after}: {left:?}");
        let _ = fs::remove_dir_all(place.path("b"));
    }
    panic!("there is no end of steps");
}

#[test]
fn makers_in_one_directory_do_not_sweep_each_other() {
    let place = Place::new();
    std::thread::scope(|scope| {
        for maker in 0..4 {
            let place = &place;
            scope.spawn(move || {
                for turn in 0..100 {
                    let target = place.path(&format!("t{maker}-{turn}"));
                    let mut new = NewTemplate::begin(&target).unwrap();
                    new.memory_file().unwrap();
                }
            });
        }
    });
    assert_eq!(names(&place.dir.path().join("store")), [""; 0]);
}

/// Where a file has data: a bit in a hole of a layer belongs to no page of it.
fn data_of(path: &Path) -> Vec<u64> {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        bytes.extend(start..at.min(len));
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_flipped_bit_anywhere_is_found(
        which in any::<prop::sample::Index>(), byte in any::<prop::sample::Index>(), bit in 0u8..8
    ) {
        let place = Place::new();
        let parent = place.make("a", None);
        let child = place.make("b", Some(&parent));
        let mut files = names(child.dir());
        prop_assert_eq!(files.len(), 7);
        let file = files.swap_remove(which.index(files.len()));
        let path = child.dir().join(&file);
        drop((child, parent));
        let data = data_of(&path);
        let at = data[byte.index(data.len())];
        tamper(&path, |opened| {
            let mut byte = [0];
            opened.read_exact_at(&mut byte, at).unwrap();
            opened.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
        });
        let checked = place.store().open("b").and_then(|it| it.ensure_verified(&place.verified));
        let Err(error) = checked else {
            return Err(TestCaseError::fail(format!("{file}: bit {bit} of byte {at}")));
        };
        let named = file == names::MANIFEST || error.message.contains(&file);
        prop_assert!(named, "{}: {}", file, error);
    }
}

#[test]
fn a_pipe_in_place_of_a_file_is_refused_and_not_waited_for() {
    for file in [
        "memory-0.layer",
        "state",
        "disk-0.raw",
        "kernel",
        names::MANIFEST,
    ] {
        let place = Place::new();
        drop(place.make("a", None));
        let path = place.path("a").join(file);
        fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        let error = place.store().open("a").unwrap_err();
        assert!(error.message.contains("no plain file"), "{error}");
        assert!(error.message.contains(file), "{error}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused_though_their_hashes_are_right() {
    let place = Place::new();
    let parent = place.make("a", None);
    drop(place.make("b", Some(&parent)));
    let dir = place.path("b");
    let refusal = || {
        let opened = place.store().open("b");
        let error = opened.and_then(|it| it.ensure_verified(&place.verified));
        error.unwrap_err().message
    };
    rewrite(&dir, |content| {
        let disk = &mut content.disks[0];
        let (base, layer) = (disk.base.clone(), disk.layers[0].clone());
        disk.base.hash = layer.hash;
        disk.layers[0].hash = base.hash;
    });
    assert!(refusal().contains("disk-0.raw"), "{}", refusal());
    rewrite(&dir, |content| {
        let disk = &mut content.disks[0];
        let (base, layer) = (disk.base.clone(), disk.layers[0].clone());
        disk.base.hash = layer.hash;
        disk.layers[0].hash = base.hash;
        content.memory.layers.remove(0);
    });
    assert!(refusal().contains("memory-1.layer"), "{}", refusal());
    rewrite(&dir, |content| {
        content.memory.layers[0].id = "ab".to_owned()
    });
    assert!(refusal().contains("another layer"), "{}", refusal());
    let dir = place.path("a");
    rewrite(&dir, |content| {
        content.memory.bytes *= 2;
        content.shape.memory.0 *= 2;
    });
    let error = place.store().open("a").unwrap().memory().unwrap_err();
    assert!(error.message.contains("bytes of RAM"), "{error}");
}

#[test]
fn a_difference_does_not_have_its_parent_verified_again() {
    let place = Place::new();
    let parent = place.make("a", None);
    let before = fs::metadata(parent.path("memory-0.layer")).unwrap();
    let child = place.make("b", Some(&parent));
    let after = fs::metadata(parent.path("memory-0.layer")).unwrap();
    assert_ne!(
        (before.nlink(), before.ctime_nsec()),
        (after.nlink(), after.ctime_nsec())
    );
    // Damage that no time tells of would be found by a verification.
    let times = fs::FileTimes::new().set_modified(after.modified().unwrap());
    tamper(&parent.path("memory-0.layer"), |file| {
        file.write_all_at(&[99], 8192).unwrap();
        file.set_times(times).unwrap();
    });
    assert!(parent.verify(|_| {}).is_err());
    parent.ensure_verified(&place.verified).unwrap();
    // The child's stamp was taken with both links: there a new time has no such reason.
    let error = child.ensure_verified(&place.verified).unwrap_err();
    assert!(error.message.contains("memory-0.layer"), "{error}");
}

#[test]
fn what_a_verification_found_damaged_is_not_forked_even_where_no_time_tells() {
    let place = Place::new();
    let template = place.make("a", None);
    tamper(&place.path("a").join("state"), |file| {
        file.write_all_at(&[99], 40).unwrap();
    });
    let stamp = place.verified.file(&template.manifest().id);
    fs::write(&stamp, template.stamp().unwrap()).unwrap();
    template.ensure_verified(&place.verified).unwrap();
    let error = template
        .verify_and_note(&place.verified, |_| {})
        .unwrap_err();
    assert!(error.message.contains("state"), "{error}");
    let error = template.ensure_verified(&place.verified).unwrap_err();
    assert!(error.message.contains("state"), "{error}");
}

#[test]
fn a_directory_that_holds_something_else_is_not_removed() {
    let place = Place::new();
    let dir = place.path("other");
    fs::create_dir_all(dir.join("src")).unwrap();
    fs::write(dir.join(names::MANIFEST), "{\"manifest_version\": 3}").unwrap();
    let error = place.store().remove("other").unwrap_err();
    assert!(error.message.contains("`src`"), "{error}");
    assert_eq!(names(&dir), [names::MANIFEST, "src"]);
    // A template that is damaged can be removed.
    drop(place.make("a", None));
    fs::remove_file(place.path("a").join("state")).unwrap();
    fs::write(place.path("a").join(names::PREFETCH), "").unwrap();
    place.store().remove("a").unwrap();
    assert_eq!(names(&place.dir.path().join("store")), ["other"]);
}
