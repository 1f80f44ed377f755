//! Test support: hostile templates, with valid hashes and hostile content.
//!
//! Bytes, a fuzzer's or a property test's, decide what becomes of a good template: its manifest is
//! changed as a structure (fields removed, replaced, added, lists that grow), its files are
//! written to, cut, and replaced by links and pipes; then hashes, sizes, checksums and the id are
//! made right again, so that what reads a template gets past them.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, symlink};
use std::path::Path;

use serde_json::{Value, json};

use super::{Place, RAM};
use crate::manifest::text_of;
use crate::names;
use crate::{hash_of, manifest};

/// Edits beyond so many show nothing that fewer do not.
const MAX_EDITS: usize = 8;
/// The replacements for paths, names and texts of a manifest.
const WORDS: [&str; 16] = [
    "/etc/ANYTHING",
    "/etc/shadow",
    "../../../../etc/shadow",
    "../a/kernel",
    "manifest.json",
    "memory-0.layer",
    "disk-0.raw",
    "kernel",
    "state",
    "br0",
    "full",
    "none",
    "10.0.0.0/8",
    "restart",
    "\u{1b}[2J\n",
    "",
];
/// Fields that are added: of a host's decisions, of format 1, and such as later versions may have.
const FIELDS: [&str; 24] = [
    "path",
    "overlay",
    "format",
    "read_only",
    "kernel",
    "initrd",
    "name",
    "bridge",
    "tap",
    "mac",
    "mode",
    "egress",
    "neighbours",
    "rate_limit",
    "vhost",
    "log_limit",
    "console",
    "config",
    "ceilings",
    "nets",
    "disks",
    "parent",
    "gpu",
    "queues",
];

/// Bytes that decide; when they are used up, everything is decided as by zeros.
pub struct Dice<'a>(&'a [u8]);

impl<'a> Dice<'a> {
    /// These bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        let width = self.byte() % 9;
        (0..width).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }

    fn of<'b>(&mut self, choices: &[&'b str]) -> &'b str {
        choices[self.below(choices.len())]
    }
}

/// Makes the template `name` out of the template `from` in the same place, as `dice` decide.
pub fn make_hostile(place: &Place, from: &str, name: &str, dice: &mut Dice<'_>) {
    let (from, dir) = (place.path(from), place.path(name));
    let _ = fs::remove_dir_all(&dir);
    fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    for entry in fs::read_dir(&from).unwrap() {
        let name = entry.unwrap().file_name();
        if name != names::MANIFEST {
            fs::hard_link(from.join(&name), dir.join(&name)).unwrap();
        }
    }
    let text = fs::read(from.join(names::MANIFEST)).unwrap();
    let mut value: Value = serde_json::from_slice(&text).unwrap();
    let fields = value.as_object_mut().unwrap();
    fields.retain(|name, _| name != "format" && name != "id");
    let format = match dice.below(3) {
        0 => {
            as_format_1(&mut value);
            1
        }
        _ => manifest::FORMAT,
    };
    for _ in 0..dice.below(MAX_EDITS) {
        edit_file(&dir, dice);
    }
    make_right(&dir, &mut value);
    for _ in 0..dice.below(MAX_EDITS) {
        edit(&mut value, dice);
    }
    if dice.byte().is_multiple_of(2) {
        make_right(&dir, &mut value);
    }
    if value.is_object() {
        fs::write(dir.join(names::MANIFEST), text_of(format, value)).unwrap();
    }
}

/// Makes a content of format 1, with a description that names what a host has, of one of format 2.
pub fn as_format_1(value: &mut Value) {
    let disk = |read_only| {
        json!({"path": "x", "format": "raw", "read_only": read_only,
               "overlay": {"kept": "/etc/ANYTHING"}})
    };
    let config = json!({
        "name": "../x", "vcpus": 1, "memory": RAM,
        "kernel": "/etc/shadow", "initrd": "/etc/shadow",
        "disks": [disk(false)],
        "net": [{"mode": "bridge", "bridge": "lo", "neighbours": true,
                 "mac": "02:00:00:00:00:01", "egress": "full"}],
        "vsock": {"enabled": true, "cid": 3}, "rng": true,
        "balloon": {"enabled": true, "size": 0, "deflate_on_oom": true,
                    "free_page_reporting": true},
        "console": {"log_limit": 1_u64 << 60},
    });
    let fields = value.as_object_mut().unwrap();
    let new = ["shape", "ceilings", "kernel", "initrd"];
    fields.retain(|name, _| !new.contains(&name.as_str()));
    fields.insert("config".to_owned(), config);
    for layer in fields["memory"]["layers"].as_array_mut().unwrap() {
        layer.as_object_mut().unwrap().remove("bytes");
    }
}

/// Changes one place in a manifest.
fn edit(value: &mut Value, dice: &mut Dice<'_>) {
    let place = walk(value, dice);
    match (dice.below(4), place) {
        (0, Value::Object(fields)) => {
            let field = dice.of(&FIELDS).to_owned();
            fields.insert(field, leaf(dice));
        }
        (1, Value::Object(fields)) => {
            let names: Vec<String> = fields.keys().cloned().collect();
            if let Some(name) = names.get(dice.below(names.len())) {
                fields.remove(name);
            }
        }
        (0, Value::Array(items)) => {
            let item = items.get(dice.below(items.len())).cloned();
            items.push(item.unwrap_or_else(|| leaf(dice)));
        }
        (1, Value::Array(items)) => drop(items.pop()),
        (_, other) => *other = leaf(dice),
    }
}

