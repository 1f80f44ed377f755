//! Forks clones of a template, or of a VM that continues to run.
//!
//! The forking side decides a clone's networks, the place of its writes and its limits. By default,
//! a template's clones have interfaces on this host's translated network, writes that end with
//! them, and logs of the usual size; [`Overrides`] change that. A template can only restrict: its
//! ceilings (the egress and the rate limits of the VM that it was made of) are intersected with
//! what is allowed here, overrides included. The forks of a running VM start from that VM's own
//! description, which this host made, and are narrowed to its limits in the same way.
//!
//! A clone is taken from the standbys if there are any, and started otherwise; each result says
//! which. Each clone succeeds or fails independently.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clone_api::config::{Egress, NetConfig, NetMode, Overlay, ShareConfig};
use clone_api::control::SnapshotTaken;
use clone_api::shape::Ceilings;
use clone_api::validate::validate_unnamed;
use clone_api::{ApiError, Client, ErrorCode, VmConfig};
use clone_start::document::{ForkSpec, Origin, Parent};
use clone_start::error::Result;
use clone_start::{Process, VmDir};
use clone_template::Template;
use serde::Serialize;

use super::{Plan, identity, last_words, network, reaper, start_or_abandon};
use crate::runtime::{LiveDir, RunningVm, Runtime};
use crate::snapshot;

/// The most forks that are started at once. More would only wait for processors.
const AT_ONCE: usize = 8;
/// The time limit for a standby to start running when it is adopted.
const ADOPTION_LIMIT: Duration = Duration::from_secs(10);
/// The time limit for a process to end after it closed its sockets.
const END_LIMIT: Duration = Duration::from_secs(1);

/// The source that clones are forked from.
#[derive(Debug)]
pub struct Source {
    /// The default description of a clone.
    config: VmConfig,
    /// The limits that every clone is narrowed to.
    ceilings: Ceilings,
    /// The files that every clone is made of.
    spec: ForkSpec,
    /// The template's id; `None` for a live fork, which has no standbys.
    template_id: Option<String>,
    /// Whether the guest has an agent, which can give it an identity.
    has_agent: bool,
    /// Keeps the files from being removed until the clones hold them.
    _held: Held,
}

/// The lock that keeps the files of a source in place.
#[derive(Debug)]
enum Held {
    /// The lock of a template.
    Template { _lock: File },
    /// The directory of a live fork.
    Live { _dir: LiveDir },
}

impl Source {
    /// A source that is a template, which is verified unless it was verified on this host before.
    pub fn template(template: &Template, runtime: &Runtime) -> Result<Self> {
        template.ensure_verified(&runtime.verified())?;
        let content = template.content();
        let parent = template.parent()?;
        Ok(Self {
            config: template_config(template, &parent),
            ceilings: content.ceilings.clone(),
            spec: ForkSpec {
                parent,
                state: template.shared_state()?,
                prefetch: template.prefetch()?,
                standby: false,
                observed: false,
                run_once: None,
            },
            template_id: Some(template.manifest().id.clone()),
            has_agent: content.agent_version.is_some(),
            _held: Held::Template {
                _lock: template.hold()?,
            },
        })
    }

    /// The destinations that a clone's guest may send to at the most, on all of its interfaces;
    /// `None` where that cannot be said with one policy.
    pub fn egress_ceiling(&self) -> Option<Egress> {
        let nets = self.ceilings.nets.iter().map(|net| &net.egress);
        Egress::common(nets).ok()
    }

    /// Checks that the kernel for reboots of the clones exists and is the file that was verified.
    #[cfg(any(test, feature = "testing"))]
    #[doc(hidden)]
    pub fn boots(&self) -> Result<()> {
        let boot = self.spec.parent.boot.as_ref();
        boot.map_or(Ok(()), |boot| boot.kernel.open().map(drop))
    }

    /// Returns a source for clones that report which pages they touch. They are never standbys.
    pub(super) fn observed(self) -> Self {
        let spec = ForkSpec {
            observed: true,
            ..self.spec
        };
        Self { spec, ..self }
    }

