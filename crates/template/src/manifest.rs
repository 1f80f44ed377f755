//! A template's manifest, `manifest.json`, for people and for programs.
//!
//! A manifest may be hostile. It describes the [`Shape`] of a machine, the files that it consists
//! of, and [`Ceilings`], which can only restrict what the forking side allows. It has no field for
//! a path, an interface, an address, a log or a name of a host; the forking side decides the
//! networks of clones and the place of their writes. Names in it are plain names of files in the
//! same directory; sizes are bounded by what the shape can need; an unknown field is refused, since
//! ignoring it could mean another machine. [`Manifest::parse`] checks all of this, and is the only
//! way to read a manifest. The files are compared with it in [`super::verify`].
//!
//! Format 1 contained host paths and no kernel: see [`super::migrate`].

use std::path::Path;

use clone_start::error::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::migrate;
use crate::content::{Content, id_of};
use crate::names::refused;

/// The format that is written, which is also the newest that is read.
pub const FORMAT: u32 = 2;
/// The size limit of a manifest, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;

/// A template's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Manifest {
    /// [`FORMAT`], or an older one that was migrated.
    pub format: u32,
    /// The hash of the content, and so of all files: 32 hexadecimal digits.
    pub id: String,
    /// The described content.
    #[serde(flatten)]
    pub content: Content,
}

impl Manifest {
    /// Parses and checks a manifest's text. An older format is migrated; [`Manifest::format`] shows
    /// it.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
            id: String,
        }
        let refuse = |reason: String| refused(path, &reason);
        let wrong = |error: serde_json::Error| refuse(error.to_string());
        let mut value: Value = serde_json::from_slice(text).map_err(wrong)?;
        let head = Head::deserialize(&value);
        let Some(fields) = value.as_object_mut() else {
            return Err(refuse("it is no description".to_owned()));
        };
        fields.retain(|name, _| name != "format" && name != "id");
        let Head { format, id } = head.map_err(wrong)?;
        let newer = "use the version of clone that made it, or a newer one";
        if !(migrate::FORMAT_1..=FORMAT).contains(&format) {
            let reason = format!("it is of format {format}, and this version reads {FORMAT}");
            return Err(refuse(reason).advise(newer));
        }
        let found = id_of(&value).map_err(wrong)?;
        if found != id {
            let reason = format!("its content is not what its id says, but that of {found}");
            return Err(refuse(reason));
        }
        let content = match format {
            migrate::FORMAT_1 => migrate::content(value).map_err(wrong)?,
            _ => serde_json::from_value(value).map_err(|error| {
                refuse(format!("this version does not understand it: {error}")).advise(newer)
            })?,
        };
        let manifest = Self {
            format,
            id,
            content,
        };
        manifest.content.check().map_err(refuse)?;
        let unsized_file = manifest.content.sizes().find(|(_, bytes)| bytes.is_none());
        match unsized_file.filter(|_| format == FORMAT) {
            Some((file, _)) => Err(refuse(format!("it does not give the size of {file}"))),
            None => Ok(manifest),
        }
    }

    /// Returns an error if the format is old, for an operation `what` that needs the present
    /// format.
    pub(super) fn check_current(&self, path: &Path, what: &str) -> Result<()> {
        match self.format {
            FORMAT => Ok(()),
            old => Err(
                refused(path, &format!("it is of format {old}, which cannot {what}"))
                    .advise(migrate::advice(path)),
            ),
        }
    }
}

/// The text of a manifest of this format with any fields, and the id that goes with them.
#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used)]
pub fn text_of(format: u32, mut content: Value) -> Vec<u8> {
    let id = id_of(&content).unwrap();
    let fields = content.as_object_mut().unwrap();
    fields.insert("format".to_owned(), format.into());
    fields.insert("id".to_owned(), id.into());
    serde_json::to_vec(&content).unwrap()
}

