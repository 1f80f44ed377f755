//! A controller of a large fleet: its real store, server and tasks, with simulated nodes in the same
//! process. It needs no guests.
//!
//! On SQLite, and on PostgreSQL where it is installed; there with one controller and with three, one
//! of which is killed.

mod execs;
mod load;
pub(crate) mod peers;
mod postgres;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use army::server::{Doors, SessionLimits};
use army_api::client::Client;
use army_api::keys::{CreateKey, Role};
use army_api::templates::Template;
use army_api::vms::VmMemory;
use army_controller::testing::{Postgres, Records, fleet_host, fleet_vm_id};
use army_controller::{Controller, Database};
use army_node_api::NodeApi;
use army_node_api::serve::{self, Limits, Stop};
use army_node_api::simulated::SimulatedNode;
use tokio::task::JoinHandle;

use crate::context::Context;
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str = "1,000 simulated hosts with 100,000 VMs; needs no guests";

/// How long all hosts may take until they have reported.
const SETTLED: Duration = Duration::from_secs(300);
/// The most execs at a time of one key.
const SESSIONS: usize = 16_000;
/// The template of VMs that are created.
const TEMPLATE: &str = "base";

/// How large the fleet is.
#[derive(Clone, Copy)]
struct Size {
    hosts: u32,
    vms: u32,
    /// VMs that have ended.
    ended: u32,
}

/// A controller, its loops and its API.
struct Server {
    controller: Arc<Controller>,
    records: Records,
    client: Client,
    /// The address of the API, and the key of its administrator.
    address: String,
    secret: String,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    async fn start(database: Database, nodes: &[Arc<SimulatedNode>]) -> Result<Self> {
        let records = Records::of(&database);
        let nodes = nodes
            .iter()
            .map(|it| -> Arc<dyn NodeApi> { Arc::<SimulatedNode>::clone(it) });
        let controller = Arc::new(Controller::of_simulated(database, nodes).await?);
        let term = Arc::clone(&controller).hold_term();
        let reconcile = Arc::clone(&controller).reconcile();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let sessions = SessionLimits {
            per_key: SESSIONS,
            per_tenant: SESSIONS,
            ..SessionLimits::default()
        };
        let doors = Doors {
            sessions,
            ..Doors::new(Stop::default().stopping())
        };
        let router = army::server::router_with(Arc::clone(&controller), doors);
        let server = serve::Server::new(listener, None, Limits::STRANGERS);
        let tasks = vec![
            tokio::spawn(async { drop(term.await) }),
            tokio::spawn(async { drop(reconcile.await) }),
            tokio::spawn(server.serve(router, Stop::default().stopping())),
        ];
        let admin = CreateKey::new("root", Role::Admin);
        let secret = controller.create_key(&admin).await?.secret;
        let client = Client::new(format!("http://{address}"), &secret)?;
        Ok(Self {
            controller,
            records,
            client,
            address,
            secret,
            tasks,
        })
    }

    /// Ends it, as a kill does.
    fn kill(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

pub(crate) fn run(context: &Context) -> Result<Record> {
    let size = match context.is_full() {
        true => Size {
            hosts: 1000,
            vms: 100_000,
            ended: 10_000_000,
        },
        false => Size {
            hosts: 1000,
            vms: 100_000,
            ended: 200_000,
        },
    };
    let mut record = Record::new(&[
        &format!(
            "{} simulated hosts with {} VMs, and {} VMs that have ended, in one process with the controllers and their clients.",
            size.hosts, size.vms, size.ended
        ),
        "Tick: the processor time that the process uses in a second without requests, in which each host reports once. The time that the simulated nodes take to make the reports is subtracted. PostgreSQL's processes are measured separately.",
        "Creates: from 16 connections, each of one VM, which is destroyed then. Page: GET /v1/vms of 1,000 VMs, to the last byte, read into the client's types. Event: from before a host is drained until a subscriber over HTTP has the event; with several controllers at another one.",
    ]);
    let tokio = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
    // A database of gigabytes is not put into memory.
    let state = context.out().join("fleet");
    let _ = std::fs::remove_dir_all(&state);
    std::fs::create_dir_all(&state)?;
    record.part("SQLite", |record| {
        let url = Database::sqlite_url(&state.join("army.db"));
        let run = Run {
            name: "SQLite",
            url: &url,
            controllers: 1,
            size,
            postgres: None,
        };
        tokio.block_on(run.measure(context, record))
    });
    let postgres = postgres::start()?;
    match &postgres {
        Some(postgres) => {
            for controllers in [1, 3] {
                let name = format!("PostgreSQL, {controllers}");
                record.part(&name, |record| {
                    let run = Run {
                        name: &name,
                        url: &postgres.create_database(&format!("fleet{controllers}"))?,
                        controllers,
                        size,
                        postgres: Some(postgres),
                    };
                    tokio.block_on(run.measure(context, record))
                });
            }
        }
        None => record
            .how
            .push("PostgreSQL is not installed, and was not measured.".to_owned()),
    }
    drop(postgres);
    let _ = std::fs::remove_dir_all(&state);
    Ok(record)
}

/// Measurements with one database and some controllers.
struct Run<'a> {
    name: &'a str,
    url: &'a str,
    controllers: usize,
    size: Size,
    postgres: Option<&'a Postgres>,
}

impl Run<'_> {
    fn figure(&self, what: &str, unit: &str, samples: Vec<f64>) -> Figure {
        Figure::new(&format!("{}: {what}", self.name), unit, samples)
    }

    fn ms(&self, what: &str, times: &[Duration]) -> Figure {
        Figure::ms(&format!("{}: {what}", self.name), times)
    }

