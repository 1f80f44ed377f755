//! A template of ours, forked and measured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Deadline};
use anyhow::{Context as _, Result};
use clone_api::Client;
use clone_api::control::{SnapshotTaken, StageTime, StartStage};
use clone_host::launch::fork::{Forked, Overrides, Source, fork};
use clone_host::launch::standby::{Standbys, train};
use clone_host::runtime::Runtime;
use clone_host::snapshot;
use clone_memory::ProcessUsage;
use clone_template::{Store, Template};

use super::counts::Counts;
use super::{LIMIT, REST};
use crate::context::Context;
use crate::guests::{CloneVm, Machine, exec, exec_on, told, wait_for_agent};
use crate::record::{Figure, Ratio, Record};

/// Where a fork comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A process is started.
    Start,
    /// One is ready.
    Standby,
}

/// A VM that was made a template.
pub(crate) struct ForkBench<'a> {
    pub(crate) runtime: Runtime,
    store: Store,
    name: &'a str,
    nominal_mib: u64,
    pub(super) base: CloneVm<'a>,
}

/// The same clock as stages are told by.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl<'a> ForkBench<'a> {
    /// Boots `machine`, and makes a template `name` of it.
    pub(crate) fn new(context: &'a Context, name: &'a str, machine: &Machine) -> Result<Self> {
        let base = CloneVm::start(context, &format!("base-{name}"), machine)?;
        wait_for_agent(&base)?;
        if machine.root {
            // Its agent answers long before all is up, and clones would go on booting.
            exec(&base, &["systemctl", "is-system-running", "--wait"])?;
            exec(&base, &["udevadm", "settle", "--timeout=600"])?;
        }
        let bench = Self {
            runtime: Runtime::at(&context.scratch("")).map_err(told)?,
            store: Store::at(context.scratch("templates")),
            name,
            nominal_mib: machine.memory_mib,
            base,
        };
        bench.snapshot(name, false)?;
        Ok(bench)
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        self.store.path(name).map_err(told)
    }

    fn open(&self) -> Result<Template> {
        self.store.open(self.name).map_err(told)
    }

    pub(crate) fn source(&self) -> Result<Source> {
        Source::template(&self.open()?, &self.runtime).map_err(told)
    }

    /// Records what first clones touch.
    pub(crate) fn train(&self) -> Result<()> {
        train(&self.runtime, &self.open()?).map_err(told)
    }

    pub(super) fn snapshot(&self, name: &str, diff: bool) -> Result<SnapshotTaken> {
        let vm = self.runtime.find(self.base.name()).map_err(told)?;
        let (_, taken) =
            snapshot::take(&self.runtime, &vm, &self.path(name)?, diff).map_err(told)?;
        Ok(taken)
    }

    /// Forks one after the other, and waits for each one's first reply.
    pub(super) fn series(
        &self,
        record: &mut Record,
        what: &str,
        way: Way,
        count: usize,
    ) -> Result<Vec<Forked>> {
        let standbys = match way {
            Way::Start => None,
            Way::Standby => Some(self.standbys(count)?),
        };
        let source = self.source()?;
        let (mut forked, mut replies) = (Vec::new(), Vec::new());
        let (mut stages, mut counts) = (Stages::default(), Counts::default());
        for number in 0..count {
            let name = format!("{}-{number}", what.replace([' ', ','], ""));
            let (start, start_ns) = (Instant::now(), monotonic_ns());
            let one = fork(&self.runtime, &source, &[name], &Overrides::default(), true);
            let one = one.into_iter().next().context("no fork")?.map_err(told)?;
            self.reply(&one.name)?;
            replies.push(start.elapsed());
            if way == Way::Start {
                counts.add(one.pid)?;
            }
            stages.add(start_ns, self.timeline(&one.name)?)?;
            forked.push(one);
        }
        // What is left of them would be ended with this; none is.
        drop(standbys);
        let from_standbys = forked.iter().all(|one| one.warm == (way == Way::Standby));
        anyhow::ensure!(from_standbys, "a fork was made in another way than asked");
        figures(record, what, &forked, &replies, stages);
        counts.record(record, what);
        Ok(forked)
    }

    /// So many standbys, which end with what is returned.
    pub(crate) fn standbys(&self, count: usize) -> Result<Standbys<'_>> {
        let id = self.open()?.manifest().id.clone();
        let mut standbys = Standbys::new(&self.runtime, self.source()?, id).map_err(told)?;
        standbys.fill(count).map_err(told)?;
        Ok(standbys)
    }

    /// The first exec of a clone.
    fn reply(&self, name: &str) -> Result<()> {
        let connection = Connection::open(
            &self.runtime.dir(name).vsock_socket(),
            Deadline::after(LIMIT),
        )?;
        exec_on(connection, &["true"])
            .map(drop)
            .with_context(|| name.to_owned())
    }

    fn timeline(&self, name: &str) -> Result<Vec<StageTime>> {
        let info = Client::new(self.runtime.dir(name).control_socket()).info()?;
        Ok(info.timeline)
    }

    /// All at once, from standbys.
    pub(super) fn burst(&self, record: &mut Record, count: usize) -> Result<()> {
        let standbys = self.standbys(count)?;
        let source = self.source()?;
        let names: Vec<String> = (0..count).map(|number| format!("b{number}")).collect();
        let (start, start_ns) = (Instant::now(), monotonic_ns());
        let forked = fork(&self.runtime, &source, &names, &Overrides::default(), false);
        let all = start.elapsed();
        drop(standbys);
        let forked = forked.into_iter().collect::<Result<Vec<_>, _>>();
        let forked = forked.map_err(told)?;
        let mut last = 0;
        for one in &forked {
            last = last.max(entered(&self.timeline(&one.name)?)?);
        }
        let what = format!("{count} at once from standbys");
        let entered = Duration::from_nanos(last.saturating_sub(start_ns));
        record.add(Figure::ms(&format!("{what}: all entered"), &[entered]));
        record.add(Figure::ms(&format!("{what}: all running"), &[all]));
        self.end(&forked)
    }

    /// What idle clones cost.
    pub(super) fn memory(&self, record: &mut Record, what: &str, clones: &[Forked]) -> Result<()> {
        std::thread::sleep(REST);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (mut own, mut guests, mut pss) = (Vec::new(), Vec::new(), Vec::new());
        for clone in clones {
            let usage = ProcessUsage::of(clone.pid)?;
            own.push(mib(usage.private + usage.swapped));
            pss.push(super::peers::pss_mib(clone.pid)?);
            let stats = Client::new(self.runtime.dir(&clone.name).control_socket()).stats()?;
            let pages = stats.memory.guest.context("no figures of its RAM")?;
            guests.push(mib(pages.private_bytes + pages.swapped_bytes));
        }
        let sum: f64 = own.iter().sum();
        let nominal = (self.nominal_mib * clones.len() as u64) as f64;
        let vmm = own.iter().zip(&guests).map(|(own, guest)| own - guest);
        record.add(Figure::new(
            &format!("{what}: VMM's own"),
            "MiB",
            vmm.collect(),
        ));
        record.add(Figure::new(&format!("{what}: guest's own"), "MiB", guests));
        record.add(Figure::new(&format!("{what}: own"), "MiB", own));
        record.add(Figure::new(&format!("{what}: PSS"), "MiB", pss));
        record.add_ratio(Ratio {
            name: format!("{what}: own memory of {} / their nominal", clones.len()),
            value: sum / nominal,
            goal: Some("at most 0.02 (1,000 in the footprint of 20)".to_owned()),
        });
        Ok(())
    }

    /// Ends clones.
    pub(crate) fn end(&self, clones: &[Forked]) -> Result<()> {
        for clone in clones {
            let vm = self.runtime.find(&clone.name).map_err(told)?;
            vm.process
                .signal(rustix::process::Signal::KILL)
                .and_then(|()| vm.process.wait(Some(LIMIT)))
                .and_then(|_| self.runtime.sweep_one(&vm.dir))
                .map_err(told)?;
        }
        Ok(())
    }
}

