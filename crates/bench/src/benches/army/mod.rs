//! What Army adds to what it is made of: to an exec by the agent's connection, to a fork by the
//! library, and what many clients at once do to it.
//!
//! Its server runs in this process, as `army dev` runs it, and is asked over TCP; [`rig`] sets it up.
//! Each layer is asked in turn, so that what disturbs one disturbs all.

mod rig;

use std::time::{Duration, Instant};

use agent_proto::client::{ByteLimit, Connection, Deadline};
use agent_proto::messages::Exec as AgentExec;
use anyhow::{Context as _, Result};
use army_api::client::{Client, ClientError};
use army_api::exec::{Exec, ExecResult};
use army_api::vms::{CreateVms, CreatedVms, ForkTimes, Vm};
use army_controller::Requester;
use army_node_api::requests::VmSpec;
use clone_host::launch::fork::{Overrides, fork};
use futures_util::future::join_all;

use crate::context::Context;
use crate::guests::{exec_on, told};
use crate::record::{Figure, Ratio, Record};

pub(super) use rig::Server;
use rig::{Rig, TEMPLATE};

pub(crate) const ABOUT: &str =
    "Army's own time: exec and create beside what they are made of; bursts of creates";

/// How long an agent may take.
const LIMIT: Duration = Duration::from_secs(60);
/// The layers of an exec, from the guest outwards.
const EXEC_LAYERS: [&str; 3] = ["agent", "node", "API"];
/// The layers of a create, likewise.
const CREATE_LAYERS: [&str; 4] = ["library", "node", "controller", "API"];

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "`army dev`'s server in the measuring process, with SQLite in memory (tmpfs), asked over TCP on the loopback by a client that keeps its connection; supervision and reconciliation run beside it.",
        "Exec of `true`. Agent: by its connection, as `clone exec` does it. Node: the same through Army's node, which notes the use. API: by a request, with key, store and JSON. The layers take turns; `Army's own` is, of each turn, the API's time less the agent's.",
        "Create of one VM, until it has its identity. Library: the function behind `clone fork`. Node: with its journal. Controller: with placement and the store. API: by a request. The layers take turns, from standbys that were all there before the first one, and then without any; `Army's own` is the API's time less the library's, of each turn.",
        "Burst: so many connections, each of which asks for one VM at the same moment. What is not made must be a 429 with Retry-After; afterwards each VM that was made must answer an exec.",
    ]);
    let rig = Rig::new(context)?;
    execs(&rig, &mut record, context.samples(100, 500))?;
    let count = context.samples(10, 30);
    creates(&rig, &mut record, "standby", count)?;
    creates(&rig, &mut record, "started", count)?;
    burst(&rig, &mut record, 100)?;
    if context.is_full() {
        burst(&rig, &mut record, 1000)?;
    }
    Ok(record)
}

fn execs(rig: &Rig<'_>, record: &mut Record, count: usize) -> Result<()> {
    let vm = rig.create("exec")?;
    let socket = rig.vm_dir(&vm.id).vsock_socket();
    let mut times = [const { Vec::new() }; EXEC_LAYERS.len()];
    let mut handler = Vec::new();
    for turn in 0..=count {
        let start = Instant::now();
        exec_on(
            Connection::open(&socket, Deadline::after(LIMIT))?,
            &["true"],
        )?;
        let agent = start.elapsed();
        let start = Instant::now();
        rig.wait(node_exec(rig, &vm.id))?;
        let node = start.elapsed();
        let start = Instant::now();
        let result = rig.wait(exec(&rig.client, &vm.id))?;
        let api = start.elapsed();
        // The first turn warms up connections and caches.
        if turn > 0 {
            for (times, time) in times.iter_mut().zip([agent, node, api]) {
                times.push(time);
            }
            handler.push(Duration::from_micros(result.took_us));
        }
    }
    layers(record, "exec", &EXEC_LAYERS, &times);
    record.add(Figure::ms("exec: API, within its handler", &handler));
    record.ratio("exec: API", "exec: agent", None)?;
    own(record, "exec", &times[2], &times[0], 1.0);
    rig.destroy(&vm)
}

