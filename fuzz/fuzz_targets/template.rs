//! A whole template from a hostile hand, forked up to where KVM and the host's network come in under
//! a recorder: nothing may be touched but the template and what is the caller's own.
#![no_main]

use std::sync::LazyLock;

use clone_host::launch::fork::Overrides;
use clone_host::testing::{fork, travel};
use clone_template::testing::{Dice, Place, make_hostile};

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let place = Place::new();
    let base = place.make("a", None);
    place.make("b", Some(&base));
    place
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (first, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let from = if first.is_multiple_of(2) { "a" } else { "b" };
    make_hostile(&PLACE, from, "x", &mut Dice::new(rest));
    if fork(&PLACE, "x", &Overrides::default()).is_ok() {
        travel(&PLACE, "x");
    }
});