/// A place in a manifest, somewhere below its top.
fn walk<'v>(mut value: &'v mut Value, dice: &mut Dice<'_>) -> &'v mut Value {
    for _ in 0..=dice.below(5) {
        let len = match &*value {
            Value::Object(fields) => fields.len(),
            Value::Array(items) => items.len(),
            _ => 0,
        };
        if len == 0 {
            break;
        }
        let at = dice.below(len);
        value = match value {
            Value::Object(fields) => fields.iter_mut().nth(at).unwrap().1,
            Value::Array(items) => &mut items[at],
            // This arm is not reached, since such a value has length 0 above.
            other => return other,
        };
    }
    value
}

fn leaf(dice: &mut Dice<'_>) -> Value {
    match dice.below(8) {
        0 => json!(dice.number()),
        1 => json!({"kept": dice.of(&WORDS)}),
        2 => json!({"allow": ["10.0.0.0/8", "0.0.0.0/0"]}),
        3 => json!([dice.of(&WORDS)]),
        4 => json!(dice.byte().is_multiple_of(2)),
        5 => Value::Null,
        6 => json!({"bandwidth": dice.number(), "iops": dice.number()}),
        _ => json!(dice.of(&WORDS)),
    }
}

/// Changes one file of a template.
fn edit_file(dir: &Path, dice: &mut Dice<'_>) {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let Some(name) = names.get(dice.below(names.len())) else {
        return;
    };
    let path = dir.join(name);
    match dice.below(8) {
        0 => {
            fs::remove_file(&path).unwrap();
            symlink(dice.of(&WORDS[..4]), &path).unwrap();
        }
        1 => {
            fs::remove_file(&path).unwrap();
            rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        }
        2 => {
            let other = &names[dice.below(names.len())];
            fs::rename(dir.join(other), &path).unwrap();
        }
        3 => {
            if let Some(file) = own(&path) {
                let len = file.metadata().unwrap().len();
                file.set_len(len.saturating_sub(dice.number() % len.max(1)))
                    .unwrap();
            }
        }
        _ => {
            if let Some(file) = own(&path) {
                let len = file.metadata().unwrap().len().max(1);
                // The fields that matter most are at the beginning and at the end of a file.
                let at = match dice.below(3) {
                    0 => dice.number() % len,
                    1 => u64::from(dice.byte()),
                    _ => len.saturating_sub(1 + u64::from(dice.byte())),
                };
                let bytes = dice.number().to_le_bytes();
                let count = 1 + dice.below(bytes.len());
                file.write_all_at(&bytes[..count], at).unwrap();
            }
        }
    }
}

/// Opens a file for writing that no other template shares; `None` if the entry is not a file.
fn own(path: &Path) -> Option<File> {
    if !path.symlink_metadata().ok()?.is_file() {
        return None;
    }
    let new = path.with_extension("own");
    let copy = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&new)
        .unwrap();
    clone_disk::copy_file(&File::open(path).unwrap(), &copy).unwrap();
    fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::rename(&new, path).unwrap();
    Some(copy)
}

/// Makes hashes, sizes, checksums and ids in a manifest those of the files that it names.
fn make_right(dir: &Path, value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| make_right(dir, item)),
        Value::Object(fields) => {
            let name = fields.get("file").and_then(Value::as_str);
            if let Some(path) = name.map(|name| dir.join(name)) {
                let layer = fields.contains_key("data_bytes");
                if let Some((bytes, hash)) = made_right(&path, layer) {
                    let field = if layer { "id" } else { "hash" };
                    fields.insert(field.to_owned(), json!(hash));
                    if fields.contains_key("bytes") {
                        fields.insert("bytes".to_owned(), json!(bytes));
                    }
                }
            }
            fields.values_mut().for_each(|field| make_right(dir, field));
        }
        _ => {}
    }
}

/// The size and the hash or layer id of a file, whose own checksums are made right first.
fn made_right(path: &Path, layer: bool) -> Option<(u64, String)> {
    if !path.symlink_metadata().ok()?.is_file() {
        return None;
    }
    let file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    if layer {
        let mut index = vec![0; usize::try_from(len.checked_sub(RAM + 32)?).ok()?];
        file.read_exact_at(&mut index, RAM).ok()?;
        let id = blake3::hash(&index);
        let mut found = [0; 32];
        file.read_exact_at(&mut found, len - 32).ok()?;
        if found != *id.as_bytes() {
            own(path)?.write_all_at(id.as_bytes(), len - 32).ok()?;
        }
        return Some((len, id.to_hex().to_string()));
    }
    if path.file_name()? == "state" {
        let mut state = fs::read(path).ok()?;
        if check_sections(&mut state) {
            own(path)?.write_all_at(&state, 0).ok()?;
        }
        return Some((len, hash_of(&File::open(path).ok()?).ok()?));
    }
    Some((len, hash_of(&file).ok()?))
}

/// Corrects the checksums of a state's sections; returns whether any was wrong.
fn check_sections(state: &mut [u8]) -> bool {
    let mut changed = false;
    // After the magic number and the version: a name, a length, a checksum, the content.
    let mut at = 12;
    while let Some(head) = state.get(at..at + 48) {
        let len = u64::from_le_bytes(head[8..16].try_into().unwrap());
        let Some(end) = usize::try_from(len)
            .ok()
            .and_then(|len| (at + 48).checked_add(len))
        else {
            break;
        };
        let Some(content) = state.get(at + 48..end) else {
            break;
        };
        let hash = *blake3::hash(content).as_bytes();
        changed |= state[at + 16..at + 48] != hash;
        state[at + 16..at + 48].copy_from_slice(&hash);
        at = end;
    }
    changed
}
