//! The walls of the workspace, held by tests: which crates must not reach which, and that the
//! modules of a crate do not import each other in circles.

mod army;
mod circles;

use std::collections::BTreeSet;
use std::process::Command;

use crate::paths;

/// Command lines, async runtimes, network configuration and HTTP, which no process that serves a
/// guest may link.
const LAUNCHING: [&str; 9] = [
    "clap",
    "tokio",
    "rtnetlink",
    "reqwest",
    "hyper",
    "axum",
    "clone-host",
    "clone-template",
    "clone-image",
];

/// The packages that a package links, itself among them.
fn linked(package: &str) -> BTreeSet<String> {
    tree(package, &[])
}

/// The packages that a package names as its dependencies, and itself.
fn linked_directly(package: &str) -> BTreeSet<String> {
    tree(package, &["--depth", "1"])
}

fn tree(package: &str, options: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--edges", "normal"])
        .args(options)
        .args(["--prefix", "none", "--format", "{p}", "--package", package])
        .current_dir(paths::workspace())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let names = lines.lines().filter_map(|line| line.split(' ').next());
    names.map(str::to_owned).collect()
}

#[track_caller]
fn never_links(package: &str, forbidden: &[&str]) {
    let linked = linked(package);
    assert!(linked.contains(package));
    let found: Vec<_> = forbidden
        .iter()
        .filter(|name| linked.contains(**name))
        .collect();
    assert!(found.is_empty(), "{package} links {found:?}");
}

#[test]
fn what_serves_a_guest_links_nothing_that_launches() {
    never_links("clone-vm-process", &LAUNCHING);
}

#[test]
fn what_serves_a_directory_knows_no_vm_and_what_runs_a_vm_no_directory() {
    let share = linked("clone-share");
    let ours = share.iter().filter(|name| name.starts_with("clone-"));
    assert_eq!(ours.collect::<Vec<_>>(), ["clone-fuse", "clone-share"]);
    never_links("clone-share", &["tokio", "clap", "kvm-ioctls"]);
    for package in ["clone-vm-process", "clone", "army", "clone-host"] {
        never_links(package, &["clone-share"]);
    }
}

#[test]
fn what_starts_vms_does_not_link_what_runs_as_one() {
    for package in ["clone", "army", "clone-host", "clone-template"] {
        never_links(package, &["clone-vm-process"]);
    }
}

#[test]
fn the_machine_knows_nothing_of_what_is_above_it() {
    let above = ["clone-api", "clone-start", "clone-template", "agent-proto"];
    never_links("clone-vmm", &above);
    never_links("clone-api", &["clone-vmm", "clone-disk", "clone-memory"]);
    never_links("clone-memory", &["kvm-ioctls", "clone-disk"]);
    never_links(
        "clone-migration",
        &["kvm-ioctls", "clone-disk", "clone-api"],
    );
    never_links("clone-base", &["serde", "libc", "clone-memory"]);
}

#[test]
fn what_travels_over_the_network_knows_no_vm() {
    never_links("army-api", &["clone-api", "clone-host", "axum", "sqlx"]);
    never_links("agent-proto", &["tokio", "clone-api", "serde_json"]);
    never_links("agent-client", &["clone-api", "hyper", "serde_json"]);
}

#[test]
fn modules_do_not_import_each_other_in_circles() {
    let crates = paths::workspace().join("crates");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(crates).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().display().to_string();
        let circles = circles::of(&folder.join("src"));
        found.extend(
            circles
                .into_iter()
                .map(|circle| format!("{name}: {circle:?}")),
        );
    }
    assert!(found.is_empty(), "{found:#?}");
}
