//! The walls between Army's crates, as their manifests and sources have them.

use std::fs;
use std::path::{Path, PathBuf};

use super::linked_directly;
use crate::paths;

fn sources(folder: &Path, all: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            all.push((path, text));
        }
    }
}

#[test]
fn controller_and_node_meet_in_the_contract_alone() {
    for (name, other) in [
        ("army-controller", "army-node"),
        ("army-node", "army-controller"),
    ] {
        let dependencies = linked_directly(name);
        assert!(dependencies.contains("army-node-api"));
        for wrong in [other, "army", "axum", "hyper", "reqwest", "utoipa"] {
            assert!(!dependencies.contains(wrong), "{name}: {wrong}");
        }
    }
    let contract = linked_directly("army-node-api");
    for wrong in ["army", "army-controller", "army-node", "clone-host", "sqlx"] {
        assert!(!contract.contains(wrong), "{wrong}");
    }
}

#[test]
fn problem_documents_belong_to_the_server_and_its_clients() {
    let mut all = Vec::new();
    for name in ["army-controller", "army-node", "army-node-api"] {
        sources(
            &paths::workspace().join("crates").join(name).join("src"),
            &mut all,
        );
    }
    assert!(all.len() > 40);
    for (path, text) in all {
        for word in ["Problem::", "ProblemKind", "{Problem", ", Problem"] {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}
