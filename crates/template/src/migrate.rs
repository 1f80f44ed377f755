//! Reads manifests of format 1.
//!
//! Format 1 contained the whole description of the VM that was snapshotted: paths of its kernel and
//! disks, its bridge, its logs. Of these, this module takes the machine's shape, and the limits of
//! its network and disks, which become ceilings; every field that names something of a host is
//! ignored. The kernel was a host's file and is not part of such a template, so its clones run but
//! cannot reboot: `clone template upgrade` makes a template of the present format, with a kernel
//! that the caller names.

use std::path::Path;

use clone_api::config::{
    BalloonConfig, DiskConfig, Egress, NetConfig, OnReboot, RateLimit, VmConfig, VsockConfig,
};
use clone_api::control::CpuFeatures;
use clone_api::shape::Ceilings;
use clone_api::{Bytes, Shape};
use serde::Deserialize;
use serde_json::Value;

use super::content::{Content, Disk, HashedFile, Memory};

/// The format's number.
pub(super) const FORMAT_1: u32 = 1;

#[derive(Deserialize)]
struct ContentV1 {
    #[serde(default)]
    parent: Option<String>,
    created_unix_ms: u64,
    version: String,
    #[serde(default)]
    agent_version: Option<String>,
    config: ConfigV1,
    memory: Memory,
    state: HashedFile,
    disks: Vec<Disk>,
    cpu: CpuFeatures,
}

/// The fields that are used of a description; all others are ignored.
#[derive(Deserialize)]
struct ConfigV1 {
    vcpus: u32,
    memory: Bytes,
    #[serde(default)]
    cmdline: Option<String>,
    #[serde(default)]
    append: Option<String>,
    #[serde(default)]
    disks: Vec<DiskV1>,
    #[serde(default)]
    net: Vec<NetV1>,
    vsock: VsockConfig,
    balloon: BalloonConfig,
    rng: bool,
    #[serde(default)]
    on_reboot: OnReboot,
}

#[derive(Deserialize)]
struct DiskV1 {
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    rate_limit: Option<RateLimit>,
}

#[derive(Deserialize)]
struct NetV1 {
    #[serde(default)]
    queues: Option<u16>,
    #[serde(default)]
    egress: Egress,
    #[serde(default)]
    rate_limit: Option<RateLimit>,
}

impl From<ConfigV1> for VmConfig {
    fn from(old: ConfigV1) -> Self {
        let disks = old.disks.into_iter().map(|disk| DiskConfig {
            read_only: disk.read_only,
            rate_limit: disk.rate_limit,
            ..DiskConfig::default()
        });
        let nets = old.net.into_iter().map(|net| NetConfig {
            queues: net.queues,
            egress: net.egress,
            rate_limit: net.rate_limit,
            ..NetConfig::default()
        });
        Self {
            vcpus: old.vcpus,
            memory: old.memory,
            cmdline: old.cmdline,
            append: old.append,
            disks: disks.collect(),
            net: nets.collect(),
            vsock: old.vsock,
            balloon: old.balloon,
            rng: old.rng,
            on_reboot: old.on_reboot,
            ..Self::default()
        }
    }
}

/// Converts the content of a manifest of format 1. The caller checks the result.
pub(super) fn content(value: Value) -> serde_json::Result<Content> {
    let old: ContentV1 = serde_json::from_value(value)?;
    let config = VmConfig::from(old.config);
    let disk_bytes: Vec<u64> = old.disks.iter().map(|disk| disk.base.bytes).collect();
    Ok(Content {
        parent: old.parent,
        created_unix_ms: old.created_unix_ms,
        version: old.version,
        agent_version: old.agent_version,
        shape: Shape::of(&config, &disk_bytes),
        ceilings: Ceilings::of(&config),
        memory: old.memory,
        state: old.state,
        disks: old.disks,
        kernel: None,
        initrd: None,
        cpu: old.cpu,
    })
}

/// The command that makes a new template of the old one at `path`.
pub(super) fn advice(path: &Path) -> String {
    format!(
        "make one of the present format: clone template upgrade {} --kernel FILE [--initrd FILE] --output NEW",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::manifest::{FORMAT, Manifest, text_of};
    use super::*;

    /// A template of format 1 whose description names all that a host has.
    fn hostile() -> Value {
        let hash = "0".repeat(64);
        let file = |name: &str, bytes: u64| json!({"file": name, "bytes": bytes, "hash": hash});
        json!({
            "created_unix_ms": 5, "version": "0.1.0", "cpu": {"vendor": "", "features": {}},
            "config": {
                "name": "../../etc", "vcpus": 1, "memory": 512 << 20,
                "kernel": "/etc/shadow", "initrd": "/etc/shadow",
                "disks": [
                    {"path": "x", "format": "raw", "read_only": false, "overlay": "none"},
                    {"path": "x", "format": "raw", "read_only": true,
                     "overlay": {"kept": "/etc/ANYTHING"}},
                ],
                "net": [{"mode": "bridge", "bridge": "br-secret", "mac": "02:00:00:00:00:01",
                         "neighbours": true, "egress": "none"}],
                "vsock": {"enabled": true, "cid": 3},
                "balloon": {"enabled": true, "size": 0, "deflate_on_oom": true,
                            "free_page_reporting": true},
                "rng": true, "console": {"log_limit": 1_u64 << 60},
            },
            "memory": {"bytes": 512 << 20, "layers": [
                {"file": "memory-0.layer", "id": "ab", "data_bytes": 4096}]},
            "state": file("state", 1),
            "disks": [
                {"base": file("disk-0.raw", 4096), "layers": []},
                {"base": file("disk-1.raw", 4096), "layers": []},
            ],
        })
    }

    #[test]
    fn the_first_format_is_still_read() {
        let golden = include_bytes!("manifest-v1.json");
        let manifest = Manifest::parse(golden, Path::new("golden")).unwrap();
        assert_eq!((manifest.format, manifest.content.kernel), (FORMAT_1, None));
        let shape = Shape::of(&VmConfig::default(), &[]);
        assert_eq!(manifest.content.shape, shape);
    }

    #[test]
    fn what_the_first_format_named_of_a_host_is_ignored_and_its_limits_are_kept() {
        let text = text_of(FORMAT_1, hostile());
        let manifest = Manifest::parse(&text, Path::new("t")).unwrap();
        let text = serde_json::to_string(&manifest.content).unwrap();
        for word in ["/etc", "br-secret", "02:00", "neighbours", "log_limit"] {
            assert!(!text.contains(word), "{word}: {text}");
        }
        let content = manifest.content;
        assert_eq!(content.ceilings.nets[0].egress, Egress::None);
        assert!(content.shape.disks[1].read_only && !content.shape.disks[0].read_only);
    }

    #[test]
    fn an_old_description_keeps_the_rules_of_the_new() {
        let mut old = hostile();
        old["config"]["vcpus"] = json!(0);
        let error = Manifest::parse(&text_of(FORMAT_1, old), Path::new("t")).unwrap_err();
        assert!(error.message.contains("vcpus"), "{error}");
        // The present format does not have these fields.
        assert!(Manifest::parse(&text_of(FORMAT, hostile()), Path::new("t")).is_err());
    }
}