    async fn measure(&self, context: &Context, record: &mut Record) -> Result<()> {
        let nodes = nodes(self.size);
        let servers = self.start(&nodes).await?;
        self.ticks(context, record, &nodes).await?;
        let pages = load::pages(&servers[0].client, context.samples(30, 200)).await?;
        record.add_with_limit(self.ms("page of VMs", &pages), 10.0, "at most 1");
        let last = servers.last().unwrap_or(&servers[0]);
        let events = load::events(&servers[0], last, context.samples(20, 100)).await?;
        let figure = self.ms("event at a subscriber", &events);
        record.add_with_limit(figure, 50.0, "at most 1");
        self.creates(context, record, &servers).await?;
        let memory = vec![load::memory_mib()?];
        record.add(self.figure("memory", "MiB", memory));
        if self.postgres.is_none() {
            let samples = context.samples(20, 100);
            execs::measure(record, &servers[0], &nodes, &context.scratch(""), samples).await?;
        }
        self.kill_one(record, &servers).await?;
        for server in &servers {
            server.kill();
        }
        Ok(())
    }

    /// Fills the database, and starts the controllers.
    async fn start(&self, nodes: &[Arc<SimulatedNode>]) -> Result<Vec<Server>> {
        let start = Instant::now();
        let database = Database::open(self.url).await?;
        let Size { hosts, vms, ended } = self.size;
        let records = Records::of(&database);
        records.fill(hosts, vms, ended).await?;
        let seconds = start.elapsed().as_secs();
        println!("   {}: the database was filled in {seconds} s", self.name);
        let mut servers = vec![Server::start(database, nodes).await?];
        for _ in 1..self.controllers {
            servers.push(Server::start(Database::open(self.url).await?, nodes).await?);
        }
        insert_template(&records, nodes).await?;
        let start = Instant::now();
        settle(&servers, nodes).await?;
        let seconds = start.elapsed().as_secs();
        println!(
            "   {}: every host had reported after {seconds} s",
            self.name
        );
        Ok(servers)
    }

    async fn ticks(
        &self,
        context: &Context,
        record: &mut Record,
        nodes: &[Arc<SimulatedNode>],
    ) -> Result<()> {
        let ticks = load::ticks(nodes, self.postgres, context.samples(10, 60)).await?;
        let own = ticks.iter().map(|it| it.own).collect();
        record.add_with_limit(self.figure("tick", "ms", own), 100.0, "at most 1");
        if self.postgres.is_some() {
            let postgres = ticks.iter().map(|it| it.postgres).collect();
            record.add(self.figure("tick, PostgreSQL", "ms", postgres));
        }
        Ok(())
    }

    async fn creates(
        &self,
        context: &Context,
        record: &mut Record,
        servers: &[Server],
    ) -> Result<()> {
        let limit = Duration::from_secs(context.samples(5, 20) as u64);
        let clients: Vec<Client> = servers.iter().map(|it| it.client.clone()).collect();
        let creates = load::creates(&clients, self.postgres, limit).await?;
        record.add(self.figure("creates", "1/s", vec![creates.rate]));
        record.add(self.ms("create", &creates.times));
        let each = |spent: f64| vec![spent / creates.rate];
        let own = each(creates.spent.own);
        record.add(self.figure("processor time of a create and an end", "ms", own));
        if self.postgres.is_some() {
            let postgres = each(creates.spent.postgres);
            record.add(self.figure("the same of PostgreSQL", "ms", postgres));
        }
        Ok(())
    }

    /// Kills the first controller, where there are others, and waits until they have its hosts.
    async fn kill_one(&self, record: &mut Record, servers: &[Server]) -> Result<()> {
        let [first, second, ..] = servers else {
            return Ok(());
        };
        first.kill();
        let moved = load::moved(&first.records, &second.records).await?;
        record.add_with_limit(
            self.ms("hosts of a killed controller", &[moved]),
            10_000.0,
            "at most 1",
        );
        Ok(())
    }
}

fn nodes(size: Size) -> Vec<Arc<SimulatedNode>> {
    let name = |number| fleet_host(number, size.hosts);
    let nodes: Vec<_> = (0..size.hosts)
        .map(|number| Arc::new(SimulatedNode::new(&name(number))))
        .collect();
    for number in 1..=size.vms {
        nodes[(number % size.hosts) as usize].add_vm(&fleet_vm_id(number));
    }
    for node in &nodes {
        node.set_memory(VmMemory {
            guest_bytes: 256 << 20,
            private_bytes: 5 << 20,
            shared_bytes: 40 << 20,
            swapped_bytes: 0,
        });
    }
    nodes
}

async fn insert_template(records: &Records, nodes: &[Arc<SimulatedNode>]) -> Result<()> {
    let template = Template {
        name: TEMPLATE.to_owned(),
        host: nodes[0].name().to_owned(),
        ..Template::default()
    };
    records.insert_template(&template).await?;
    for node in nodes {
        records.insert_copy(TEMPLATE, node.name()).await?;
    }
    Ok(())
}

/// Waits until each host has an owner, which has its reports.
async fn settle(servers: &[Server], nodes: &[Arc<SimulatedNode>]) -> Result<()> {
    let end = Instant::now() + SETTLED;
    loop {
        let owners = servers[0].records.hosts_by_owner().await?;
        let share = nodes.len().div_ceil(servers.len());
        let even = servers.iter().all(|server| {
            let own = owners.get(&server.records.controller_id());
            own.is_some_and(|own| own.len() <= share)
        });
        let ages: usize = servers
            .iter()
            .map(|it| it.controller.host_task_ages().len())
            .sum();
        if even && ages >= nodes.len() && nodes.iter().all(|it| it.reports_made() > 1) {
            // What follows from the first reports is done, too.
            tokio::time::sleep(Duration::from_secs(10)).await;
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < end, "the hosts have not all reported");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
