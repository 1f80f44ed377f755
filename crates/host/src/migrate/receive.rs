//! The destination's launcher.

use std::process::Child;
use std::time::Duration;

use clone_api::control::{Custody, MigrationReceived};
use clone_api::validate::validate;
use clone_api::{ApiError, Client, ErrorCode, VmConfig};
use clone_migration::Link;
use clone_start::cpu;
use clone_start::disks;
use clone_start::document::{BaseTemplate, BootSource, ForkSpec, Origin, Parent};
use clone_start::error::Result;
use clone_start::{SharedFile, VmDir};
use clone_template::{Store, Template};

use super::frame;
use super::offer::{Offer, OfferedBase, Verdict, check_disks};
use crate::launch::arriving::{self, ArrivingVm};
use crate::launch::resume::Reach;
use crate::runtime::{RunningVm, Runtime};

/// The longest time for a VM to arrive. Its process gives up much earlier on a connection that makes
/// no progress.
const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// The longest time for the process of a VM that did not arrive to end.
const END_LIMIT: Duration = Duration::from_secs(30);
/// The memory that a host keeps for itself, in bytes.
const RESERVE: u64 = 64 << 20;

/// What the VM that comes must be.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Its name; any if there is none.
    pub name: Option<String>,
    /// Whether it must be of a template. Otherwise it may name images and a kernel of this host, as
    /// somebody may who may run VMs here.
    pub only_templates: bool,
    /// The destinations that its guest may send to from now on; `None` where they stay as they are.
    pub reach: Option<Reach>,
}

