//! The API's description in the repository is the one that the server has.
#![allow(clippy::unwrap_used)]

#[test]
fn the_description_in_the_repository_is_the_servers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    let served = army::server::openapi().to_pretty_json().unwrap();
    assert!(
        kept.trim_end() == served.trim_end(),
        "crates/army/openapi.json is not what the server says; after looking at what changed: \
         cargo run -q -p army openapi > crates/army/openapi.json"
    );
}
