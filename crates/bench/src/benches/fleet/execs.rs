//! Many execs at once through one server: what others' calls take meanwhile, and what each costs.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use army_api::client::Client;
use army_api::vms::{Vm, VmFilter, VmPage};
use army_controller::testing::fleet_vm_id;
use army_node_api::simulated::SimulatedNode;
use axum::http::Method;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::UnixStream;

use super::peers::Peers;
use super::{Server, load};
use crate::record::{Figure, Ratio, Record};

/// The execs, where the process may open files for them.
const EXECS: u32 = 10_000;
/// The VMs that they are in.
const VMS: u32 = 1000;
/// The files that the process has open besides.
const OWN_FILES: u64 = 600;

/// The times of others' calls.
#[derive(Default)]
struct Others {
    list: Vec<Duration>,
    create: Vec<Duration>,
    get: Vec<Duration>,
}

impl Others {
    async fn measure(client: &Client, samples: usize) -> Result<Self> {
        let mut others = Self::default();
        let filter = VmFilter {
            limit: Some(100),
            ..VmFilter::default()
        };
        for _ in 0..samples {
            let start = Instant::now();
            let _: VmPage = client.get("/v1/vms", &filter).await?;
            others.list.push(start.elapsed());
            let start = Instant::now();
            let vm = load::create(client).await?;
            others.create.push(start.elapsed());
            client
                .plain(Method::DELETE, &format!("/v1/vms/{vm}"))
                .await?;
            let start = Instant::now();
            let path = format!("/v1/vms/{}", fleet_vm_id(1));
            let _: Vm = client.get(&path, &()).await?;
            others.get.push(start.elapsed());
        }
        Ok(others)
    }

    fn named(&self) -> [(&'static str, &[Duration]); 3] {
        [
            ("list of 100 VMs", &self.list),
            ("create", &self.create),
            ("get", &self.get),
        ]
    }
}

/// As many execs as this process may open files for: each takes one to its client and one to its agent.
fn count() -> Result<u32> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let most = limit.maximum.unwrap_or(u64::MAX);
    let most = most.saturating_sub(OWN_FILES) / 2;
    Ok(EXECS.min(u32::try_from(most).unwrap_or(EXECS)))
}

fn threads() -> Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// Measures with one server, whose hosts these nodes are.
pub(super) async fn measure(
    record: &mut Record,
    server: &Server,
    nodes: &[Arc<SimulatedNode>],
    folder: &Path,
    samples: usize,
) -> Result<()> {
    let execs = count()?;
    let usual = Others::measure(&server.client, samples).await?;
    let (threads_before, memory_before) = (threads()?, load::memory_mib()?);
    let socket = folder.join("agents");
    let mut peers = Peers::start(&socket, &server.address, &server.secret, execs, VMS)?;
    for number in 0..execs {
        let stream = UnixStream::connect(&socket).await.context("an agent")?;
        let vm = (number % VMS + 1) as usize;
        nodes[vm % nodes.len()].add_agent(stream);
    }
    let start = Instant::now();
    let mut peers = tokio::task::spawn_blocking(move || {
        peers.tell("start", "open")?;
        Ok::<_, anyhow::Error>(peers)
    })
    .await??;
    let opened = start.elapsed();
    let (threads_now, memory_now) = (threads()?, load::memory_mib()?);
    let name = |what: &str| format!("{execs} execs at once: {what}");
    let with_execs = Others::measure(&server.client, samples).await?;
    for ((call, usual), (_, now)) in usual.named().into_iter().zip(with_execs.named()) {
        let usual = Figure::ms(&name(&format!("{call} without them")), usual);
        let now = Figure::ms(&name(call), now);
        let ratio = Ratio {
            name: format!("{} / without them", now.name),
            value: now.p50 / usual.p50,
            goal: Some("at most 2".to_owned()),
        };
        record.add(usual);
        record.add(now);
        record.add_ratio(ratio);
    }
    let one = |what: &str, unit: &str, value: f64| Figure::new(&name(what), unit, vec![value]);
    record.add(one(
        "threads without them",
        "threads",
        threads_before as f64,
    ));
    record.add(one("threads", "threads", threads_now as f64));
    let each = (memory_now - memory_before) * 1024.0 / f64::from(execs);
    record.add(one("memory of each", "KiB", each));
    record.add(one(
        "until all have begun",
        "ms",
        opened.as_secs_f64() * 1e3,
    ));
    let start = Instant::now();
    tokio::task::spawn_blocking(move || peers.tell("end", "ended")).await??;
    let ended = start.elapsed().as_secs_f64() * 1e3;
    record.add(one("until all have ended after their clients", "ms", ended));
    Ok(())
}