/// Stages of several forks, each in milliseconds since the one before.
#[derive(Default)]
struct Stages {
    entered: Vec<Duration>,
    each: BTreeMap<StartStage, Vec<f64>>,
}

impl Stages {
    fn add(&mut self, start_ns: u64, timeline: Vec<StageTime>) -> Result<()> {
        let since = entered(&timeline)?.saturating_sub(start_ns);
        self.entered.push(Duration::from_nanos(since));
        let mut before = start_ns;
        // A standby's first stages were before it was asked for.
        for reached in timeline.iter().filter(|one| one.monotonic_ns >= start_ns) {
            let took = reached.monotonic_ns.saturating_sub(before) as f64 / 1e6;
            self.each.entry(reached.stage).or_default().push(took);
            before = before.max(reached.monotonic_ns);
        }
        Ok(())
    }
}

fn entered(timeline: &[StageTime]) -> Result<u64> {
    let entered = timeline.iter().find(|at| at.stage == StartStage::Entered);
    let entered = entered.context("a guest that answers has not been entered")?;
    Ok(entered.monotonic_ns)
}

fn figures(
    record: &mut Record,
    what: &str,
    forked: &[Forked],
    replies: &[Duration],
    stages: Stages,
) {
    let micros = |us: u64| Duration::from_micros(us);
    let running: Vec<Duration> = forked.iter().map(|f| micros(f.running_us)).collect();
    let identity = forked.iter().filter_map(|f| f.identity_us).map(micros);
    let identity: Vec<Duration> = identity.collect();
    record.add(Figure::ms(&format!("{what}: entered"), &stages.entered));
    record.add(Figure::ms(&format!("{what}: running"), &running));
    record.add(Figure::ms(&format!("{what}: identity"), &identity));
    record.add(Figure::ms(&format!("{what}: reply"), replies));
    for (stage, times) in stages.each {
        let name = format!("{what}: stage {stage:?}").to_lowercase();
        record.add(Figure::new(&name, "ms", times));
    }
}
