//! Live migrations between two hosts: how long the guest stands still, seen from another machine and
//! as the VMM tells it, how long all takes and how much is sent; beside QEMU's.

mod hosts;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Deadline};
use anyhow::{Context as _, Result};
use clone_api::Client;
use clone_api::config::{NetConfig, NetMode};
use clone_api::control::MigrationDone;
use clone_host::launch::fork::{Overrides, fork};
use clone_host::migrate::{self, Link, Options, Policy};
use clone_host::runtime::{RunningVm, Runtime};
use clone_template::Store;

use super::fork::ForkBench;
use crate::context::Context;
use crate::guests::{
    CloneVm, Guest, Machine, Qemu, QemuMove, exec, put_program, told, wait_for_agent,
};
use crate::record::{Figure, Record};
use hosts::{BRIDGE, Hosts, NAMESPACE, TAP, Ticks, address_script};

pub(crate) const ABOUT: &str =
    "live migrations between two hosts: downtime, time and bytes, beside QEMU's";

/// What the guest writes, in MiB a second, to how much memory.
const LOADS: [(u64, u64); 2] = [(0, 0), (10, 32)];
/// Between two ticks, in microseconds.
const TICK: &str = "1000";
/// How long a guest ticks before it is moved, which tells what gaps there are without a move, and after.
const REST: Duration = Duration::from_secs(2);
/// How long an agent may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How long a launcher waits for the other.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "Two hosts in one: the second is a network namespace. Each has a bridge, and a cable connects them. The guest sends a datagram each millisecond to the first host. Gap: the longest time between two of them, from the request to move until 2 s after its end; without a move: in the 2 s before.",
        "Pause: as the VMM tells it. For ours, from the request to stop the CPUs until the source hears that the guest runs at the destination; for QEMU, its `downtime`.",
        "Clone moves booted guests of 256 MiB with all that they have, and clones of a template that the other host has. QEMU moves the same guest, without a limit on its bandwidth.",
        "Load: a program that writes to each page of 32 MiB in turn, at the given rate.",
    ]);
    let hosts = Hosts::new()?;
    let ticks = Ticks::listen()?;
    let second = Runtime::at(&context.scratch("second")).map_err(told)?;
    let runs = context.samples(3, 10);
    for (rate, mib) in LOADS {
        let bench = Bench {
            context,
            hosts: &hosts,
            ticks: &ticks,
            second: &second,
            load: (rate, mib),
        };
        let load = match rate {
            0 => "idle".to_owned(),
            rate => format!("{rate} MiB/s written"),
        };
        let (booted, clones) = (
            format!("clone, {load}"),
            format!("clone of a template, {load}"),
        );
        let qemu = format!("QEMU, {load}");
        bench.measure(&mut record, &booted, runs, |name| bench.booted(name))?;
        bench.clones(&mut record, &clones, runs)?;
        bench.measure(&mut record, &qemu, runs, |_| bench.qemu())?;
        for ours in [&booted, &clones] {
            let gap = |name: &str| format!("{name}: gap");
            record.ratio(&gap(ours), &gap(&qemu), Some("at most 0.1 where idle"))?;
        }
    }
    Ok(record)
}

/// One move.
struct Moved {
    /// The longest gap without a move.
    still: Duration,
    gap: Duration,
    pause: Duration,
    total: Duration,
    bytes: u64,
}

struct Bench<'a> {
    context: &'a Context,
    hosts: &'a Hosts,
    ticks: &'a Ticks,
    second: &'a Runtime,
    load: (u64, u64),
}

