//! Templates from a hostile hand: whatever they say, a fork touches the template and what is the
//! caller's own.
#![allow(clippy::unwrap_used)]

use std::fs;

use clone_api::config::{Egress, NetConfig, NetMode, Overlay};
use clone_api::{ErrorCode, VmConfig, validate};
use clone_host::launch::fork::{Overrides, Source};
use clone_host::runtime::Runtime;
use clone_host::testing::{fork, rehearse, travel};
use clone_start::VmDir;
use clone_template::manifest::FORMAT;
use clone_template::send;
use clone_template::testing::{
    Dice, FORMAT_1, Place, as_format_1, make_hostile, rewrite, rewrite_text,
};
use proptest::prelude::*;
use serde_json::json;

#[test]
fn a_fork_touches_the_template_and_the_callers_own_alone() {
    let place = Place::new();
    drop(place.make("a", None));
    let config = fork(&place, "a", &Overrides::default()).unwrap();
    assert_eq!(validate::validate(&config), []);
    assert_eq!(config.name, "clone");
    assert_eq!(config.kernel, place.path("a").join("kernel"));
}

#[test]
fn a_bridge_neighbours_and_logs_are_never_a_templates_to_choose() {
    let place = Place::new();
    // Its VM was on a bridge and could reach its neighbours.
    drop(place.make("a", None));
    let config = fork(&place, "a", &Overrides::default()).unwrap();
    let plain = NetConfig {
        queues: Some(1),
        ..NetConfig::default()
    };
    assert_eq!(config.net, [plain]);
    assert_eq!(config.console, VmConfig::default().console);
    for (part, field, value) in [
        ("/shape/nets/0", "bridge", json!("br0")),
        ("/shape/nets/0", "egress", json!("full")),
        ("/shape", "console", json!({"log_limit": 1_u64 << 60})),
    ] {
        rewrite_text(&place.path("a"), FORMAT, |manifest| {
            let part = manifest.pointer_mut(part).unwrap();
            part.as_object_mut()
                .unwrap()
                .insert(field.to_owned(), value);
        });
        let error = fork(&place, "a", &Overrides::default()).unwrap_err();
        assert!(error.message.contains("unknown field"), "{error}");
        drop(place.store().remove("a"));
        drop(place.make("a", None));
    }
}

#[test]
fn what_an_old_template_names_of_a_host_is_neither_opened_nor_made() {
    let place = Place::new();
    drop(place.make("a", None));
    let secret = place.dir.path().join("secret");
    fs::write(&secret, "a secret").unwrap();
    let victim = place.dir.path().join("ANYTHING");
    rewrite_text(&place.path("a"), FORMAT_1, |value| {
        as_format_1(value);
        let config = &mut value["config"];
        config["kernel"] = json!(secret);
        config["disks"][0]["overlay"] = json!({"kept": victim});
    });
    let config = fork(&place, "a", &Overrides::default()).unwrap();
    assert!(!victim.exists());
    assert_eq!(config.disks[0].overlay, Overlay::Ephemeral);
    assert_eq!(
        (config.net[0].mode, config.net[0].neighbours),
        (NetMode::Nat, false)
    );
    assert_ne!(config.kernel, secret);
    let old = place.store().open("a").unwrap();
    assert_eq!(old.parent().unwrap().boot, None);
    // It gets a kernel by the caller's word alone, and cannot travel before.
    let error = send(&old, &mut Vec::new()).unwrap_err();
    assert!(error.advice.unwrap().contains("clone template upgrade"));
}

#[test]
fn a_read_only_disk_with_a_kept_overlay_makes_no_file() {
    let place = Place::new();
    drop(place.make("a", None));
    let victim = place.dir.path().join("ANYTHING");
    let overlay = json!({"kept": victim});
    rewrite_text(&place.path("a"), FORMAT, |manifest| {
        let disk = manifest.pointer_mut("/shape/disks/0").unwrap();
        disk["read_only"] = json!(true);
        disk["overlay"] = overlay;
    });
    let error = fork(&place, "a", &Overrides::default()).unwrap_err();
    assert!(error.message.contains("unknown field `overlay`"), "{error}");
    assert!(!victim.exists());
}