#[cfg(test)]
mod tests {
    use clone_api::Bytes;
    use clone_api::config::{Egress, VmConfig};
    use clone_api::shape::NetCeiling;
    use serde_json::json;

    use super::*;
    use crate::content::{Disk, HASH_DIGITS, HashedFile, Memory, MemoryLayer};
    use clone_api::Shape;
    use clone_api::control::CpuFeatures;
    use clone_api::shape::Ceilings;

    fn file(name: &str) -> HashedFile {
        HashedFile {
            file: name.to_owned(),
            bytes: 1,
            hash: "0".repeat(HASH_DIGITS),
        }
    }

    fn content() -> Content {
        Content {
            parent: None,
            created_unix_ms: 1_790_000_000_000,
            version: "0.1.0".to_owned(),
            agent_version: Some("0.1.0".to_owned()),
            shape: Shape {
                cmdline: "console=ttyS0".to_owned(),
                ..Shape::of(&VmConfig::default(), &[])
            },
            ceilings: Ceilings::default(),
            memory: Memory {
                bytes: 512 << 20,
                layers: vec![MemoryLayer {
                    file: "memory-0.layer".to_owned(),
                    bytes: Some(536_875_136),
                    id: "ab".to_owned(),
                    data_bytes: 4096,
                }],
            },
            state: file("state"),
            disks: Vec::new(),
            kernel: Some(file("kernel")),
            initrd: None,
            cpu: CpuFeatures::default(),
        }
    }

    /// A manifest with a disk, an interface and ceilings: every field that there is.
    fn full() -> Content {
        let mut content = content();
        content.parent = Some("0123456789abcdef".repeat(2));
        content.shape.disks = vec![clone_api::shape::DiskShape {
            bytes: Bytes(8192),
            read_only: false,
            queues: 1,
        }];
        content.shape.nets = vec![clone_api::shape::NetShape { queues: 2 }];
        content.ceilings.nets = vec![NetCeiling {
            egress: Egress::Allow(vec!["10.0.0.0/8".parse().unwrap()]),
            ..NetCeiling::default()
        }];
        content.disks = vec![Disk {
            base: HashedFile {
                bytes: 8192,
                ..file("disk-0.raw")
            },
            layers: vec![file("disk-0.layer-0")],
        }];
        content.initrd = Some(file("initrd"));
        content.cpu.features.insert("7.ebx".to_owned(), 5);
        content
    }

