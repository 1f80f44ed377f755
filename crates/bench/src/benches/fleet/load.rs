//! What is done with a fleet, and what it takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use army_api::client::Client;
use army_api::vms::{CreateVms, CreatedVms, VmFilter, VmPage};
use army_controller::testing::{Postgres, Records};
use army_node_api::simulated::SimulatedNode;
use axum::http::Method;
use futures_util::StreamExt;

use super::{Server, TEMPLATE, postgres};

/// The number of clients that create VMs at the same time.
const CLIENTS: usize = 16;

/// The processor time that was taken by a moment.
#[derive(Clone, Copy)]
pub(super) struct Processors {
    at: Instant,
    /// By this process.
    own: Duration,
    /// By PostgreSQL's processes.
    postgres: Duration,
}

/// The processor time for each second of some time, in milliseconds.
pub(super) struct Spent {
    pub(super) own: f64,
    pub(super) postgres: f64,
}

impl Processors {
    pub(super) fn now(postgres: Option<&Postgres>) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            own: own_time(),
            postgres: postgres.map_or(Ok(Duration::ZERO), postgres::processor_time)?,
        })
    }

    /// What was spent since `self`.
    fn until(&self, now: &Self) -> Spent {
        let seconds = now.at.duration_since(self.at).as_secs_f64();
        let spent =
            |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() * 1e3 / seconds;
        Spent {
            own: spent(self.own, now.own),
            postgres: spent(self.postgres, now.postgres),
        }
    }
}

/// The processor time of this process.
fn own_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

/// The processor time of each of so many seconds in which nothing happens, without that of the simulated
/// nodes.
pub(super) async fn ticks(
    nodes: &[Arc<SimulatedNode>],
    postgres: Option<&Postgres>,
    samples: usize,
) -> Result<Vec<Spent>> {
    let mut ticks = Vec::with_capacity(samples);
    for _ in 0..samples {
        let before = Processors::now(postgres)?;
        let reports: usize = nodes.iter().map(|it| it.reports_made()).sum();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = Processors::now(postgres)?;
        let reported: usize = nodes.iter().map(|it| it.reports_made()).sum();
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let rounds = (reported - reports) as f64 / seconds / nodes.len() as f64;
        let of_nodes = nodes_part(nodes).as_secs_f64() * rounds * 1e3;
        let spent = before.until(&now);
        ticks.push(Spent {
            own: (spent.own - of_nodes).max(0.0),
            ..spent
        });
    }
    Ok(ticks)
}

/// The processor time that the simulated nodes take for one report of each.
fn nodes_part(nodes: &[Arc<SimulatedNode>]) -> Duration {
    let before = own_time();
    for node in nodes {
        drop(node.present_report());
    }
    own_time().saturating_sub(before)
}

/// Pages of 1,000 VMs from different places of the list.
pub(super) async fn pages(client: &Client, samples: usize) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(samples);
    let mut filter = VmFilter::default();
    for _ in 0..samples {
        let start = Instant::now();
        let page: VmPage = client.get("/v1/vms", &filter).await?;
        times.push(start.elapsed());
        anyhow::ensure!(page.vms.len() == 1000, "a page of {} VMs", page.vms.len());
        filter.after = page.next;
    }
    Ok(times)
}

/// Events that happen at one server and are read at another.
pub(super) async fn events(at: &Server, read_at: &Server, samples: usize) -> Result<Vec<Duration>> {
    let events = read_at.client.events(None).await?;
    let mut events = std::pin::pin!(events);
    let host = super::fleet_host(0, 1);
    let mut times = Vec::with_capacity(samples);
    for turn in 0..samples {
        let draining = turn % 2 == 0;
        let kind = if draining {
            "host.draining"
        } else {
            "host.ready"
        };
        let start = Instant::now();
        let requester = army_controller::Requester::default();
        let started = at.controller.set_draining(&requester, &host, draining);
        let started = started.await?;
        loop {
            let event = events
                .next()
                .await
                .context("the stream of events ended")??;
            if event.kind == kind && event.subject == host {
                break;
            }
        }
        times.push(start.elapsed());
        at.controller.outcome(started, None).await?;
    }
    if samples % 2 == 1 {
        let requester = army_controller::Requester::default();
        let started = at.controller.set_draining(&requester, &host, false);
        at.controller.outcome(started.await?, None).await?;
    }
    Ok(times)
}

/// What came of creating and destroying VMs for some time.
pub(super) struct Creates {
    /// The creates of a second.
    pub(super) rate: f64,
    /// The time of each create.
    pub(super) times: Vec<Duration>,
    /// The processor time of each second.
    pub(super) spent: Spent,
}

/// VMs that are created and destroyed for some time.
pub(super) async fn creates(
    clients: &[Client],
    postgres: Option<&Postgres>,
    limit: Duration,
) -> Result<Creates> {
    let before = Processors::now(postgres)?;
    let start = Instant::now();
    let mut tasks = Vec::new();
    for number in 0..CLIENTS {
        let client = clients[number % clients.len()].clone();
        tasks.push(tokio::spawn(async move {
            let mut times = Vec::new();
            while start.elapsed() < limit {
                let begun = Instant::now();
                let vm = create(&client).await?;
                times.push(begun.elapsed());
                let path = format!("/v1/vms/{vm}");
                client.plain(Method::DELETE, &path).await?;
            }
            Ok::<_, anyhow::Error>(times)
        }));
    }
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    Ok(Creates {
        rate: times.len() as f64 / start.elapsed().as_secs_f64(),
        times,
        spent: before.until(&Processors::now(postgres)?),
    })
}

/// Creates a VM, and returns its id.
pub(super) async fn create(client: &Client) -> Result<String> {
    let request = CreateVms {
        template: TEMPLATE.to_owned(),
        count: 1,
        ..CreateVms::default()
    };
    let created: CreatedVms = client.create("/v1/vms", &request, None).await?;
    let vm = created.vms.into_iter().next();
    Ok(vm.context("no VM was created")?.id)
}

/// The memory of this process in MiB.
pub(super) fn memory_mib() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"));
    let kib = line.and_then(|it| it.split_whitespace().next());
    let kib: f64 = kib.context("there is no VmRSS")?.parse()?;
    Ok(kib / 1024.0)
}

/// Waits until others own the hosts of a controller that was killed.
pub(super) async fn moved(killed: &Records, other: &Records) -> Result<Duration> {
    let start = Instant::now();
    let killed = killed.controller_id();
    loop {
        let owners = other.hosts_by_owner().await?;
        if !owners.contains_key(&killed) && !owners.contains_key("") {
            return Ok(start.elapsed());
        }
        anyhow::ensure!(
            start.elapsed() < Duration::from_secs(60),
            "hosts have not moved"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
