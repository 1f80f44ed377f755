//! Forks, from a client that stays up: how long until a clone runs and answers, what it costs in
//! memory, and what a live fork and a difference cost the VM.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Running};
use agent_proto::messages::Exec;
use anyhow::{Context as _, Result, anyhow};
use clone::launch::fork::{Forked, Overrides, Source, fork};
use clone::launch::standby::{Standbys, train};
use clone::runtime::Runtime;
use clone::snapshot;
use clone::template::{Store, Template};
use clone_memory::ProcessUsage;

use crate::context::Context;
use crate::guests::{CloneVm, Machine, exec, wait_for_agent};
use crate::record::{Figure, Ratio, Record};

pub(crate) const ABOUT: &str =
    "forks, started and from standbys: to running, to the first exec's reply; memory; live fork";

/// How long an agent may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long clones rest before their memory is looked at.
const REST: Duration = Duration::from_secs(10);
/// What the guest changes between snapshots, in MiB for each second.
const DIRTY_RATES: [u32; 3] = [0, 4, 32];

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "A tiny guest of 256 MiB with vsock, balloon and rng is booted once and made a template; each fork is asked for by a process that stays up and forks through the same code as `clone fork`.",
        "Running: from the request until the process has let its vCPUs run. Identity: until its agent has taken name, machine id, seed and clock. Reply: until an exec of `true` on a new connection has ended.",
        "Started: a new process for each clone. Standby: one that was ready, taken one by one. First: without the record of what clones touch; the others with it.",
        "Memory: what the kernel counts as anonymous and swapped of the clone's process (so the VMM's own memory, too) after 10 s of rest.",
        "Live fork and difference: of a guest that writes random pages at the given rate.",
    ]);
    let bench = ForkBench::new(context)?;
    let count = context.samples(10, 30);
    let first = bench.series(&mut record, "started, first", "f", count.min(10))?;
    bench.end(&first)?;
    train(&bench.runtime, &bench.open()?).map_err(told)?;
    let started = bench.series(&mut record, "started", "s", count)?;
    bench.end(&started)?;
    let warm = bench.warm(&mut record, count)?;
    bench.memory(&mut record, &warm)?;
    bench.end(&warm)?;
    bench.burst(&mut record, context.samples(10, 100))?;
    bench.live(&mut record, context.samples(3, 5))?;
    Ok(record)
}

struct ForkBench<'a> {
    runtime: Runtime,
    store: Store,
    base: CloneVm<'a>,
}

fn told(error: clone_api::ApiError) -> anyhow::Error {
    anyhow!("{}", error.message)
}

impl<'a> ForkBench<'a> {
    fn new(context: &'a Context) -> Result<Self> {
        let base = CloneVm::start(context, "base", &Machine::standard(context, "vmlinux"))?;
        wait_for_agent(&base)?;
        let runtime = Runtime::at(&context.scratch("")).map_err(told)?;
        let store = Store::at(context.scratch("templates"));
        let bench = Self {
            runtime,
            store,
            base,
        };
        bench.snapshot("base", false)?;
        Ok(bench)
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        self.store.path(name).map_err(told)
    }

    fn open(&self) -> Result<Template> {
        self.store.open("base").map_err(told)
    }

    fn source(&self) -> Result<Source> {
        Source::template(self.open()?, &self.runtime).map_err(told)
    }

    fn snapshot(&self, name: &str, diff: bool) -> Result<clone_api::control::SnapshotTaken> {
        let vm = self.runtime.find(self.base.name()).map_err(told)?;
        let (_, taken) =
            snapshot::take(&self.runtime, &vm, &self.path(name)?, diff).map_err(told)?;
        Ok(taken)
    }

    /// Forks one after the other, and waits for each one's first reply.
    fn series(
        &self,
        record: &mut Record,
        what: &str,
        stem: &str,
        count: usize,
    ) -> Result<Vec<Forked>> {
        let source = self.source()?;
        let mut forked = Vec::new();
        let mut replies = Vec::new();
        for number in 0..count {
            let name = format!("{stem}{number}");
            let start = Instant::now();
            let one = fork(&self.runtime, &source, &[name], &Overrides::default(), true);
            forked.push(one.into_iter().next().context("no fork")?.map_err(told)?);
            self.reply(&forked[number].name)?;
            replies.push(start.elapsed());
        }
        Self::figures(record, what, &forked, &replies);
        Ok(forked)
    }

    fn figures(record: &mut Record, what: &str, forked: &[Forked], replies: &[Duration]) {
        let micros = |us: u64| Duration::from_micros(us);
        let running: Vec<Duration> = forked.iter().map(|f| micros(f.running_us)).collect();
        let identity = forked.iter().filter_map(|f| f.identity_us).map(micros);
        let identity: Vec<Duration> = identity.collect();
        record.add(Figure::ms(&format!("{what}: running"), &running));
        if !identity.is_empty() {
            record.add(Figure::ms(
                &format!("{what}: identity, from running"),
                &identity,
            ));
        }
        record.add(Figure::ms(&format!("{what}: reply"), replies));
    }