    /// A source that is a running VM in its present state. The VM continues to run.
    pub fn live(runtime: &Runtime, vm: &RunningVm) -> Result<(Self, SnapshotTaken)> {
        let has_agent = snapshot::agent_version(vm).is_some();
        let (layers, taken) = snapshot::take_live(runtime, vm)?;
        let config = vm.dir.config()?;
        let source = Self {
            ceilings: Ceilings::of(&config),
            config,
            spec: ForkSpec {
                parent: layers.parent,
                state: layers.state,
                prefetch: None,
                standby: false,
                observed: false,
                run_once: None,
            },
            template_id: None,
            has_agent,
            _held: Held::Live { _dir: layers.dir },
        };
        Ok((source, taken))
    }

    /// The validated description of a clone.
    fn clone_config(&self, name: &str, overrides: &Overrides) -> Result<VmConfig> {
        let mut config = self.config.clone();
        name.clone_into(&mut config.name);
        connect(&mut config, overrides)?;
        keep_writes(&mut config, overrides)?;
        share(&mut config, overrides)?;
        self.ceilings
            .narrow(&mut config)
            .map_err(|(index, error)| {
                ApiError::new(
                    ErrorCode::InvalidConfig,
                    format!("net[{index}]: the template limits egress, too: {error}"),
                )
                .advise("allow fewer networks")
            })?;
        let problems = validate_unnamed(&config);
        if problems.is_empty() {
            return Ok(config);
        }
        let problems: Vec<String> = problems.iter().map(|it| format!("  {it}")).collect();
        let message = format!("a clone cannot be made like this:\n{}", problems.join("\n"));
        Err(ApiError::new(ErrorCode::InvalidConfig, message)
            .advise("it is narrowed to the limits of its template: `clone template inspect`"))
    }

    /// Decides everything about a clone before anything is made for it.
    pub(crate) fn plan(&self, name: &str, overrides: &Overrides, standby: bool) -> Result<Plan> {
        let config = self.clone_config(name, overrides)?;
        Ok(Plan::new(config, self.origin(standby)))
    }

    fn origin(&self, standby: bool) -> Origin {
        Origin::Fork(Box::new(ForkSpec {
            standby,
            ..self.spec.clone()
        }))
    }
}

/// The default description of a clone of `template`. Its paths are those of the template's files,
/// for people who inspect a clone; the clone's process opens the files that [`Parent`] names.
fn template_config(template: &Template, parent: &Parent) -> VmConfig {
    let mut config = template.content().shape.config();
    set_paths(&mut config, template, parent);
    config
}

/// Sets the paths in the description of a clone of `template` to those of its files.
pub(super) fn set_paths(config: &mut VmConfig, template: &Template, parent: &Parent) {
    let boot = parent.boot.as_ref();
    config.kernel = match boot {
        Some(boot) => boot.kernel.path.clone(),
        None => template.dir().to_owned(),
    };
    config.initrd = boot.and_then(|boot| Some(boot.initrd.as_ref()?.path.clone()));
    for (disk, shared) in config.disks.iter_mut().zip(&parent.disks) {
        if let Some((base, format)) = &shared.base {
            disk.path.clone_from(&base.path);
            disk.format = Some(*format);
        }
    }
}

/// Connects the interfaces as the overrides request, each with an address of its own.
fn connect(config: &mut VmConfig, overrides: &Overrides) -> Result<()> {
    if let Some(nets) = &overrides.net {
        if nets.len() != config.net.len() {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!(
                    "the template has {} network interfaces, and {} were asked for",
                    config.net.len(),
                    nets.len()
                ),
            )
            .advise("a clone has its template's devices; what they are connected to is free"));
        }
        for (net, wanted) in config.net.iter_mut().zip(nets) {
            let queues = net.queues;
            *net = wanted.clone();
            net.queues = queues;
        }
    } else {
        for net in &mut config.net {
            net.mac = None;
            // These addresses belong to the forked guest only.
            net.addresses.clear();
        }
        if let Some(index) = config.net.iter().position(|net| net.mode == NetMode::Tap) {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!("interface {index} of the VM is on a tap of its owner's"),
            )
            .advise("give each clone its own: --net tap=NAME"));
        }
    }
    if let Some(egress) = &overrides.egress {
        restrict(config, egress);
    }
    if let Some(reach_host) = overrides.reach_host {
        for net in &mut config.net {
            net.reach_host = reach_host;
        }
    }
    Ok(())
}

