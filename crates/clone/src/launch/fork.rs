//! Forking: clones of a template, or of a VM that goes on running.
//!
//! A clone is taken from the standbys where there are any, and else started; the way is told with
//! each result. Each child succeeds or fails by itself.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clone_api::config::{Egress, NetConfig, NetMode, Overlay};
use clone_api::control::SnapshotTaken;
use clone_api::{ApiError, Client, ErrorCode, VmConfig};
use rustix::process::{Pid, WaitOptions, waitpid};
use serde::Serialize;

use super::{identity, last_words, network, preflight, start_or_abandon};
use crate::error::Result;
use crate::process::start::{Fork, Origin};
use crate::runtime::{Parent, Process, RunningVm, Runtime, VmDir};
use crate::snapshot::{self, LiveLayers};
use crate::template::Template;

/// Forks that are started at once. More would only wait for each other's processors.
const AT_ONCE: usize = 8;
/// How long a standby may take to come to life.
const ADOPTION_LIMIT: Duration = Duration::from_secs(10);
/// How long a process whose sockets are closed may take to end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// What clones are made of.
#[derive(Debug)]
pub struct Source {
    /// The VM that was snapshotted.
    config: VmConfig,
    parent: Parent,
    state: PathBuf,
    prefetch: Option<PathBuf>,
    /// The template's id; none for a live fork, which has no standbys.
    template_id: Option<String>,
    /// Whether its guest has an agent to be told who it is.
    has_agent: bool,
    observed: bool,
    /// Kept from being removed until the clones have it.
    _held: Held,
}

#[derive(Debug)]
enum Held {
    // Boxed: a manifest is large.
    Template { _it: Box<Template> },
    Live { _it: LiveLayers },
}

impl Source {
    /// A template. It is verified unless it was, on this host.
    pub fn template(template: Template, runtime: &Runtime) -> Result<Self> {
        template.ensure_verified(runtime)?;
        let content = template.content();
        let prefetch = template.prefetch_path();
        Ok(Self {
            config: content.config.clone(),
            parent: Parent {
                template: Some(template.dir().to_owned()),
                memory: template.memory_paths(),
                disks: template.disks(),
                locks: vec![template.lock_path()],
            },
            state: template.state_path(),
            prefetch: prefetch.exists().then_some(prefetch),
            template_id: Some(template.manifest().id.clone()),
            has_agent: content.agent_version.is_some(),
            observed: false,
            _held: Held::Template {
                _it: Box::new(template),
            },
        })
    }

    /// The same for clones that are to tell which pages they touch. None of them is a standby.
    pub(super) fn observed(self) -> Self {
        Self {
            observed: true,
            ..self
        }
    }

    /// A running VM, as it is now. It goes on.
    pub fn live(runtime: &Runtime, vm: &RunningVm) -> Result<(Self, SnapshotTaken)> {
        let has_agent = snapshot::agent_version(vm).is_some();
        let (layers, taken) = snapshot::take_live(runtime, vm)?;
        let config = vm.dir.config()?;
        let source = Self {
            config,
            parent: layers.parent.clone(),
            state: layers.state.clone(),
            prefetch: None,
            template_id: None,
            has_agent,
            observed: false,
            _held: Held::Live { _it: layers },
        };
        Ok((source, taken))
    }

    /// The description of a clone.
    fn clone_config(&self, name: &str, overrides: &Overrides) -> Result<VmConfig> {
        let mut config = self.config.clone();
        name.clone_into(&mut config.name);
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
                // They are those of one guest.
                net.addresses.clear();
                // A template may ask for less than usual, not for more.
                net.connections = net
                    .connections
                    .map(|limit| limit.min(NetConfig::DEFAULT_CONNECTIONS));
            }
            if let Some(index) = config.net.iter().position(|net| net.mode == NetMode::Tap) {
                return Err(ApiError::new(
                    ErrorCode::InvalidConfig,
                    format!("interface {index} of the template is on a tap of its owner's"),
                )
                .advise("give each clone its own: --net tap=NAME"));
            }
        }
        if let Some(egress) = &overrides.egress {
            restrict(&mut config, egress);
        }
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
        Ok(config)
    }

    fn origin(&self, standby: bool) -> Origin {
        Origin::Fork(Fork {
            memory: self.parent.memory.clone(),
            state: self.state.clone(),
            locks: self.parent.locks.clone(),
            disks: self.parent.disks.clone(),
            standby,
            prefetch: self.prefetch.clone(),
            observed: self.observed,
            // Looked for here, where a process is started: a standby has it already.
            kernel: preflight::known_kernel(&self.config.kernel),
        })
    }
}

/// What is different in the clones.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// What the interfaces are connected to, each; as in the template where it is not given.
    pub net: Option<Vec<NetConfig>>,
    /// Files that keep the writes of a disk, by its place; without one they end with the clone.
    pub overlays: Vec<(usize, PathBuf)>,
    /// Whom the guests may send to; as in the template where it is not given.
    pub egress: Option<Egress>,
    /// What the guests call themselves, one for each clone; their names where there are none.
    pub host_names: Vec<String>,
}

impl Overrides {
    /// Whether a standby, which is made as the template says, will do.
    fn is_none(&self) -> bool {
        self.net.is_none() && self.overlays.is_empty()
    }
}

/// Holds all interfaces to `egress`.
fn restrict(config: &mut VmConfig, egress: &Egress) {
    for net in &mut config.net {
        net.egress.clone_from(egress);
    }
}

