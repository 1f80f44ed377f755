//! Holds `openapi.json` against the types and routes: the document is made from them here and
//! compared. `UPDATE_OPENAPI=1 cargo test -p clone-api` writes it anew after a change.

use std::path::Path;

use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::checkpoints::{
    CheckpointInfo, CheckpointList, CheckpointRequest, CheckpointTaken, NewCheckpoint, RewindTimes,
    Rewound,
};
use crate::config::{DiskConfig, NetConfig, Overlay, RateLimit, VmConfig};
use crate::control::*;
use crate::error::{ApiError, ErrorCode};
use crate::jail::{JailLayer, JailStatus, MissingLayer, RequiredJail};
use crate::routes::{ROUTES, Route};
use crate::units::{Bytes, MacAddr};

fn full_config() -> VmConfig {
    VmConfig {
        name: "web".into(),
        vcpus: 2,
        memory: Bytes::mib(512),
        kernel: "/boot/vmlinuz".into(),
        initrd: Some("/boot/initrd.img".into()),
        append: Some("quiet".into()),
        disks: vec![DiskConfig {
            path: "/var/lib/images/debian.raw".into(),
            overlay: Overlay::Ephemeral,
            rate_limit: Some(RateLimit {
                bandwidth: Some(Bytes::mib(100)),
                iops: Some(2000),
                ..RateLimit::default()
            }),
            ..DiskConfig::default()
        }],
        net: vec![NetConfig {
            mac: Some(MacAddr([2, 0xc1, 0, 0, 0, 1])),
            ..NetConfig::default()
        }],
        ..VmConfig::default()
    }
}

fn balloon() -> BalloonStatus {
    BalloonStatus {
        target_bytes: 128 << 20,
        actual_bytes: 96 << 20,
        guest: Some(GuestMemoryStats {
            free_bytes: Some(200 << 20),
            total_bytes: Some(480 << 20),
            ..GuestMemoryStats::default()
        }),
        guest_age_ms: Some(20),
    }
}

fn checkpoint() -> CheckpointInfo {
    CheckpointInfo {
        name: "before-upgrade".parse().unwrap(),
        parent: Some("fresh".parse().unwrap()),
        created_unix_ms: 1_790_000_000_000,
        memory_bytes: 12 << 20,
        disk_bytes: 3 << 20,
    }
}