impl Policy {
    fn check(&self, offer: &Offer) -> Result<()> {
        let refuse = |message: String| Err(ApiError::new(ErrorCode::Conflict, message));
        let name = &offer.config.name;
        if let Some(expected) = self.name.as_ref().filter(|expected| *expected != name) {
            return refuse(format!("the VM `{expected}` is expected, and not `{name}`"));
        }
        match (&offer.base, self.only_templates) {
            (OfferedBase::Files { .. }, true) => {
                refuse("the VM was booted from files of its host, which do not travel".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// A VM that came from another host, and runs.
#[derive(Debug)]
pub struct Arrived {
    /// The VM.
    pub vm: RunningVm,
    /// What came.
    pub received: MigrationReceived,
    /// Notices for the owner.
    pub notices: Vec<String>,
}

/// Takes in the VM that the other end of `link` offers, and returns when it runs here. It must be what
/// `policy` says. Its template is looked for in `store`, and put there if it must be sent first.
///
/// # Errors
/// The VM then is where it was, and nothing of it is left here; or, if the connection was lost at the
/// very end, it waits here to be told (`Custody::Arrived`), as the error says.
pub fn receive(
    runtime: &Runtime,
    store: &Store,
    mut link: Link,
    policy: &Policy,
) -> Result<Arrived> {
    link.set_patience(frame::PATIENCE);
    let offer: Offer = frame::read(&mut link)?;
    let prepared = policy
        .check(&offer)
        .and_then(|()| prepare(runtime, store, &mut link, &offer, policy.reach.as_ref()));
    let ArrivingVm { vm, mut child } = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            // The source may be gone already. The caller gets the error in any case.
            let _ = frame::write(&mut link, &Verdict::Refused(error.clone()));
            return Err(error);
        }
    };
    let client = Client::new(vm.dir.control_socket()).with_timeout(LIMIT);
    let received = frame::write(&mut link, &Verdict::Accepted)
        .and_then(|()| Ok(client.receive(link.descriptors())?));
    // From here on, the stream is the process's alone.
    drop(link);
    match received {
        Ok(received) => {
            let mut notices = vm.dir.notices();
            if offer.has_agent {
                notices.extend(arriving::go_on(&vm, &offer.network));
            }
            arriving::leave_running(child);
            Ok(Arrived {
                vm,
                received,
                notices,
            })
        }
        Err(error) => {
            if waits(&vm) {
                arriving::leave_running(child);
            } else {
                clean_up(runtime, &vm, &mut child);
            }
            Err(error)
        }
    }
}

/// Whether the VM is here, and waits for the word to run. A process that does not say so has nothing
/// that would be lost.
fn waits(vm: &RunningVm) -> bool {
    let status = Client::new(vm.dir.control_socket()).migration();
    status.is_ok_and(|status| matches!(status.custody, Custody::Arrived | Custody::Here))
}

fn clean_up(runtime: &Runtime, vm: &RunningVm, child: &mut Child) {
    // It ends by itself, except where it was never told what to receive.
    let ended = vm
        .process
        .signal(rustix::process::Signal::KILL)
        .and_then(|()| vm.process.wait(Some(END_LIMIT)))
        .and_then(|_| runtime.sweep_one(&vm.dir));
    let _ = child.wait();
    if let Err(error) = ended {
        tracing::warn!(message = error.message, "a VM that did not arrive is left");
    }
}

/// Checks that the VM can run here, and starts its process.
fn prepare(
    runtime: &Runtime,
    store: &Store,
    link: &mut Link,
    offer: &Offer,
    reach: Option<&Reach>,
) -> Result<ArrivingVm> {
    offer.formats.check()?;
    let mut config = offer.config.clone();
    if let Some(reach) = reach {
        for net in &mut config.net {
            net.egress.clone_from(&reach.egress);
            net.reach_host = reach.host;
        }
    }
    check_config(&config)?;
    check_disks(&config)?;
    check_name(runtime, &config.name)?;
    let missing = cpu::missing(&offer.cpu, &cpu::of_host()?);
    if !missing.is_empty() {
        let message = format!(
            "the CPU here lacks what the guest was told that it has: {}",
            missing.join(", ")
        );
        return Err(ApiError::new(ErrorCode::HostUnsupported, message)
            .advise("move it to a host with the same CPU or a newer one of its kind"));
    }
    check_memory(offer.private_bytes)?;
    let (origin, parent) = match &offer.base {
        OfferedBase::Template { id, name, layers } => {
            let template = template(runtime, store, link, id, name)?;
            let mut parent = template.parent()?;
            arriving::set_paths(&mut config, &template, &parent);
            let all = parent.layers();
            let base = BaseTemplate {
                template: template.dir().to_owned(),
                layers: layers.clone(),
            };
            if !base.fits(&all) {
                let message = "the VM builds on more layers than its template has";
                return Err(ApiError::new(ErrorCode::InvalidConfig, message));
            }
            parent.narrow_to(base);
            let spec = ForkSpec {
                parent: parent.clone(),
                state: template.shared_state()?,
                prefetch: None,
                standby: false,
                observed: false,
                run_once: None,
            };
            (Origin::Fork(Box::new(spec)), parent)
        }
        OfferedBase::Files {
            kernel,
            initrd,
            images,
        } => {
            if kernel.path != config.kernel {
                let message = "the offered kernel is not the one of the description";
                return Err(ApiError::new(ErrorCode::InvalidConfig, message));
            }
            let files = [kernel].into_iter().chain(initrd).chain(images);
            for file in files {
                file.check()?;
            }
            let source = BootSource {
                kernel: SharedFile::named(arriving::boot_kernel(&config.kernel)?),
                initrd: config.initrd.clone().map(SharedFile::named),
            };
            let parent = Parent {
                disks: config.disks.iter().map(disks::as_base).collect(),
                boot: Some(source.clone()),
                ..Parent::default()
            };
            (Origin::Boot(source), parent)
        }
    };
    arriving::start(runtime, config, origin, offer.network.clone(), &parent)
}

fn check_config(config: &VmConfig) -> Result<()> {
    let problems = validate(config);
    if problems.is_empty() {
        return Ok(());
    }
    let problems: Vec<String> = problems.iter().map(|it| format!("  {it}")).collect();
    let message = format!("the VM cannot be like this:\n{}", problems.join("\n"));
    Err(ApiError::new(ErrorCode::InvalidConfig, message))
}

fn check_name(runtime: &Runtime, name: &str) -> Result<()> {
    runtime.check_not_suspended(name)?;
    // A directory that is made meanwhile is found when the VM's own is made.
    let dir: VmDir = runtime.dir(name);
    match dir.status()? {
        clone_start::vm_dir::Status::Absent | clone_start::vm_dir::Status::Stale => Ok(()),
        _ => {
            let message = format!("there is a VM `{name}` here already");
            Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("VMs keep their names; end or move the other one first"))
        }
    }
}

/// Refuses a VM whose own memory this host does not have.
fn check_memory(bytes: u64) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = available(&text) else {
        return Ok(());
    };
    match bytes.saturating_add(RESERVE) <= available {
        true => Ok(()),
        false => {
            let message = format!(
                "the VM has {} MiB of its own, and {} MiB of memory are available here",
                bytes >> 20,
                available >> 20
            );
            Err(ApiError::new(ErrorCode::OutOfSpace, message)
                .advise("move it to a host with more memory, or free some here"))
        }
    }
}

/// The available memory in bytes, of the text of `/proc/meminfo`.
fn available(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The template with this id: of this host, or as the source sends it.
fn template(
    runtime: &Runtime,
    store: &Store,
    link: &mut Link,
    id: &str,
    name: &str,
) -> Result<Template> {
    for (_, template) in store.list()? {
        if let Ok(template) = template
            && template.manifest().id == id
        {
            template.ensure_verified(&runtime.verified())?;
            return Ok(template);
        }
    }
    // The name is the source's; where another template has it here, the id's beginning tells them
    // apart.
    let mut target = store.path(name)?;
    if target.exists() || name.contains('/') {
        let short: String = id
            .chars()
            .filter(char::is_ascii_hexdigit)
            .take(12)
            .collect();
        target = store.path(&format!("moved-{short}"))?;
    }
    frame::write(link, &Verdict::SendTemplate)?;
    clone_template::receive(&target, Some(id), link, &runtime.verified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_is_not_the_expected_one_or_of_no_template_is_refused() {
        let golden = include_str!("golden/offer-1.json");
        let offer: Offer = serde_json::from_str(golden).unwrap();
        let policy = |name: &str| Policy {
            name: Some(name.to_owned()),
            only_templates: true,
            reach: None,
        };
        Policy::default().check(&offer).unwrap();
        policy("anna").check(&offer).unwrap();
        assert_eq!(
            policy("bert").check(&offer).unwrap_err().code,
            ErrorCode::Conflict
        );
        let mut booted = serde_json::to_value(&offer).unwrap();
        let file = serde_json::json!({"path": "/vmlinux", "hash": "0"});
        booted["base"] =
            serde_json::json!({"files": {"kernel": file, "initrd": null, "images": []}});
        let booted: Offer = serde_json::from_value(booted).unwrap();
        Policy::default().check(&booted).unwrap();
        policy("anna").check(&booted).unwrap_err();
    }

    #[test]
    fn a_vm_with_more_memory_than_there_is_is_refused() {
        assert_eq!(
            available("MemFree: 1 kB\nMemAvailable:    2048 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(available("MemAvailable: ? kB\n"), None);
        check_memory(1 << 20).unwrap();
        let refused = check_memory(1 << 60).unwrap_err();
        assert_eq!(refused.code, ErrorCode::OutOfSpace);
    }
}