/// A clone that runs.
#[derive(Debug, Clone, Serialize)]
pub struct Forked {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Whether it was a standby.
    pub warm: bool,
    /// From the request to its guest running, in microseconds.
    pub running_us: u64,
    /// From then until it had its own identity, in microseconds; absent where it was given none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_us: Option<u64>,
    /// What its owner should know: what its host or its guest could not do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
}

/// Makes one clone of `source` for each of `names`, side by side; results in the same order.
///
/// With `identify` each is told who it is before it counts as done.
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
    let lost = || Err(ApiError::new(ErrorCode::Internal, "the fork was not tried"));
    results
        .into_iter()
        .map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner))
        .map(|result| result.unwrap_or_else(lost))
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
        let message = format!("`{}` is no name of a VM", name.escape_debug());
        return Err(ApiError::new(ErrorCode::InvalidConfig, message));
    }
    let start = Instant::now();
    let (vm, warm) = match adopt(runtime, source, name, overrides)? {
        Some(vm) => (vm, true),
        None => (start_cold(runtime, source, name, overrides)?, false),
    };
    let running = start.elapsed();
    let mut forked = Forked {
        name: name.to_owned(),
        pid: vm.process.pid,
        warm,
        running_us: running.as_micros() as u64,
        identity_us: None,
        notices: vm.dir.notices(),
    };
    if let Some(host_name) = identify_as.filter(|_| source.has_agent) {
        match identity::give(&vm, host_name) {
            Ok(notices) => forked.notices.extend(notices),
            Err(error) => {
                // Before its directory goes, and with it what it said.
                let error = died(&vm, name).unwrap_or(error);
                // Without its identity it would be its template's double.
                end(runtime, &vm);
                return Err(error);
            }
        }
        forked.identity_us = Some((start.elapsed() - running).as_micros() as u64);
    }
    Ok(forked)
}

/// How a clone ended that should run; none where it does.
fn died(vm: &RunningVm, name: &str) -> Option<ApiError> {
    // Its sockets go before it does.
    if !vm.process.wait(Some(END_LIMIT)).ok()? {
        return None;
    }
    let pid = Pid::from_raw(vm.process.pid as i32);
    // A standby is no child of ours, and cannot be asked.
    let status = waitpid(pid, WaitOptions::NOHANG).ok().flatten();
    let how = match status.map(|(_, status)| (status.terminating_signal(), status.exit_status())) {
        Some((Some(signal), _)) => format!("was killed by signal {signal}"),
        Some((_, Some(status))) => format!("ended with status {status}"),
        _ => "ended".to_owned(),
    };
    Some(ApiError::new(
        ErrorCode::Internal,
        format!(
            "the clone `{name}` {how} before it had its identity{}",
            last_words(&vm.dir)
        ),
    ))
}

/// Takes a standby, where one will do and there is one.
fn adopt(
    runtime: &Runtime,
    source: &Source,
    name: &str,
    overrides: &Overrides,
) -> Result<Option<RunningVm>> {
    let Some(template_id) = source
        .template_id
        .as_deref()
        .filter(|_| overrides.is_none() && !source.observed)
    else {
        return Ok(None);
    };
    let Some(vm) = runtime.claim(template_id, name)? else {
        return Ok(None);
    };
    let client = Client::new(vm.dir.control_socket()).with_timeout(ADOPTION_LIMIT);
    // Before it runs.
    let held = overrides.egress.as_ref().map_or(Ok(()), |egress| {
        network::restrict(&vm.dir, egress)?;
        vm.dir.change_config(|config| restrict(config, egress))
    });
    let adopted = held.and_then(|()| {
        client
            .adopt(name, runtime.required_jail())
            .map_err(|error| ApiError::internal(&error))
    });
    match adopted {
        Ok(()) => Ok(Some(vm)),
        Err(error) => {
            // It may have died in the moment it was taken: a new one will do as well.
            tracing::warn!(message = error.message, "a standby could not be adopted");
            end(runtime, &vm);
            Ok(None)
        }
    }
}

fn start_cold(
    runtime: &Runtime,
    source: &Source,
    name: &str,
    overrides: &Overrides,
) -> Result<RunningVm> {
    let config = source.clone_config(name, overrides)?;
    let launched = start_or_abandon(runtime, config, &source.origin(false), &source.parent)?;
    Ok(RunningVm {
        dir: launched.dir,
        process: launched.process,
    })
}

/// Starts a standby of `source`, a child of this process that ends with it.
pub(super) fn start_standby(runtime: &Runtime, source: &Source) -> Result<(VmDir, Process)> {
    let Some(template_id) = &source.template_id else {
        let message = "standbys are made of templates";
        return Err(ApiError::new(ErrorCode::Internal, message));
    };
    let name = Runtime::standby_name(template_id)?;
    let config = source.clone_config(&name, &Overrides::default())?;
    let launched = start_or_abandon(runtime, config, &source.origin(true), &source.parent)?;
    Ok((launched.dir, launched.process))
}

/// Ends a clone that is not wanted.
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

/// Names for `count` clones: the given one, with numbers where there are several, or one made of
/// the template's.
pub fn names(given: Option<&str>, of: &str, count: usize) -> Result<Vec<String>> {
    let stem = match given {
        Some(name) if count == 1 => return Ok(vec![name.to_owned()]),
        Some(name) => name.to_owned(),
        None => {
            let mut random = [0; 2];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(|error| ApiError::internal(&std::io::Error::from(error)))?;
            let of: String = of.chars().take(30).collect();
            format!("{of}-{:02x}{:02x}", random[0], random[1])
        }
    };
    if given.is_none() && count == 1 {
        return Ok(vec![stem]);
    }
    Ok((1..=count)
        .map(|number| format!("{stem}-{number}"))
        .collect())
}