/// An example of each type that a body can have.
fn example(type_name: &str) -> Value {
    fn same<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: T) -> Value {
        let json = serde_json::to_value(&value).unwrap();
        assert_eq!(serde_json::from_value::<T>(json.clone()).unwrap(), value);
        json
    }
    match type_name {
        "VmInfo" => same(VmInfo {
            name: "web".into(),
            state: VmState::Running,
            pid: 4242,
            started_unix_ms: 1_790_000_000_000,
            timeline: vec![StageTime {
                stage: StartStage::Entered,
                monotonic_ns: 86_400_000_000_000,
            }],
            share_failures: [("src".into(), "the server has gone".into())].into(),
            rewound: Some(LastRewind {
                checkpoint: checkpoint().name,
                monotonic_ns: 86_400_000_000_000,
            }),
            jail: JailStatus {
                missing: vec![MissingLayer {
                    layer: JailLayer::Cgroup,
                    reason: "cannot find cgroup v2: No such file or directory (os error 2)".into(),
                }],
            },
            version: "0.1.0".into(),
            config: full_config(),
        }),
        "VmStats" => same(VmStats {
            memory: MemoryStats {
                guest_bytes: 512 << 20,
                resident_bytes: 90 << 20,
                private_bytes: 88 << 20,
                swapped_bytes: 0,
                guest: Some(GuestPages {
                    private_bytes: 12 << 20,
                    shared_bytes: 70 << 20,
                    swapped_bytes: 0,
                    layers: vec![LayerPages {
                        shared_bytes: 70 << 20,
                        private_bytes: 9 << 20,
                    }],
                }),
            },
            cpu: CpuStats {
                user_us: 1_500_000,
                system_us: 200_000,
            },
            balloon: Some(balloon()),
            devices: [("block0".to_owned(), [("reads".to_owned(), 812)].into())].into(),
        }),
        "BalloonStatus" => same(balloon()),
        "BalloonTarget" => same(BalloonTarget {
            size: Bytes::mib(128),
        }),
        "ConsoleInfo" => same(ConsoleInfo {
            socket: "/run/clone/vms/web/console.sock".into(),
            log: "/run/clone/vms/web/console.log".into(),
            log_limit_bytes: 1 << 20,
            attached: 1,
        }),
        "ApiError" => same(
            ApiError::new(ErrorCode::Conflict, "the VM is stopping")
                .advise("wait for it to end, then start it again"),
        ),
        "Adoption" => same(Adoption {
            name: "web".into(),
            required_jail: RequiredJail::complete(),
        }),
        "TouchedPages" => same(TouchedPages {
            read: vec![(256, 300)],
            written: vec![(16, 20), (1024, 1025)],
        }),
        "SnapshotRequest" => same(SnapshotRequest {
            kind: SnapshotKind::Diff,
            disks: vec![0],
            kernel: true,
            base: Some(BaseLayers {
                memory: 2,
                disks: vec![1],
            }),
            stay_paused: true,
        }),
        "SnapshotTaken" => same(SnapshotTaken {
            memory_layer: "6f1c".into(),
            memory_parent: None,
            memory_bytes: 96 << 20,
            state_bytes: 20_480,
            disks: vec![DiskTaken {
                index: 0,
                parent_layers: 1,
                written: true,
            }],
            kernel: true,
            initrd: false,
            is_parent: true,
            cpu: CpuFeatures {
                vendor: "AuthenticAMD".into(),
                features: [("7.ebx".to_owned(), 0x219c_07a9)].into(),
            },
            times: SnapshotTimes {
                copy_us: 81_000,
                pause_us: 2_100,
                stop_us: 300,
                last_copy_us: 900,
                save_us: 700,
                freeze_us: 100,
                finish_us: 160_000,
                last_copy_bytes: 1 << 20,
            },
        }),
        "NewCheckpoint" => same(NewCheckpoint {
            name: checkpoint().name,
            has_agent: true,
        }),
        "CheckpointRequest" => same(CheckpointRequest {
            name: checkpoint().name,
        }),
        "CheckpointTaken" => same(CheckpointTaken {
            checkpoint: checkpoint(),
            times: SnapshotTimes {
                copy_us: 9_000,
                pause_us: 2_100,
                ..SnapshotTimes::default()
            },
        }),
        "CheckpointList" => same(CheckpointList {
            checkpoints: vec![checkpoint()],
            present: Some(checkpoint().name),
            used_bytes: 15 << 20,
        }),
        "Rewound" => same(Rewound {
            checkpoint: checkpoint().name,
            running: true,
            has_agent: true,
            dropped_bytes: 4 << 20,
            read_bytes: 1 << 20,
            times: RewindTimes {
                pause_us: 3_300,
                stop_us: 300,
                find_us: 400,
                memory_us: 1_500,
                disks_us: 100,
                restore_us: 1_000,
            },
        }),
        "MigrationRequest" => same(MigrationRequest {
            base: BaseLayers {
                memory: 1,
                disks: vec![1],
            },
            disks: vec![0],
            bytes_per_second: Some(100 << 20),
            max_pause_ms: Some(300),
        }),
        "MigrationDone" => same(MigrationDone {
            bytes: 9 << 20,
            data_pages: 2_500,
            zero_pages: 800,
            equal_pages: 40,
            disk_bytes: 1 << 20,
            rounds: 2,
            pause_us: 2_300,
            total_us: 160_000,
        }),
        "MigrationReceived" => same(MigrationReceived {
            bytes: 9 << 20,
            data_pages: 2_500,
        }),
        "MigrationStatus" => same(MigrationStatus {
            custody: Custody::Here,
            cpu: None,
            progress: Some(MigrationProgress {
                round: 1,
                sent_bytes: 4 << 20,
                left_bytes: 5 << 20,
                paused: false,
            }),
        }),
        "OpenApi" => json!({ "openapi": "3.1.0" }),
        other => panic!("no example of {other}: add one"),
    }
}

