//! A controller of a large fleet: its real store, server and tasks, with simulated nodes in the same
//! process. It needs no guests.
//!
//! On SQLite, and on PostgreSQL where it is installed; there with one controller and with three, one
//! of which is killed.

mod load;
mod postgres;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use army_api::client::Client;
use army_api::keys::{CreateKey, Role};
use army_api::templates::Template;
use army_api::vms::VmMemory;
use army_controller::testing::{Records, fleet_host, fleet_vm_id};
use army_controller::{Controller, Database};
use army_node_api::NodeApi;
use army_node_api::simulated::SimulatedNode;
use tokio::task::JoinHandle;

use crate::context::Context;
use crate::record::{Figure, Ratio, Record};

pub(crate) const ABOUT: &str = "1,000 simulated hosts with 100,000 VMs; needs no guests";

/// How long all hosts may take until they have reported.
const SETTLED: Duration = Duration::from_secs(300);
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
        let url = format!("http://{}", listener.local_addr()?);
        let router = army::server::router(Arc::clone(&controller));
        let tasks = vec![
            tokio::spawn(async { drop(term.await) }),
            tokio::spawn(async { drop(reconcile.await) }),
            tokio::spawn(async { drop(axum::serve(listener, router).await) }),
        ];
        let admin = CreateKey::new("root", Role::Admin);
        let key = controller.create_key(&admin).await?.secret;
        let client = Client::new(&url, &key)?;
        Ok(Self {
            controller,
            records,
            client,
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
        "Tick: processor time of the process for each second in which nothing happens, in which each host reports once, less what the simulated nodes themselves take for the reports.",
        "Creates: from 16 connections, each of one VM, which is destroyed then. Page: GET /v1/vms of 1,000 VMs, to the last byte, read into the client's types. Event: from before a host is drained until a subscriber over HTTP has the event; with several controllers at another one.",
    ]);
    let tokio = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
    // A database of gigabytes is not put into memory.
    let state = context.out().join("fleet");
    let _ = std::fs::remove_dir_all(&state);
    std::fs::create_dir_all(&state)?;
    record.part("SQLite", |record| {
        let url = Database::sqlite_url(&state.join("army.db"));
        tokio.block_on(measure(context, record, "SQLite", &url, 1, size))
    });
    let postgres = postgres::find(&state)?;
    match &postgres {
        Some(postgres) => {
            for controllers in [1, 3] {
                let name = format!("PostgreSQL, {controllers}");
                record.part(&name, |record| {
                    let url = postgres.database(controllers)?;
                    tokio.block_on(measure(context, record, &name, &url, controllers, size))
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

async fn measure(
    context: &Context,
    record: &mut Record,
    name: &str,
    url: &str,
    controllers: usize,
    size: Size,
) -> Result<()> {
    let start = Instant::now();
    let database = Database::open(url).await?;
    Records::of(&database)
        .fill(size.hosts, size.vms, size.ended)
        .await?;
    println!(
        "   {name}: the database was filled in {} s",
        start.elapsed().as_secs()
    );
    let nodes = nodes(size);
    let mut servers = vec![Server::start(database, &nodes).await?];
    for _ in 1..controllers {
        servers.push(Server::start(Database::open(url).await?, &nodes).await?);
    }
    insert_template(&servers[0].records, &nodes).await?;
    let start = Instant::now();
    settle(&servers, &nodes).await?;
    println!(
        "   {name}: every host had reported after {} s",
        start.elapsed().as_secs()
    );
    let samples = context.samples(10, 30);
    let ticks = load::ticks(&nodes, samples).await;
    let figure = Figure::new(&format!("{name}: tick"), "ms", ticks);
    record.add_with_limit(figure, 100.0, "at most 1");
    let pages = load::pages(&servers[0].client, context.samples(30, 200)).await?;
    let figure = Figure::ms(&format!("{name}: page of VMs"), &pages);
    record.add_with_limit(figure, 10.0, "at most 1");
    let last = servers.last().unwrap_or(&servers[0]);
    let events = load::events(&servers[0], last, context.samples(20, 100)).await?;
    let figure = Figure::ms(&format!("{name}: event at a subscriber"), &events);
    record.add_with_limit(figure, 50.0, "at most 1");
    let seconds = Duration::from_secs(context.samples(5, 20) as u64);
    let clients: Vec<Client> = servers.iter().map(|it| it.client.clone()).collect();
    let (rate, times) = load::creates(&clients, seconds).await?;
    record.add(Figure::new(&format!("{name}: creates"), "1/s", vec![rate]));
    record.add(Figure::ms(&format!("{name}: create"), &times));
    let memory = vec![load::memory_mib()?];
    record.add(Figure::new(&format!("{name}: memory"), "MiB", memory));
    if let [first, rest @ ..] = servers.as_slice()
        && !rest.is_empty()
    {
        first.kill();
        let moved = load::moved(&first.records, &rest[0].records).await?;
        record.add(Figure::ms(
            &format!("{name}: hosts of a killed controller"),
            &[moved],
        ));
        record.add_ratio(Ratio {
            name: format!("{name}: hosts of a killed controller / 10 s"),
            value: moved.as_secs_f64() / 10.0,
            goal: Some("at most 1".to_owned()),
        });
    }
    for server in &servers {
        server.kill();
    }
    Ok(())
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
