//! Test support: changes a template's files like an attacker who can also compute its id again.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use serde_json::Value;

use crate::manifest::text_of;
use crate::names;
use crate::{Content, Manifest};

/// Changes a file that its owner made read-only.
pub fn tamper(path: &Path, change: impl FnOnce(&fs::File)) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    change(
        &fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap(),
    );
}

/// Writes a manifest with another content and the id that goes with it.
pub fn rewrite(dir: &Path, change: impl FnOnce(&mut Content)) {
    let path = dir.join(names::MANIFEST);
    let mut manifest = Manifest::parse(&fs::read(&path).unwrap(), dir).unwrap();
    change(&mut manifest.content);
    manifest.id = manifest.content.id().unwrap();
    let text = serde_json::to_vec(&manifest).unwrap();
    tamper(&path, |file| {
        file.set_len(0).unwrap();
        file.write_all_at(&text, 0).unwrap();
    });
}

/// Writes a manifest of this format with other fields and the id that goes with them.
pub fn rewrite_text(dir: &Path, format: u32, change: impl FnOnce(&mut Value)) {
    let path = dir.join(names::MANIFEST);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let fields = value.as_object_mut().unwrap();
    fields.retain(|name, _| name != "format" && name != "id");
    change(&mut value);
    let text = text_of(format, value);
    tamper(&path, |file| {
        file.set_len(0).unwrap();
        file.write_all_at(&text, 0).unwrap();
    });
}