#[test]
fn a_template_narrows_what_its_forks_may_send_to_and_widens_nothing() {
    let place = Place::new();
    drop(place.make("a", None));
    let allow = |network: &str| Egress::Allow(vec![network.parse().unwrap()]);
    rewrite(&place.path("a"), |content| {
        content.ceilings.nets = vec![clone_api::shape::NetCeiling {
            egress: allow("10.0.0.0/8"),
            ..Default::default()
        }];
    });
    let egress = |overrides: Overrides| {
        let config = fork(&place, "a", &overrides).unwrap();
        config.net[0].egress.clone()
    };
    let asked = |egress| Overrides {
        egress: Some(egress),
        ..Overrides::default()
    };
    assert_eq!(egress(Overrides::default()), allow("10.0.0.0/8"));
    assert_eq!(egress(asked(Egress::Full)), allow("10.0.0.0/8"));
    assert_eq!(egress(asked(Egress::None)), Egress::None);
    assert_eq!(egress(asked(allow("192.0.2.0/24"))), Egress::None);
    assert_eq!(egress(asked(allow("10.1.0.0/16"))), allow("10.1.0.0/16"));
    let on_a_bridge = Overrides {
        net: Some(vec![NetConfig {
            mode: NetMode::Bridge,
            bridge: Some("br0".into()),
            ..NetConfig::default()
        }]),
        ..Overrides::default()
    };
    assert_eq!(egress(on_a_bridge), allow("10.0.0.0/8"));
}

#[test]
fn a_file_that_is_swapped_after_it_was_verified_is_not_used() {
    for file in ["memory-0.layer", "state", "disk-0.raw", "kernel"] {
        let place = Place::new();
        let runtime = Runtime::at(&place.dir.path().join("run")).unwrap();
        let template = place.make("a", None);
        let source = Source::template(&template, &runtime).unwrap();
        let path = place.path("a").join(file);
        let other = place.dir.path().join("other");
        // The same content: it is another file all the same.
        fs::copy(&path, &other).unwrap();
        fs::rename(&other, &path).unwrap();
        let vm = place.dir.path().join("vm");
        fs::create_dir(&vm).unwrap();
        let forked = rehearse(&source, &VmDir::at(vm), "clone", &Overrides::default());
        match file {
            // A clone does well without until it reboots: then it ends, and its log says why.
            "kernel" => assert!(source.boots().is_err()),
            _ => {
                let error = forked.unwrap_err();
                assert_eq!(error.code, ErrorCode::Conflict, "{file}: {error}");
                assert!(error.message.contains(file), "{error}");
            }
        }
        // What was opened is what is verified, whatever is there now.
        template.verify(|_| {}).unwrap();
    }
}

#[test]
fn a_state_of_another_machine_is_refused_though_its_hash_is_right() {
    let place = Place::new();
    drop(place.make("a", None));
    rewrite(&place.path("a"), |content| content.shape.vcpus = 2);
    let error = fork(&place, "a", &Overrides::default()).unwrap_err();
    assert!(
        error.message.contains("1 CPUs for a machine of 2"),
        "{error}"
    );
    rewrite(&place.path("a"), |content| {
        content.shape.vcpus = 1;
        content.shape.rng = false;
    });
    let error = fork(&place, "a", &Overrides::default()).unwrap_err();
    assert!(error.message.contains("devices"), "{error}");
}

#[test]
fn templates_that_nothing_was_changed_in_are_forked() {
    let place = Place::new();
    drop(place.make("a", None));
    // The first byte chooses the format: the old one by zero.
    for (first, boots) in [(0, false), (1, true)] {
        make_hostile(&place, "a", "x", &mut Dice::new(&[first]));
        fork(&place, "x", &Overrides::default()).unwrap();
        let template = place.store().open("x").unwrap();
        assert_eq!(template.parent().unwrap().boot.is_some(), boots);
    }
    travel(&place, "x");
    assert!(place.store().open("x").is_ok());
}

#[test]
#[should_panic(expected = "elsewhere")]
fn a_file_that_a_fork_makes_elsewhere_is_seen() {
    let place = Place::new();
    drop(place.make("a", None));
    let overrides = Overrides {
        overlays: vec![(0, place.dir.path().join("elsewhere"))],
        ..Overrides::default()
    };
    let _ = fork(&place, "a", &overrides);
}

/// Found by fuzzing: a layer whose size was removed from the manifest could be forked, and sent,
/// but not received.
#[test]
fn a_template_that_can_be_forked_can_also_travel() {
    let place = Place::new();
    drop(place.make("a", None));
    let bytes = [44, 48, 49, 67, 44, 255, 4, 49];
    make_hostile(&place, "a", "x", &mut Dice::new(&bytes));
    if fork(&place, "x", &Overrides::default()).is_ok() {
        travel(&place, "x");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// `cargo xtask fuzz template` goes on where this ends.
    #[test]
    fn whatever_a_template_says_its_fork_stays_within_bounds(
        bytes in prop::collection::vec(any::<u8>(), 0..64), difference in any::<bool>()
    ) {
        let place = Place::new();
        let base = place.make("a", None);
        drop(place.make("b", Some(&base)));
        let from = if difference { "b" } else { "a" };
        make_hostile(&place, from, "x", &mut Dice::new(&bytes));
        if fork(&place, "x", &Overrides::default()).is_ok() {
            travel(&place, "x");
        }
    }
}
