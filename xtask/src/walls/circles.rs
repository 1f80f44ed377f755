//! Which modules of a crate import each other in circles.
//!
//! Modules are compared with their neighbours in one folder: two of them are in a circle where each
//! names, by way of others or not, something that belongs to the other. What a module takes from
//! its parent is the parent's own, and tests are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::Visit;

/// A module's path in its crate, without `crate`.
type Module = Vec<String>;

/// The circles of the crate whose sources are in `src`, each as the names of its modules.
pub(super) fn of(src: &Path) -> Vec<Vec<String>> {
    let mut modules = BTreeMap::new();
    read_folder(src, &[], &mut modules);
    let names: BTreeSet<Module> = modules.keys().cloned().collect();
    let mut neighbours: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for (module, file) in &modules {
        for path in imports(module, file) {
            if let Some((from, to)) = branches(module, &owner(path, &names)) {
                neighbours.entry(from).or_default().insert(to);
            }
        }
    }
    circles(&neighbours)
}

fn read_folder(folder: &Path, module: &[String], modules: &mut BTreeMap<Module, syn::File>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if stem == "testing" || stem.ends_with("tests") {
            continue;
        }
        let mut name = module.to_vec();
        if path.is_dir() {
            name.push(stem);
            read_folder(&path, &name, modules);
        } else if path.extension().is_some_and(|it| it == "rs") {
            if !["lib", "main", "mod"].contains(&stem.as_str()) {
                name.push(stem);
            }
            let text = fs::read_to_string(&path).unwrap();
            modules.insert(name, syn::parse_file(&text).unwrap());
        }
    }
}

/// The paths within the crate that a module's file names, as they are seen from the crate's root.
fn imports(module: &Module, file: &syn::File) -> BTreeSet<Module> {
    let mut paths = Paths::default();
    paths.visit_file(file);
    let absolute = paths.found.iter().filter_map(|path| {
        let first = path.first()?;
        let ups = path.iter().take_while(|it| *it == "super").count();
        match first.as_str() {
            "crate" => Some(path[1..].to_vec()),
            "super" if ups <= module.len() => {
                let above = &module[..module.len() - ups];
                Some([above, &path[ups..]].concat())
            }
            _ => None,
        }
    });
    absolute.collect()
}

#[derive(Default)]
struct Paths {
    found: Vec<Vec<String>>,
}

impl Paths {
    fn add_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.found.push(with(&name.ident)),
            syn::UseTree::Rename(name) => self.found.push(with(&name.ident)),
            syn::UseTree::Glob(_) => self.found.push(before.to_vec()),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_tree(before, tree);
                }
            }
        }
    }
}

impl<'a> Visit<'a> for Paths {
    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        // A module within the file is a module of tests, here.
        if item.content.is_none() {
            syn::visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        // A name that is only passed on belongs to where it is from.
        if matches!(item.vis, syn::Visibility::Inherited) {
            self.add_tree(&[], &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names = path.segments.iter().map(|it| it.ident.to_string());
        self.found.push(names.collect());
        syn::visit::visit_path(self, path);
    }
}

/// The module that a path leads to or through.
fn owner(mut path: Module, names: &BTreeSet<Module>) -> Module {
    while !names.contains(&path) && !path.is_empty() {
        path.pop();
    }
    path
}

/// Where the ways to two modules part: the neighbours that they are in. None where one holds the
/// other.
fn branches(from: &Module, to: &Module) -> Option<(Module, Module)> {
    let shared = from.iter().zip(to).take_while(|(a, b)| a == b).count();
    let parted = from.len() > shared && to.len() > shared;
    parted.then(|| (from[..=shared].to_vec(), to[..=shared].to_vec()))
}

fn circles(neighbours: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<Vec<String>> {
    let reached: BTreeMap<&Module, BTreeSet<&Module>> = neighbours
        .keys()
        .map(|module| (module, reached_from(module, neighbours)))
        .collect();
    let mut found = BTreeSet::new();
    for (module, to) in &reached {
        let back = |other: &&&Module| reached.get(**other).is_some_and(|it| it.contains(module));
        let circle: Vec<String> = to.iter().filter(back).map(|it| it.join("/")).collect();
        if circle.len() > 1 {
            found.insert(circle);
        }
    }
    found.into_iter().collect()
}

fn reached_from<'a>(
    module: &Module,
    neighbours: &'a BTreeMap<Module, BTreeSet<Module>>,
) -> BTreeSet<&'a Module> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&Module> = neighbours.get(module).into_iter().flatten().collect();
    while let Some(module) = next.pop() {
        if reached.insert(module) {
            next.extend(neighbours.get(module).into_iter().flatten());
        }
    }
    reached
}
