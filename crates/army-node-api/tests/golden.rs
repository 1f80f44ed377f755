//! What travels between releases: these texts are what a controller or a node of the release that
//! introduced them sends, and they are read for ever.
#![allow(clippy::unwrap_used)]

use std::fmt::Debug;

use army_api::figures::VmFigures;
use army_api::vms::{Egress, IdleAction, IdlePolicy, NetworkPolicy};
use army_node_api::requests::{
    ConsoleOutput, IdleChange, Lifetime, MeasureVmRequest, Operation, ReadConsoleRequest,
    UpdateVmRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(golden: &str, value: &T) {
    assert_eq!(&serde_json::from_str::<T>(golden).unwrap(), value);
    assert_eq!(serde_json::to_string(value).unwrap(), golden);
    // A field of a newer release is skipped.
    let newer = golden.replacen('{', r#"{"of_the_future":[1],"#, 1);
    assert_eq!(&serde_json::from_str::<T>(&newer).unwrap(), value);
}

#[test]
fn a_change_of_a_vm() {
    assert_eq!(UpdateVmRequest::NAME, "update-vm");
    let whole = UpdateVmRequest {
        vm: "1".into(),
        revision: 7,
        lifetime: Some(Lifetime {
            ttl_ms: Some(5000),
            expires_ms: None,
        }),
        idle: Some(IdleChange {
            policy: Some(IdlePolicy {
                after_s: 60,
                action: IdleAction::Destroy,
            }),
        }),
        network: Some(NetworkPolicy {
            egress: Egress::Allow(vec!["10.0.0.0/8".into()]),
            host: false,
        }),
    };
    check(
        concat!(
            r#"{"vm":"1","revision":7,"lifetime":{"ttl_ms":5000,"expires_ms":null},"#,
            r#""idle":{"policy":{"after_s":60,"action":"destroy"}},"#,
            r#""network":{"egress":{"allow":["10.0.0.0/8"]}}}"#
        ),
        &whole,
    );
    let nothing = UpdateVmRequest {
        lifetime: None,
        idle: None,
        network: None,
        ..whole
    };
    check(r#"{"vm":"1","revision":7}"#, &nothing);
}

#[test]
fn questions_about_a_vm() {
    assert_eq!(MeasureVmRequest::NAME, "measure-vm");
    check(r#"{"vm":"1"}"#, &MeasureVmRequest { vm: "1".into() });
    let figures = VmFigures {
        addresses: vec!["192.0.2.1".into()],
        cpu_user_us: 1,
        cpu_system_us: 2,
        disk_read_bytes: 3,
        disk_written_bytes: 4,
        network_received_bytes: 5,
        network_sent_bytes: 6,
        ..VmFigures::default()
    };
    check(
        concat!(
            r#"{"addresses":["192.0.2.1"],"cpu_user_us":1,"cpu_system_us":2,"disk_read_bytes":3,"#,
            r#""disk_written_bytes":4,"network_received_bytes":5,"network_sent_bytes":6,"#,
            r#""memory":{"guest_bytes":0,"private_bytes":0,"shared_bytes":0,"swapped_bytes":0}}"#
        ),
        &figures,
    );
    assert_eq!(ReadConsoleRequest::NAME, "read-console");
    let request = ReadConsoleRequest {
        vm: "1".into(),
        bytes: 9,
    };
    check(r#"{"vm":"1","bytes":9}"#, &request);
    let output = ConsoleOutput { text: "a\n".into() };
    check(r#"{"text":"a\n"}"#, &output);
}