/// Makes the writes of clones ephemeral, except for the disks whose writes an override keeps.
fn keep_writes(config: &mut VmConfig, overrides: &Overrides) -> Result<()> {
    for disk in config.disks.iter_mut().filter(|disk| !disk.read_only) {
        disk.overlay = Overlay::Ephemeral;
    }
    for (index, overlay) in &overrides.overlays {
        let Some(disk) = config.disks.get_mut(*index).filter(|disk| !disk.read_only) else {
            let message = format!("the template has no writable disk {index}");
            return Err(ApiError::new(ErrorCode::InvalidConfig, message));
        };
        disk.overlay = Overlay::Kept(overlay.clone());
    }
    Ok(())
}

/// Gives the shares their directories. Those of a live fork are the VM's, unless others are given.
fn share(config: &mut VmConfig, overrides: &Overrides) -> Result<()> {
    for given in &overrides.shares {
        let mut shares = config.shares.iter_mut();
        let Some(share) = shares.find(|share| share.tag == given.tag) else {
            let message = format!("there is no share `{}`", given.tag);
            return Err(ApiError::new(ErrorCode::InvalidConfig, message).advise(
                "a clone has its template's devices: `clone template inspect` lists them",
            ));
        };
        share.path.clone_from(&given.path);
        share.read_only = given.read_only;
        share.owner = given.owner;
    }
    let mut shares = config.shares.iter();
    match shares.find(|share| share.path.as_os_str().is_empty()) {
        None => Ok(()),
        Some(ShareConfig { tag, .. }) => {
            let message = format!("the template has a share `{tag}`, and no directory for it");
            Err(ApiError::new(ErrorCode::InvalidConfig, message)
                .advise(format!("give it one: clone fork --share {tag}=DIRECTORY")))
        }
    }
}

/// The differences of clones from their source's defaults.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// The connection of each interface. By default, a template's clones are on this host's
    /// translated network, and a VM's forks are connected as the VM is.
    pub net: Option<Vec<NetConfig>>,
    /// The files that keep the writes to a disk, by the disk's index; the writes to other disks end
    /// with the clone.
    pub overlays: Vec<(usize, PathBuf)>,
    /// The destinations that the guests may send to; narrowed to the template's ceiling.
    pub egress: Option<Egress>,
    /// The directories of shares, by their tags.
    pub shares: Vec<ShareConfig>,
    /// Whether the guests may open connections to the host's own addresses; as `net` says where it is
    /// not given.
    pub reach_host: Option<bool>,
    /// The host names of the guests, one for each clone; by default the clones' names.
    pub host_names: Vec<String>,
}

impl Overrides {
    /// Whether there are no overrides, so that a standby, which has the defaults, can be used.
    fn is_none(&self) -> bool {
        self.net.is_none() && self.overlays.is_empty() && self.shares.is_empty()
    }
}

/// Changes the destinations that a running VM's guest may send to, on all of its interfaces: those
/// of `egress` that `ceiling` permits, too, and the host's own addresses only with `reach_host`. The
/// change is in force when this returns.
///
/// # Errors
/// Where both together are too many networks, or the host's packet filter cannot be changed.
pub fn set_egress(
    vm: &RunningVm,
    egress: &Egress,
    ceiling: &Egress,
    reach_host: bool,
) -> Result<()> {
    hold(vm, &narrowed(egress, ceiling)?, reach_host)
}

/// The destinations of `egress` that a template's `ceiling` permits, too.
///
/// # Errors
/// Where both together are too many networks.
pub fn narrowed(egress: &Egress, ceiling: &Egress) -> Result<Egress> {
    egress.narrowed_by(ceiling).map_err(|error| {
        let message = format!("the template limits egress, too: {error}");
        ApiError::new(ErrorCode::InvalidConfig, message).advise("allow fewer networks")
    })
}

/// Holds a VM's guest to these destinations, and records that in its description.
fn hold(vm: &RunningVm, egress: &Egress, reach_host: bool) -> Result<()> {
    network::restrict(&vm.dir, egress, reach_host)?;
    vm.dir.change_config(|config| {
        restrict(config, egress);
        for net in &mut config.net {
            net.reach_host = reach_host;
        }
    })
}

/// The destinations that a running VM's guest may send to now, on all of its interfaces.
///
/// # Errors
/// Where the VM's description cannot be read.
pub fn egress(vm: &RunningVm) -> Result<Egress> {
    let nets = vm.dir.config()?.net;
    Egress::common(nets.iter().map(|net| &net.egress)).map_err(|error| {
        let message = format!("the interfaces have different limits of egress: {error}");
        ApiError::new(ErrorCode::InvalidConfig, message)
    })
}