    /// The first exec of a clone.
    fn reply(&self, name: &str) -> Result<()> {
        let connection = Connection::open(&self.runtime.dir(name).vsock_socket(), LIMIT)?;
        let exec = Exec {
            command: vec!["true".to_owned()],
            ..Exec::default()
        };
        let (exited, ..) = connection.exec(exec).and_then(Running::collect)?;
        anyhow::ensure!(exited.code == Some(0), "`true` failed in {name}");
        Ok(())
    }

    fn warm(&self, record: &mut Record, count: usize) -> Result<Vec<Forked>> {
        let id = self.open()?.manifest().id.clone();
        let mut standbys = Standbys::new(&self.runtime, self.source()?, id).map_err(told)?;
        standbys.fill(count).map_err(told)?;
        let forked = self.series(record, "standby", "w", count)?;
        anyhow::ensure!(forked.iter().all(|one| one.warm), "a fork took no standby");
        Ok(forked)
    }

    /// All at once, from standbys.
    fn burst(&self, record: &mut Record, count: usize) -> Result<()> {
        let id = self.open()?.manifest().id.clone();
        let source = self.source()?;
        let mut standbys = Standbys::new(&self.runtime, self.source()?, id).map_err(told)?;
        standbys.fill(count).map_err(told)?;
        let names: Vec<String> = (0..count).map(|number| format!("b{number}")).collect();
        let start = Instant::now();
        let forked = fork(&self.runtime, &source, &names, &Overrides::default(), false);
        let all = start.elapsed();
        let forked = forked.into_iter().collect::<Result<Vec<_>, _>>();
        record.add(Figure::ms(
            &format!("{count} at once from standbys: all running"),
            &[all],
        ));
        self.end(&forked.map_err(told)?)
    }

    fn memory(&self, record: &mut Record, clones: &[Forked]) -> Result<()> {
        std::thread::sleep(REST);
        let mut private = Vec::new();
        for clone in clones {
            let usage = ProcessUsage::of(clone.pid)?;
            private.push((usage.private + usage.swapped) as f64 / f64::from(1 << 20));
        }
        let sum: f64 = private.iter().sum();
        let nominal = 256.0 * clones.len() as f64;
        record.add(Figure::new("memory of an idle clone's own", "MiB", private));
        record.ratios.push(Ratio {
            name: format!("own memory of {} idle clones / their nominal", clones.len()),
            value: sum / nominal,
            goal: Some("at most 0.02 (1,000 in the footprint of 20)".to_owned()),
        });
        Ok(())
    }

    fn live(&self, record: &mut Record, runs: usize) -> Result<()> {
        for rate in DIRTY_RATES {
            self.dirty(rate)?;
            let (mut pauses, mut copied) = (Vec::new(), Vec::new());
            for number in 0..runs {
                let vm = self.runtime.find(self.base.name()).map_err(told)?;
                let (source, taken) = Source::live(&self.runtime, &vm).map_err(told)?;
                let names = [format!("l{rate}-{number}")];
                let forked = fork(&self.runtime, &source, &names, &Overrides::default(), true);
                let forked = forked.into_iter().collect::<Result<Vec<_>, _>>();
                self.end(&forked.map_err(told)?)?;
                pauses.push(Duration::from_micros(taken.times.pause_us));
                copied.push(taken.times.last_copy_bytes as f64 / 1024.0);
            }
            let what = format!("live fork, {rate} MiB/s written");
            record.add(Figure::ms(&format!("{what}: pause"), &pauses));
            record.add(Figure::new(&format!("{what}: copied in it"), "KiB", copied));
        }
        self.dirty(0)?;
        let (mut sizes, mut times) = (Vec::new(), Vec::new());
        self.snapshot("full", false)?;
        for number in 0..runs {
            std::thread::sleep(Duration::from_secs(1));
            let start = Instant::now();
            let taken = self.snapshot(&format!("diff{number}"), true)?;
            times.push(start.elapsed());
            sizes.push(taken.memory_bytes as f64 / 1024.0);
        }
        record.add(Figure::new(
            "difference of an idle guest: memory",
            "KiB",
            sizes,
        ));
        record.add(Figure::ms("difference of an idle guest: time", &times));
        Ok(())
    }

    /// Has the guest write so many MiB each second from now on.
    fn dirty(&self, rate: u32) -> Result<()> {
        let stop = "[ -f /run/writer ] && kill $(cat /run/writer); rm -f /run/writer";
        exec(&self.base, &["sh", "-c", &format!("{stop}; true")])?;
        if rate > 0 {
            let write = format!(
                "(while :; do dd if=/dev/zero of=/run/dirty bs=64k count={} conv=notrunc 2>/dev/null; \
                 usleep 100000; done) >/dev/null 2>&1 </dev/null & echo $! > /run/writer",
                rate * 16 / 10
            );
            exec(&self.base, &["sh", "-c", &write])?;
        }
        Ok(())
    }

    fn end(&self, clones: &[Forked]) -> Result<()> {
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