impl Bench<'_> {
    fn measure(
        &self,
        record: &mut Record,
        what: &str,
        runs: usize,
        once: impl Fn(&str) -> Result<Moved>,
    ) -> Result<()> {
        let mut all = Vec::new();
        for number in 0..runs {
            all.push(once(&format!("m{number}")).with_context(|| what.to_owned())?);
        }
        let of = |get: fn(&Moved) -> Duration| -> Vec<Duration> { all.iter().map(get).collect() };
        for (name, times) in [
            ("gap", of(|it| it.gap)),
            ("gap without a move", of(|it| it.still)),
            ("pause", of(|it| it.pause)),
            ("total", of(|it| it.total)),
        ] {
            record.add(Figure::ms(&format!("{what}: {name}"), &times));
        }
        let sent = all.iter().map(|it| it.bytes as f64 / 1024.0).collect();
        record.add(Figure::new(&format!("{what}: sent"), "KiB", sent));
        Ok(())
    }

    /// Gives a guest its load and its ticks.
    fn load(&self, guest: &dyn Guest) -> Result<()> {
        put_program(guest, self.context)?;
        let (rate, mib) = self.load;
        let to = self.ticks.address();
        let mut script = format!(
            "{} && (setsid /bin/bench-guest net-tick {to} {TICK} >/dev/null 2>&1 </dev/null &)",
            address_script()
        );
        if rate > 0 {
            let write = format!(
                " && (setsid /bin/bench-guest write {mib} {rate} >/dev/null 2>&1 </dev/null &)"
            );
            script.push_str(&write);
        }
        exec(guest, &["sh", "-c", &script]).map(drop)
    }

    /// Moves by `move_it`, and looks at the ticks before, meanwhile and after.
    fn watch<T>(&self, move_it: impl FnOnce() -> Result<T>) -> Result<(T, Duration, Duration)> {
        self.ticks.forget();
        let begun = Instant::now();
        thread::sleep(REST);
        let still = self.ticks.longest_gap(begun)?;
        let asked = Instant::now();
        let moved = move_it()?;
        thread::sleep(REST);
        Ok((moved, still, self.ticks.longest_gap(asked)?))
    }

    fn booted(&self, name: &str) -> Result<Moved> {
        let machine = Machine {
            bridge: Some(BRIDGE.to_owned()),
            ..Machine::standard(self.context, "vmlinux")
        };
        let vm = CloneVm::start(self.context, name, &machine)?;
        wait_for_agent(&vm)?;
        self.load(&vm)?;
        let first = Runtime::at(&self.context.scratch("")).map_err(told)?;
        self.send(&first, name)
    }

    /// Moves a VM of ours from the first host to the second, and ends it there.
    fn send(&self, first: &Runtime, name: &str) -> Result<Moved> {
        let running = first.find(name).map_err(told)?;
        let store = Store::at(self.context.scratch("templates"));
        let (ours, theirs) = UnixStream::pair()?;
        let link = |stream: UnixStream| -> Result<Link> {
            let other = OwnedFd::from(stream.try_clone()?);
            Ok(Link::new(stream.into(), other, PATIENCE)?)
        };
        let (ours, theirs) = (link(ours)?, link(theirs)?);
        let receive = || {
            self.hosts.on_second(|| {
                let policy = Policy::default();
                migrate::receive(self.second, &store, theirs, &policy).map_err(told)
            })
        };
        let (moved, still, gap) = self.watch(|| {
            let asked = Instant::now();
            let (sent, arrived) = thread::scope(|scope| {
                let receiving = scope.spawn(receive);
                let sent = migrate::send(first, &running, ours, &Options::default());
                let arrived = receiving.join().expect("the second host does not panic");
                (sent, arrived)
            });
            let done: MigrationDone = sent.map_err(told)?;
            Ok((done, arrived?.vm, asked.elapsed()))
        })?;
        let (done, vm, total) = moved;
        end(self.second, &vm)?;
        Ok(Moved {
            still,
            gap,
            pause: Duration::from_micros(done.pause_us),
            total,
            bytes: done.bytes,
        })
    }

    /// Moves clones of one template. Each begins its load by itself.
    fn clones(&self, record: &mut Record, what: &str, runs: usize) -> Result<()> {
        let machine = Machine {
            bridge: Some(BRIDGE.to_owned()),
            ..Machine::standard(self.context, "vmlinux")
        };
        let name = format!("moved{}", self.load.0);
        let template = ForkBench::new(self.context, &name, &machine)?;
        // A template names no bridge of its host.
        let net = NetConfig {
            mode: NetMode::Bridge,
            bridge: Some(BRIDGE.to_owned()),
            ..NetConfig::default()
        };
        let overrides = Overrides {
            net: Some(vec![net]),
            ..Overrides::default()
        };
        let shares = std::cell::RefCell::new(Vec::new());
        self.measure(record, what, runs, |name| {
            let names = [name.to_owned()];
            let forked = fork(
                &template.runtime,
                &template.source()?,
                &names,
                &overrides,
                true,
            );
            forked
                .into_iter()
                .collect::<Result<Vec<_>, _>>()
                .map_err(told)?;
            let clone = Clone {
                vm: template.runtime.find(name).map_err(told)?,
            };
            self.load(&clone)?;
            let stats = Client::new(clone.vm.dir.control_socket()).stats()?;
            let moved = self.send(&template.runtime, name)?;
            let share = moved.bytes as f64 / stats.memory.private_bytes as f64;
            shares.borrow_mut().push(share);
            Ok(moved)
        })?;
        let name = format!("{what}: sent, of its own memory");
        record.add_with_limit(
            Figure::new(&name, "times", shares.into_inner()),
            1.2,
            "at most 1 where idle",
        );
        Ok(())
    }

    fn qemu(&self) -> Result<Moved> {
        let machine = Machine {
            tap: Some(TAP.to_owned()),
            ..Machine::standard(self.context, "vmlinux")
        };
        let source: Qemu = QemuMove::start(self.context, &machine)?;
        wait_for_agent(&source)?;
        self.load(&source)?;
        let (moved, still, gap) =
            self.watch(|| QemuMove::run(self.context, &machine, NAMESPACE))?;
        drop(source);
        drop(moved.arrived);
        Ok(Moved {
            still,
            gap,
            pause: moved.downtime,
            total: moved.total,
            bytes: moved.bytes,
        })
    }
}

/// A clone, which was forked through the library.
struct Clone {
    vm: RunningVm,
}

impl Guest for Clone {
    fn connect(&self) -> Result<Connection> {
        let path = self.vm.dir.vsock_socket();
        Ok(Connection::open(&path, Deadline::after(LIMIT))?)
    }

    fn pid(&self) -> u32 {
        self.vm.process.pid
    }
}

/// Ends a VM of ours.
fn end(runtime: &Runtime, vm: &RunningVm) -> Result<()> {
    vm.process
        .signal(rustix::process::Signal::KILL)
        .and_then(|()| vm.process.wait(Some(LIMIT)))
        .and_then(|_| runtime.sweep_one(&vm.dir))
        .map(drop)
        .map_err(told)
}