/// Limits all interfaces to `egress`.
fn restrict(config: &mut VmConfig, egress: &Egress) {
    for net in &mut config.net {
        net.egress.clone_from(egress);
    }
}

/// A running clone.
#[derive(Debug, Clone, Serialize)]
pub struct Forked {
    /// The clone's name.
    pub name: String,
    /// The id of the clone's process.
    pub pid: u32,
    /// Whether the clone was a standby.
    pub warm: bool,
    /// The time from the request until the guest ran, in microseconds.
    pub running_us: u64,
    /// The time from then until the guest had its own identity, in microseconds; `None` if it was
    /// given none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_us: Option<u64>,
    /// Notices for the owner: what the host or the guest could not provide.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
}

/// Makes one clone of `source` for each of `names`, in parallel; the results are in the same order.
///
/// With `identify`, each clone is given its identity before it counts as finished.
pub fn fork(
    runtime: &Runtime,
    source: &Source,
    names: &[String],
    overrides: &Overrides,
    identify: bool,
) -> Vec<Result<Forked>> {
    let results: Vec<Mutex<Option<Result<Forked>>>> =
        names.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(name) = names.get(index) else { break };
            let host_name = overrides.host_names.get(index).unwrap_or(name);
            let host_name = identify.then_some(host_name.as_str());
            let result = fork_one(runtime, source, name, overrides, host_name);
            let mut slot = results[index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *slot = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..names.len().min(AT_ONCE) {
            scope.spawn(work);
        }
        work();
    });
    let not_tried = || Err(ApiError::new(ErrorCode::Internal, "the fork was not tried"));
    results
        .into_iter()
        .map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner))
        .map(|result| result.unwrap_or_else(not_tried))
        .collect()
}

fn fork_one(
    runtime: &Runtime,
    source: &Source,
    name: &str,
    overrides: &Overrides,
    identify_as: Option<&str>,
) -> Result<Forked> {
    if !clone_api::validate::is_valid_name(name) {
        let message = format!("invalid VM name `{}`", name.escape_debug());
        return Err(ApiError::new(ErrorCode::InvalidConfig, message));
    }
    runtime.check_not_suspended(name)?;
    let start = Instant::now();
    let (vm, mut child) = match adopt(runtime, source, name, overrides)? {
        Some(vm) => (vm, None),
        None => start_cold(runtime, source, name, overrides)?,
    };
    let running = start.elapsed();
    let mut forked = Forked {
        name: name.to_owned(),
        pid: vm.process.pid,
        warm: child.is_none(),
        running_us: running.as_micros() as u64,
        identity_us: None,
        notices: vm.dir.notices(),
    };
    if let Some(host_name) = identify_as.filter(|_| source.has_agent) {
        match identity::give(&vm, host_name) {
            Ok(notices) => forked.notices.extend(notices),
            Err(error) => {
                // The log must be read before the directory is removed.
                let error = died(&vm, child.as_mut(), name).unwrap_or(error);
                // A clone without its own identity would be a duplicate of its template.
                end(runtime, &vm);
                if let Some(mut child) = child {
                    let _ = child.wait();
                }
                return Err(error);
            }
        }
        forked.identity_us = Some((start.elapsed() - running).as_micros() as u64);
    }
    if let Some(child) = child {
        reaper::adopt(child);
    }
    Ok(forked)
}

/// The error for a clone that has ended; `None` if it still runs. A clone that was a standby is not
/// a child of this process, so its exit status is not available.
fn died(vm: &RunningVm, child: Option<&mut Child>, name: &str) -> Option<ApiError> {
    // The sockets close before the process ends.
    if !vm.process.wait(Some(END_LIMIT)).ok()? {
        return None;
    }
    let status = child.and_then(|child| child.wait().ok());
    let exit_status = match status {
        Some(status) => match status.signal() {
            Some(signal) => format!("was killed by signal {signal}"),
            None => format!("ended with {status}"),
        },
        None => "ended".to_owned(),
    };
    Some(ApiError::new(
        ErrorCode::Internal,
        format!(
            "the clone `{name}` {exit_status} before it had its identity{}",
            last_words(&vm.dir)
        ),
    ))
}

