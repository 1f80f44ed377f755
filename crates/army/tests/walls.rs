//! The walls between Army's crates, as their manifests and sources have them.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// The direct dependencies of a crate, except those of its tests.
fn dependencies(name: &str) -> Vec<String> {
    let manifest = fs::read_to_string(folder(name).join("Cargo.toml")).unwrap();
    let manifest: Vec<&str> = manifest.lines().collect();
    let begin = manifest.iter().position(|line| *line == "[dependencies]");
    let lines = manifest[begin.unwrap() + 1..].iter();
    let lines = lines.take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split(['.', ' ']).next());
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

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
        let dependencies = dependencies(name);
        assert!(dependencies.iter().any(|it| it == "army-node-api"));
        for wrong in [other, "army", "axum", "hyper", "reqwest", "utoipa"] {
            assert!(
                !dependencies.iter().any(|it| it == wrong),
                "{name}: {wrong}"
            );
        }
    }
    let contract = dependencies("army-node-api");
    for wrong in ["army", "army-controller", "army-node", "clone-host", "sqlx"] {
        assert!(!contract.iter().any(|it| it == wrong), "{wrong}");
    }
}

#[test]
fn problem_documents_belong_to_the_server_and_its_clients() {
    let mut all = Vec::new();
    for name in ["army-controller", "army-node", "army-node-api"] {
        sources(&folder(name).join("src"), &mut all);
    }
    assert!(all.len() > 40);
    for (path, text) in all {
        for word in ["Problem::", "ProblemKind", "{Problem", ", Problem"] {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}