/// An exec of `true` through Army's node.
async fn node_exec(rig: &Rig<'_>, vm: &str) -> Result<()> {
    let connection = rig.node.agent(vm, Deadline::after(LIMIT)).await?;
    let exec = AgentExec {
        command: vec!["true".to_owned()],
        ..AgentExec::default()
    };
    let running = connection.exec(exec).await?.streaming();
    let collected = running.collect(ByteLimit::new(1 << 20)).await?;
    anyhow::ensure!(collected.exited.code == Some(0), "`true` in the guest");
    Ok(())
}

fn creates(rig: &Rig<'_>, record: &mut Record, kind: &str, count: usize) -> Result<()> {
    let warm = kind == "standby";
    let standbys = match warm {
        true => Some(rig.forks.standbys((count + 1) * CREATE_LAYERS.len())?),
        false => None,
    };
    let mut times = [const { Vec::new() }; CREATE_LAYERS.len()];
    let mut placements = Vec::new();
    for turn in 0..=count {
        let (durations, placement) = create_turn(rig, kind, turn, warm)?;
        if turn > 0 {
            for (times, time) in times.iter_mut().zip(durations) {
                times.push(time);
            }
            placements.push(placement);
        }
    }
    drop(standbys);
    let what = format!("create, {kind}");
    layers(record, &what, &CREATE_LAYERS, &times);
    let name = format!("{what}: checks, placement, store");
    record.add(Figure::ms(&name, &placements));
    let (ours, theirs) = (format!("{what}: API"), format!("{what}: library"));
    record.ratio(&ours, &theirs, None)?;
    own(record, &what, &times[3], &times[0], 2.0);
    Ok(())
}

/// One VM by each layer, and how long placement took for the last.
fn create_turn(
    rig: &Rig<'_>,
    kind: &str,
    turn: usize,
    warm: bool,
) -> Result<([Duration; CREATE_LAYERS.len()], Duration)> {
    let source = rig.forks.source()?;
    let name = format!("{kind}-lib-{turn}");
    let start = Instant::now();
    let names = std::slice::from_ref(&name);
    let forked = fork(
        &rig.forks.runtime,
        &source,
        names,
        &Overrides::default(),
        true,
    );
    let library = start.elapsed();
    let forked = forked
        .into_iter()
        .next()
        .context("no fork")?
        .map_err(told)?;
    anyhow::ensure!(
        forked.warm == warm,
        "the library's fork was of another kind"
    );
    rig.forks.end(&[forked])?;

    let id = format!("{kind}{turn}");
    let entry = VmSpec::new(id.clone(), 1, format!("node-{id}"));
    let start = Instant::now();
    let made = rig.node.create(TEMPLATE, &[entry]);
    let node = start.elapsed();
    let made = made.into_iter().next().context("no VM")??;
    anyhow::ensure!(made.warm == warm, "the node's fork was of another kind");
    rig.node.destroy(&id, "measured")?;
    rig.node.forget(&[id]);

    let asked = CreateVms {
        template: TEMPLATE.to_owned(),
        count: 1,
        ..CreateVms::default()
    };
    let requester = Requester {
        tenant: "root".to_owned(),
        ..Requester::default()
    };
    let start = Instant::now();
    let made = rig.wait(async {
        Ok(rig
            .controller
            .create_and_wait(&requester, asked.clone())
            .await?)
    })?;
    let controller = start.elapsed();
    rig.destroy(made.vms.first().context("the controller created no VM")?)?;
    let start = Instant::now();
    let made: CreatedVms =
        rig.wait(async { Ok(rig.client.create("/v1/vms", &asked, None).await?) })?;
    let api = start.elapsed();
    let vm = one(&made)?;
    let times = vm.fork.context("a VM without its times")?;
    anyhow::ensure!(times.warm == warm, "the API's fork was of another kind");
    rig.destroy(vm)?;
    let placement = Duration::from_micros(times.placement_us);
    Ok(([library, node, controller, api], placement))
}

/// How one of many connections fared.
enum Fared {
    Made(Box<Vm>, Duration),
    Refused(String, Duration),
}

