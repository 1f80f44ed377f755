//! 10,000 VMs listed. It needs no guests, and runs where the report is made.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use army_api::vms::{ForkTimes, Vm, VmFilter, VmMemory, VmPage, VmState};
use army_node::Node;
use army_node_api::requests::VmReport;
use clone_host::runtime::Runtime;

use super::army::Server;
use crate::context::Context;
use crate::guests::told;
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str = "10,000 VMs listed from SQLite; needs no guests";

const VMS: usize = 10_000;
/// VMs that are written down at once.
const BATCH: usize = 1000;
const GOAL_MS: f64 = 100.0;

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "The store holds 10,000 VMs with labels, times and measured memory. Store: read from SQLite. API: by a request over the loopback for one page of 10,000, to the last byte, read into the client's types. Pages: the same in pages of 1,000.",
    ]);
    let state = context.scratch("list");
    std::fs::create_dir_all(&state)?;
    let runtime = Runtime::at(&state.join("run")).map_err(told)?;
    let templates = clone_template::Store::at(state.join("templates"));
    let node = Node::open("here".to_owned(), state.join("vms"), runtime, templates)?;
    let tokio = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
    tokio.block_on(async {
        let server = Server::start(&state, Arc::clone(&node), false).await?;
        fill(&server).await?;
        measure(&server, &mut record, context.samples(20, 100)).await
    })?;
    Ok(record)
}

async fn fill(server: &Server) -> Result<()> {
    let environment = BTreeMap::from([("GREETING".to_owned(), "hello".to_owned())]);
    for first in (0..VMS).step_by(BATCH) {
        let vms: Vec<Vm> = (first..first + BATCH).map(vm).collect();
        server.records.insert_vms(&vms, &environment).await?;
        for vm in &vms {
            let times = ForkTimes {
                warm: true,
                placement_us: 800,
                running_us: 1900,
                identity_us: 2100,
                total_us: 5000,
            };
            server.records.record_fork(&vm.id, times, &[]).await?;
        }
        let reports: Vec<VmReport> = vms.iter().map(report).collect();
        server.records.apply_node_report(&reports).await?;
    }
    Ok(())
}

fn vm(number: usize) -> Vm {
    Vm {
        id: format!("{number:012x}"),
        name: format!("worker-{number}"),
        tenant: format!("tenant-{}", number % 50),
        template: format!("template-{}", number % 20),
        host: "here".to_owned(),
        state: VmState::Creating,
        reason: None,
        labels: BTreeMap::from([("team".to_owned(), format!("team-{}", number % 100))]),
        created_ms: 1_800_000_000_000 + number as u64,
        expires_ms: Some(1_900_000_000_000),
        network: None,
        idle: None,
        fork: None,
        addresses: Vec::new(),
        notices: Vec::new(),
        memory: None,
    }
}

fn report(vm: &Vm) -> VmReport {
    VmReport {
        epoch: 1,
        id: vm.id.clone(),
        state: VmState::Running,
        reason: None,
        memory: Some(VmMemory {
            guest_bytes: 256 << 20,
            private_bytes: 5 << 20,
            shared_bytes: 40 << 20,
            swapped_bytes: 0,
        }),
        addresses: Vec::new(),
    }
}

async fn measure(server: &Server, record: &mut Record, count: usize) -> Result<()> {
    let client = server.client()?;
    let all = VmFilter {
        limit: Some(VMS as u32),
        ..VmFilter::default()
    };
    let (mut store, mut api, mut pages) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..=count {
        let start = Instant::now();
        let page = server.records.vms(&all).await?;
        let stored = start.elapsed();
        check(page.vms.len())?;
        let start = Instant::now();
        let page: VmPage = client.get("/v1/vms", &all).await?;
        let answered = start.elapsed();
        check(page.vms.len())?;
        let start = Instant::now();
        let mut filter = VmFilter::default();
        let mut seen = 0;
        loop {
            let page: VmPage = client.get("/v1/vms", &filter).await?;
            seen += page.vms.len();
            filter.after = page.next;
            if filter.after.is_none() {
                break;
            }
        }
        let paged = start.elapsed();
        check(seen)?;
        if turn > 0 {
            store.push(stored);
            api.push(answered);
            pages.push(paged);
        }
    }
    record.add(Figure::ms("10,000 VMs: store", &store));
    let figure = Figure::ms("10,000 VMs: API", &api);
    record.add_with_limit(figure, GOAL_MS, "at most 1");
    record.add(Figure::ms("10,000 VMs: API, in pages of 1,000", &pages));
    Ok(())
}

fn check(seen: usize) -> Result<()> {
    anyhow::ensure!(seen == VMS, "{seen} VMs were listed");
    Ok(())
}
