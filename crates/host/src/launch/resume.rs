//! Resumes a suspended VM, in a new process.

use std::time::Instant;

use clone_api::config::Egress;
use clone_api::{ApiError, ErrorCode};
use clone_start::SharedFile;
use clone_start::document::{ForkSpec, Origin};
use clone_start::error::{Result, failed};
use clone_template::Template;

use super::{Plan, identity, reaper, start_or_abandon};
use crate::runtime::{RunningVm, Runtime};
use crate::suspended::{Base, LOCK, MEMORY, RAN, STATE, SuspendedVm, own_file};

/// The number of threads that verify memory.
const VERIFIERS: usize = 2;

/// The destinations that the guest of a VM may send to.
#[derive(Debug, Clone)]
pub struct Reach {
    /// The networks.
    pub egress: Egress,
    /// Whether the host's own addresses are open.
    pub host: bool,
}

/// A VM that goes on.
#[derive(Debug, Clone)]
pub struct Resumed {
    /// The VM.
    pub vm: RunningVm,
    /// The time from the request until the guest ran, in microseconds.
    pub running_us: u64,
    /// The time from then until its clock was right, in microseconds; `None` without an agent.
    pub clock_us: Option<u64>,
    /// Notices for the owner.
    pub notices: Vec<String>,
}

/// Resumes `suspended` as the same VM: it keeps its identity, and its clock is set. With `reach`,
/// its guest may from now on send to these destinations only.
///
/// # Errors
/// Where the VM cannot be started; it then stays suspended.
pub fn resume(
    runtime: &Runtime,
    suspended: &SuspendedVm,
    reach: Option<&Reach>,
) -> Result<Resumed> {
    let start = Instant::now();
    let (dir, record) = (suspended.dir(), &suspended.record);
    let template = open_template(runtime, &record.base)?;
    let memory = clone_memory::Layer::open(open(suspended, MEMORY)?, MEMORY);
    let verified = memory.and_then(|layer| layer.verify(VERIFIERS));
    verified.map_err(|error| {
        let message = format!("the state of `{}` is damaged: {error}", record.config.name);
        ApiError::new(ErrorCode::InvalidConfig, message)
    })?;
    let mut parent = record.parent(dir, template.as_ref())?;
    let lock = SharedFile::named(dir.join(LOCK));
    parent.locks.push(lock);
    let prefetch = template.as_ref().map(Template::prefetch).transpose()?;
    let spec = ForkSpec {
        parent: parent.clone(),
        state: own_file(dir, STATE)?,
        prefetch: prefetch.flatten(),
        standby: false,
        observed: false,
        run_once: Some(SharedFile::named(dir.join(RAN))),
    };
    let mut config = record.config.clone();
    if let Some(reach) = reach {
        for net in &mut config.net {
            net.egress.clone_from(&reach.egress);
            net.reach_host = reach.host;
        }
    }
    let plan = Plan {
        config,
        origin: Origin::Fork(Box::new(spec)),
        former_network: record.network.clone(),
        incoming: false,
    };
    let launched = start_or_abandon(runtime, plan, &parent)?;
    let running = start.elapsed();
    let vm = RunningVm {
        dir: launched.dir,
        process: launched.process,
    };
    let mut notices = launched.notices;
    let mut clock_us = None;
    if record.has_agent {
        match identity::go_on(&vm, &record.network) {
            Ok(more) => {
                notices.extend(more);
                clock_us = Some((start.elapsed() - running).as_micros() as u64);
            }
            // The guest runs, and nothing of it may be lost because its agent is busy.
            Err(error) => notices.push(format!("the guest's clock was not set: {error}")),
        }
    }
    reaper::adopt(launched.child);
    Ok(Resumed {
        vm,
        running_us: running.as_micros() as u64,
        clock_us,
        notices,
    })
}

fn open_template(runtime: &Runtime, base: &Base) -> Result<Option<Template>> {
    let Base::Template { dir, id, .. } = base else {
        return Ok(None);
    };
    let template = Template::open(dir)?;
    if template.manifest().id != *id {
        let message = format!(
            "{} is another template than the VM was forked from",
            dir.display()
        );
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .advise(format!("bring back the template with the id {id}")));
    }
    template.ensure_verified(&runtime.verified())?;
    Ok(Some(template))
}

fn open(suspended: &SuspendedVm, name: &str) -> Result<std::fs::File> {
    let path = suspended.dir().join(name);
    std::fs::File::open(&path).map_err(failed("open", &path))
}