/// Adopts a standby, if one can be used and there is one.
fn adopt(
    runtime: &Runtime,
    source: &Source,
    name: &str,
    overrides: &Overrides,
) -> Result<Option<RunningVm>> {
    let Some(template_id) = source
        .template_id
        .as_deref()
        .filter(|_| overrides.is_none() && !source.spec.observed)
    else {
        return Ok(None);
    };
    let Some(policy) = policy_of_standby(source, name, overrides)? else {
        return Ok(None);
    };
    let Some(vm) = runtime.claim(template_id, name)? else {
        return Ok(None);
    };
    let client = Client::new(vm.dir.control_socket()).with_timeout(ADOPTION_LIMIT);
    // The limits must be in force before the guest runs.
    let held = policy.map_or(Ok(()), |(egress, reach_host)| {
        hold(&vm, &egress, reach_host)
    });
    let adopted = held.and_then(|()| {
        client
            .adopt(name, runtime.required_jail())
            .map_err(|error| ApiError::internal(&error))
    });
    match adopted {
        Ok(()) => Ok(Some(vm)),
        Err(error) => {
            // The standby may have died when it was taken; a new clone is started instead.
            tracing::warn!(message = error.message, "a standby could not be adopted");
            end(runtime, &vm);
            Ok(None)
        }
    }
}

/// The egress policy to apply to a standby, which was made with the defaults, and whether it may reach
/// the host: none, or one policy for all of its interfaces. `None` if the overrides differ per
/// interface, which needs a VM that is started for them.
fn policy_of_standby(
    source: &Source,
    name: &str,
    overrides: &Overrides,
) -> Result<Option<Option<(Egress, bool)>>> {
    if overrides.egress.is_none() && overrides.reach_host != Some(true) {
        return Ok(Some(None));
    }
    let nets = source.clone_config(name, overrides)?.net;
    let mut policies = nets.iter().map(|net| (net.egress.clone(), net.reach_host));
    let policy = policies.next();
    let alike = policies.all(|other| Some(&other) == policy.as_ref());
    Ok(alike.then_some(policy))
}

fn start_cold(
    runtime: &Runtime,
    source: &Source,
    name: &str,
    overrides: &Overrides,
) -> Result<(RunningVm, Option<Child>)> {
    let plan = source.plan(name, overrides, false)?;
    let launched = start_or_abandon(runtime, plan, &source.spec.parent)?;
    let vm = RunningVm {
        dir: launched.dir,
        process: launched.process,
    };
    Ok((vm, Some(launched.child)))
}

/// Starts a standby of `source` as a child of this process, which ends with it.
pub(super) fn start_standby(runtime: &Runtime, source: &Source) -> Result<(VmDir, Process)> {
    let Some(template_id) = &source.template_id else {
        let message = "standbys are made of templates";
        return Err(ApiError::new(ErrorCode::Internal, message));
    };
    let name = Runtime::standby_name(template_id)?;
    let plan = source.plan(&name, &Overrides::default(), true)?;
    let launched = start_or_abandon(runtime, plan, &source.spec.parent)?;
    reaper::adopt(launched.child);
    Ok((launched.dir, launched.process))
}

/// Ends a clone and removes its resources.
pub fn end(runtime: &Runtime, vm: &RunningVm) {
    let ended = vm
        .process
        .signal(rustix::process::Signal::KILL)
        .and_then(|()| vm.process.wait(Some(ADOPTION_LIMIT)))
        .and_then(|_| runtime.sweep_one(&vm.dir));
    if let Err(error) = ended {
        tracing::warn!(message = error.message, "a clone that failed is left");
    }
}

/// Makes names for `count` clones: the given one, numbered if there are several, or one made from
/// `of`.
pub fn names(given: Option<&str>, of: &str, count: usize) -> Result<Vec<String>> {
    let stem = match given {
        Some(name) if count == 1 => return Ok(vec![name.to_owned()]),
        Some(name) => name.to_owned(),
        None => {
            let random = clone_base::random::hex::<2>();
            let random = random.map_err(|error| ApiError::internal(&error))?;
            let of: String = of.chars().take(30).collect();
            format!("{of}-{random}")
        }
    };
    if given.is_none() && count == 1 {
        return Ok(vec![stem]);
    }
    Ok((1..=count)
        .map(|number| format!("{stem}-{number}"))
        .collect())
}