/// The schemas of all types, by name.
fn schemas() -> Map<String, Value> {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    let mut generator = settings.into_generator();
    generator.subschema_for::<VmInfo>();
    generator.subschema_for::<VmStats>();
    generator.subschema_for::<BalloonTarget>();
    generator.subschema_for::<ConsoleInfo>();
    generator.subschema_for::<Adoption>();
    generator.subschema_for::<TouchedPages>();
    generator.subschema_for::<SnapshotRequest>();
    generator.subschema_for::<SnapshotTaken>();
    generator.subschema_for::<NewCheckpoint>();
    generator.subschema_for::<CheckpointRequest>();
    generator.subschema_for::<CheckpointTaken>();
    generator.subschema_for::<CheckpointList>();
    generator.subschema_for::<Rewound>();
    generator.subschema_for::<MigrationRequest>();
    generator.subschema_for::<MigrationDone>();
    generator.subschema_for::<MigrationReceived>();
    generator.subschema_for::<MigrationStatus>();
    generator.subschema_for::<ApiError>();
    let mut schemas = generator.take_definitions(true);
    schemas.insert(
        "OpenApi".into(),
        json!({ "description": "An OpenAPI document.", "type": "object" }),
    );
    schemas
}

fn body(type_name: &str, description: &str) -> Value {
    json!({
        "description": description,
        "content": { "application/json": {
            "schema": { "$ref": format!("#/components/schemas/{type_name}") },
            "example": example(type_name),
        }}
    })
}

fn operation(route: &Route) -> Value {
    let mut responses = Map::new();
    match route.response {
        Some(name) => responses.insert("200".into(), body(name, "Done.")),
        None => responses.insert("204".into(), json!({ "description": "Done." })),
    };
    responses.insert("default".into(), body("ApiError", "What went wrong."));
    let mut operation = json!({
        "operationId": route.id,
        "summary": route.summary,
        "responses": responses,
    });
    if let Some(name) = route.request {
        let mut request = body(name, "What is wanted.");
        request["required"] = json!(true);
        operation["requestBody"] = request;
    }
    operation
}

fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Clone: the control socket of a virtual machine",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "HTTP/1.1 and JSON on the Unix socket `control.sock` in the VM's runtime directory, as in `curl --unix-socket /run/clone/vms/NAME/control.sock http://vm/v1/vm`.",
        },
        "paths": paths,
        "components": { "schemas": schemas() },
    })
}

#[test]
fn the_document_in_the_repository_is_what_the_types_and_routes_say() {
    let made = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
        std::fs::write(path, made).unwrap();
        return;
    }
    assert!(
        made == crate::OPENAPI,
        "openapi.json is out of date: run UPDATE_OPENAPI=1 cargo test -p clone-api"
    );
}

#[test]
fn every_reference_in_the_document_leads_somewhere() {
    fn walk(value: &Value, document: &Value, seen: &mut usize) {
        if let Some(Value::String(reference)) = value.get("$ref") {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
            *seen += 1;
        }
        match value {
            Value::Object(map) => map.values().for_each(|v| walk(v, document, seen)),
            Value::Array(list) => list.iter().for_each(|v| walk(v, document, seen)),
            _ => {}
        }
    }
    let document: Value = serde_json::from_str(crate::OPENAPI).unwrap();
    let mut seen = 0;
    walk(&document, &document, &mut seen);
    assert!(seen > ROUTES.len(), "only {seen} references");
}

#[test]
fn every_field_of_an_example_is_in_the_schema() {
    fn resolve<'a>(schema: &'a Value, document: &'a Value) -> &'a Value {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(reference) => document.pointer(&reference[1..]).unwrap(),
            None => schema,
        }
    }
    fn check(value: &Value, schema: &Value, document: &Value) {
        let schema = resolve(schema, document);
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let inner = match schema["properties"].get(key) {
                        Some(inner) => inner,
                        // A choice or a map: its values are checked where the schema names them.
                        None if schema.get("properties").is_none() => continue,
                        None => panic!("`{key}` is not in {schema}"),
                    };
                    check(value, inner, document);
                }
            }
            Value::Array(list) => list
                .iter()
                .for_each(|value| check(value, &schema["items"], document)),
            _ => {}
        }
    }
    let document: Value = serde_json::from_str(crate::OPENAPI).unwrap();
    for name in [
        "VmInfo",
        "VmStats",
        "BalloonStatus",
        "BalloonTarget",
        "ConsoleInfo",
        "ApiError",
    ] {
        let schema = document
            .pointer(&format!("/components/schemas/{name}"))
            .unwrap();
        assert!(schema["properties"].is_object(), "{name}");
        check(&example(name), schema, &document);
    }
}