    fn text(content: Content) -> Vec<u8> {
        let id = content.id().unwrap();
        let format = FORMAT;
        let manifest = Manifest {
            format,
            id,
            content,
        };
        let mut text = serde_json::to_vec_pretty(&manifest).unwrap();
        text.push(b'\n');
        text
    }

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        let mut value = serde_json::to_value(full()).unwrap();
        change(&mut value);
        let error = Manifest::parse(&text_of(FORMAT, value), Path::new("t")).unwrap_err();
        error.message
    }

    #[test]
    fn the_second_format_keeps_its_text() {
        let golden = include_str!("manifest-v2.json");
        assert_eq!(String::from_utf8(text(full())).unwrap(), golden);
        let manifest = Manifest::parse(golden.as_bytes(), Path::new("golden")).unwrap();
        assert_eq!(manifest.content, full());
    }

    #[test]
    fn what_a_host_decides_has_no_place_in_a_manifest() {
        for (part, field) in [
            ("/shape", "kernel"),
            ("/shape", "initrd"),
            ("/shape", "name"),
            ("/shape", "console"),
            ("/shape/disks/0", "path"),
            ("/shape/disks/0", "overlay"),
            ("/shape/disks/0", "rate_limit"),
            ("/shape/nets/0", "bridge"),
            ("/shape/nets/0", "tap"),
            ("/shape/nets/0", "mac"),
            ("/shape/nets/0", "mode"),
            ("/shape/nets/0", "neighbours"),
            ("/shape/nets/0", "egress"),
            ("/shape/nets/0", "vhost"),
            ("/ceilings", "log_limit"),
            ("/ceilings/nets/0", "neighbours"),
            ("", "config"),
            ("/disks/0/base", "path"),
        ] {
            let message = refusal(|value| {
                let part = value.pointer_mut(part).unwrap();
                part.as_object_mut()
                    .unwrap()
                    .insert(field.into(), json!("x"));
            });
            let unknown = format!("unknown field `{field}`");
            let known = part.is_empty() || message.contains(&unknown);
            assert!(known || field == "kernel", "{part}/{field}: {message}");
        }
    }

    #[test]
    fn features_that_this_version_does_not_know_are_refused_by_name() {
        let message = refusal(|value| value["shape"]["gpu"] = json!({}));
        assert!(message.contains("unknown field `gpu`"), "{message}");
        let message = refusal(|value| value["cpu"]["features"]["ffff.eax"] = json!(1));
        assert!(message.contains("ffff.eax"), "{message}");
        let message = refusal(|value| value["shape"]["on_reboot"] = json!("explode"));
        assert!(message.contains("explode"), "{message}");
    }

    #[test]
    fn a_machine_that_cannot_be_is_refused() {
        type Change = fn(&mut Value);
        let cases: [(&str, Change); 13] = [
            ("vcpus", |it| it["shape"]["vcpus"] = json!(4000)),
            ("memory", |it| it["shape"]["memory"] = json!(u64::MAX)),
            ("cmdline", |it| it["shape"]["cmdline"] = json!("a\nb")),
            ("queues", |it| it["shape"]["nets"][0]["queues"] = json!(99)),
            ("its disks", |it| it["shape"]["disks"] = json!([])),
            ("for a disk of", |it| {
                it["disks"][0]["base"]["bytes"] = json!(4)
            }),
            ("more than", |it| it["state"]["bytes"] = json!(1_u64 << 40)),
            ("more than", |it| it["kernel"]["bytes"] = json!(1_u64 << 40)),
            ("more than", |it| {
                it["memory"]["layers"][0]["bytes"] = json!(1_u64 << 50)
            }),
            ("the size of memory-0.layer", |it| {
                it["memory"]["layers"][0]["bytes"] = Value::Null
            }),
            ("all of memory", |it| {
                it["memory"]["layers"][0]["data_bytes"] = json!(1_u64 << 50);
            }),
            ("named twice", |it| it["state"]["file"] = json!("kernel")),
            ("no kernel", |it| it["kernel"] = Value::Null),
        ];
        for (word, change) in cases {
            let message = refusal(change);
            assert!(message.contains(word), "{word}: {message}");
        }
    }

    #[test]
    fn names_that_lead_out_of_the_directory_are_refused() {
        for name in [
            "../x",
            "/x",
            "a/b",
            "",
            ".",
            "..",
            "a/",
            "manifest.json",
            "x",
        ] {
            let mut bad = content();
            bad.state.file = name.to_owned();
            let error = Manifest::parse(&text(bad), Path::new("t")).unwrap_err();
            assert!(error.message.contains("cannot name a file"), "{error}");
        }
    }

    #[test]
    fn what_was_changed_after_the_fact_and_what_is_newer_is_refused() {
        let good = String::from_utf8(text(content())).unwrap();
        for (from, to, word) in [
            (
                "\"bytes\": 536870912",
                "\"bytes\": 536870913",
                "its id says",
            ),
            ("\"format\": 2", "\"format\": 3", "format 3"),
            ("\"format\": 2", "\"format\": 0", "format 0"),
            ("\"memory\"", "\"memori\"", "its id says"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            let error = Manifest::parse(bad.as_bytes(), Path::new("t")).unwrap_err();
            assert!(error.message.contains(word), "{error}");
        }
        for cut in [0, 1, good.len() / 2, good.len() - 2] {
            assert!(Manifest::parse(&good.as_bytes()[..cut], Path::new("t")).is_err());
        }
    }
}
