//! Test support: forks templates that may be hostile, and records the files that are touched.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use clone_api::config::{NetConfig, NetMode, Overlay};
use clone_api::jail::RequiredJail;
use clone_api::validate::validate;
use clone_api::{MacAddr, VmConfig};
use clone_start::VmDir;
use clone_start::document::{AttachedNet, Start};
use clone_start::error::Result;
use clone_template::testing::{Bounds, Place, record};
use clone_template::{Template, receive, send};

use crate::launch::Plan;
use crate::launch::fork::{Overrides, Source};
use crate::runtime::Runtime;
use crate::scratch;

/// Opens, verifies and forks the template `name`, up to the point where KVM and the host's network
/// are needed.
///
/// # Panics
/// A file outside of the template and of the caller's own directories was touched, or the clone's
/// description has something that only the caller may request.
pub fn fork(place: &Place, name: &str, overrides: &Overrides) -> Result<VmConfig> {
    let vm = place.dir.path().join("vm");
    fs::create_dir_all(&vm).unwrap();
    let dir = place.path(name);
    let runtime = Runtime::at(&place.dir.path().join("run")).unwrap();
    let forked = || {
        let template = Template::open(&dir)?;
        let source = Source::template(&template, &runtime)?;
        rehearse(&source, &VmDir::at(vm.clone()), "clone", overrides)
    };
    let (forked, touched) = record(forked).unwrap();
    let bounds = Bounds {
        // The fork checks whether the host's directory for layers takes files.
        read: [dir.clone()].into_iter().chain(scratch::dir()).collect(),
        write: vec![vm.clone(), place.dir.path().join("run")],
    };
    let broken = bounds.broken_by(&touched);
    assert!(broken.is_empty(), "a fork touched {broken:?}");
    assert!(!touched.is_empty());
    fs::remove_dir_all(&vm).unwrap();
    if let Ok(config) = &forked {
        check(config, &dir, overrides);
    }
    forked
}

/// Checks that a clone's description takes nothing but the machine's shape from its template.
fn check(config: &VmConfig, template: &Path, overrides: &Overrides) {
    assert_eq!(validate(config), []);
    assert_eq!(config.name, "clone");
    assert_eq!(config.console, VmConfig::default().console);
    let disks = config.disks.iter().map(|disk| &disk.path);
    for path in disks.chain([&config.kernel]).chain(&config.initrd) {
        assert!(path.starts_with(template), "{}", path.display());
    }
    for disk in &config.disks {
        assert!(!matches!(disk.overlay, Overlay::Kept(_)) || !overrides.overlays.is_empty());
    }
    for net in config.net.iter().filter(|_| overrides.net.is_none()) {
        let own = NetConfig {
            mode: NetMode::Nat,
            queues: net.queues,
            egress: net.egress.clone(),
            rate_limit: net.rate_limit,
            connections: net.connections,
            ..NetConfig::default()
        };
        assert_eq!(*net, own);
    }
}

/// Sends the template `name` to another place, and receives it there.
///
/// # Panics
/// As [`fork`] does, and if a usable template does not arrive.
pub fn travel(place: &Place, name: &str) {
    let Ok(template) = Template::open(&place.path(name)) else {
        return;
    };
    let mut stream = Vec::new();
    if send(&template, &mut stream).is_err() {
        return;
    }
    let there = Place::new();
    let arrive = || {
        receive(
            &there.path(name),
            None,
            &mut stream.as_slice(),
            &there.verified,
        )
    };
    let (arrived, touched) = record(arrive).unwrap();
    let bounds = Bounds {
        read: Vec::new(),
        write: vec![there.dir.path().to_owned()],
    };
    let broken = bounds.broken_by(&touched);
    assert!(broken.is_empty(), "a template that came touched {broken:?}");
    let verified = template.verify(|_| {});
    assert_eq!(
        arrived.is_ok(),
        verified.is_ok(),
        "{arrived:?}, {verified:?}"
    );
}

/// Runs a fork in `dir` up to the point where KVM and the host's network are needed, and returns
/// the clone's description. Tests use this to see what a template can make a fork do.
pub fn rehearse(
    source: &Source,
    dir: &VmDir,
    name: &str,
    overrides: &Overrides,
) -> Result<VmConfig> {
    let Plan { config, origin, .. } = source.plan(name, overrides, false)?;
    let net = AttachedNet {
        queues: 0,
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        mtu: None,
        kernel_argument: None,
    };
    let start = Start {
        nets: vec![net; config.net.len()],
        config: config.clone(),
        origin,
        required_jail: RequiredJail::default(),
        layers_dir: scratch::dir(),
        incoming: false,
    };
    clone_vm_process::open::rehearse(dir, start)?;
    Ok(config)
}