fn burst(rig: &Rig<'_>, record: &mut Record, count: usize) -> Result<()> {
    let clients = (0..count).map(|_| rig.client());
    let clients = clients.collect::<Result<Vec<Client>>>()?;
    let start = Instant::now();
    let fared = rig.wait(async {
        let all = clients
            .iter()
            .enumerate()
            .map(|(number, client)| async move {
                let asked = CreateVms {
                    template: TEMPLATE.to_owned(),
                    count: 1,
                    name: Some(format!("burst-{count}-{number}")),
                    ..CreateVms::default()
                };
                let answer = client.create::<CreatedVms>("/v1/vms", &asked, None).await;
                fared(answer, start.elapsed())
            });
        join_all(all).await.into_iter().collect::<Result<Vec<_>>>()
    })?;
    let (mut made, mut refused, mut vms) = (Vec::new(), Vec::new(), Vec::new());
    for fared in fared {
        match fared {
            Fared::Made(vm, time) => {
                vms.push(*vm);
                made.push(time);
            }
            Fared::Refused(reason, time) => {
                println!("   refused after {} ms: {reason}", time.as_millis());
                refused.push(time);
            }
        }
    }
    anyhow::ensure!(!made.is_empty(), "no VM was made of {count}");
    // Each is there, and its own.
    for vm in &vms {
        rig.wait(exec(&rig.client, &vm.id))
            .with_context(|| format!("{} of the burst does not answer", vm.name))?;
    }
    for vm in &vms {
        rig.destroy(vm)?;
    }
    let what = format!("{count} creates from {count} connections");
    record.add(Figure::ms(&format!("{what}: made after"), &made));
    stages(record, &what, &vms);
    if !refused.is_empty() {
        record.add(Figure::ms(&format!("{what}: 429 after"), &refused));
    }
    record.add_ratio(Ratio {
        name: format!("{what}: made"),
        value: made.len() as f64 / count as f64,
        goal: Some("1 where there is room for all".to_owned()),
    });
    Ok(())
}

/// What the answers say of their stages.
fn stages(record: &mut Record, what: &str, vms: &[Vm]) {
    let times = vms.iter().filter_map(|vm| vm.fork);
    let times: Vec<ForkTimes> = times.collect();
    let mut add = |stage: &str, of: &dyn Fn(&ForkTimes) -> u64| {
        let times: Vec<Duration> = times
            .iter()
            .map(|it| Duration::from_micros(of(it)))
            .collect();
        record.add(Figure::ms(&format!("{what}: {stage}"), &times));
    };
    add("placement", &|it| it.placement_us);
    add("guest runs", &|it| it.running_us);
    add("identity", &|it| it.identity_us);
    add("all within the server", &|it| it.total_us);
}

fn fared(answer: Result<CreatedVms, ClientError>, time: Duration) -> Result<Fared> {
    match answer {
        Ok(made) => Ok(Fared::Made(Box::new(one(&made)?.clone()), time)),
        Err(ClientError::Refused(problem))
            if problem.status == 429 && problem.retry_after_s.is_some() =>
        {
            Ok(Fared::Refused(problem.to_string(), time))
        }
        Err(error) => Err(error).context("neither a VM nor a 429 that says when to try again"),
    }
}

fn one(made: &CreatedVms) -> Result<&Vm> {
    if let Some(failure) = made.failures.first() {
        anyhow::bail!("{}: {}", failure.name, failure.problem);
    }
    made.vms.first().context("the answer has no VM")
}

async fn exec(client: &Client, vm: &str) -> Result<ExecResult> {
    let asked = Exec {
        command: vec!["true".to_owned()],
        ..Exec::default()
    };
    let path = format!("/v1/vms/{vm}/exec");
    let result: ExecResult = client.create(&path, &asked, None).await?;
    anyhow::ensure!(result.exit_code == Some(0), "`true` failed: {result:?}");
    Ok(result)
}

fn layers(record: &mut Record, what: &str, names: &[&str], times: &[Vec<Duration>]) {
    for (name, times) in names.iter().zip(times) {
        record.add(Figure::ms(&format!("{what}: {name}"), times));
    }
}

/// What Army adds, turn by turn, and its median over the goal.
fn own(record: &mut Record, what: &str, ours: &[Duration], theirs: &[Duration], goal_ms: f64) {
    let added = ours.iter().zip(theirs);
    let added = added.map(|(ours, theirs)| (ours.as_secs_f64() - theirs.as_secs_f64()) * 1e3);
    let figure = Figure::new(&format!("{what}: Army's own"), "ms", added.collect());
    record.add_with_limit(figure, goal_ms, "at most 1, on hardware");
}
