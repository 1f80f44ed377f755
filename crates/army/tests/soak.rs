//! A server that has created and ended many VMs holds nothing of them: no open files, no threads, no
//! memory.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod served;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use army_api::client::Client;
use army_api::vms::{CreateVms, CreatedVms, VmFilter, VmPage};
use army_node_api::NodeApi;
use army_node_api::simulated::SimulatedNode;
use futures_util::future::try_join_all;
use futures_util::stream::{self, StreamExt, TryStreamExt};

/// The VMs that are created and ended before the first look: pools, caches and threads are there then.
const FIRST: usize = 1000;
/// The VMs that follow.
const MORE: usize = 4000;
/// The VMs of one request, which are also ended at a time.
const BATCH: u32 = 50;
/// The requests at a time.
const AT_ONCE: usize = 2;
/// The open files of the client's connections, which have two ends here.
const CONNECTIONS: usize = 2 * AT_ONCE * BATCH as usize;
/// What the allocator and the database's caches may take more, and what the simulated host remembers
/// of its VMs, in KiB. A task or a connection for each VM would be more.
const MORE_KIB: usize = 24 << 10;
/// The time limit until the last VM has ended.
const LIMIT: Duration = Duration::from_secs(60);

/// What this process holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    files: usize,
    threads: usize,
    memory_kib: usize,
    children: usize,
}

impl Held {
    fn now() -> Self {
        let entries = |path: &str| fs::read_dir(path).unwrap().count();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let memory = status.lines().find_map(|it| it.strip_prefix("VmRSS:"));
        let memory = memory.unwrap().split_whitespace().next().unwrap();
        let children = format!("/proc/self/task/{}/children", std::process::id());
        let children = fs::read_to_string(children).unwrap();
        Self {
            files: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            memory_kib: memory.parse().unwrap(),
            children: children.split_whitespace().count(),
        }
    }
}

/// Creates VMs and ends them.
async fn create_and_end(client: &Client, count: usize) {
    let requests = count / BATCH as usize;
    let rounds = stream::iter(0..requests).map(|_| async {
        let create = CreateVms {
            template: "t".into(),
            count: BATCH,
            ..CreateVms::default()
        };
        let created: CreatedVms = client.create("/v1/vms", &create, None).await?;
        assert_eq!(created.vms.len(), BATCH as usize);
        let ends = created.vms.iter().map(|vm| async move {
            let path = format!("/v1/vms/{}", vm.id);
            client.delete(&path, &()).await
        });
        try_join_all(ends).await.map(drop)
    });
    let done = rounds.buffer_unordered(AT_ONCE);
    done.try_collect::<Vec<()>>().await.unwrap();
    let end = Instant::now() + LIMIT;
    loop {
        let filter = VmFilter::default();
        let page: VmPage = client.get("/v1/vms", &filter).await.unwrap();
        if page.vms.is_empty() {
            return;
        }
        assert!(
            Instant::now() < end,
            "{} VMs have not ended",
            page.vms.len()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_held_of_what_has_ended() {
    let node = Arc::new(SimulatedNode::new("here"));
    let server = served::server_of(Arc::<SimulatedNode>::clone(&node) as Arc<dyn NodeApi>).await;
    let loops = tokio::spawn(Arc::clone(&server.controller).reconcile());
    let records = &server.records;
    records
        .insert_template(&served::template("t"))
        .await
        .unwrap();
    create_and_end(&server.admin, FIRST).await;
    let before = Held::now();
    create_and_end(&server.admin, MORE).await;
    let after = Held::now();
    println!("{before:?} after {FIRST} VMs, {after:?} after {MORE} more");
    assert!(
        after.files <= before.files + CONNECTIONS,
        "{before:?} {after:?}"
    );
    assert!(after.threads <= before.threads, "{before:?} {after:?}");
    assert!(after.children <= before.children, "{before:?} {after:?}");
    let more = after.memory_kib.saturating_sub(before.memory_kib);
    assert!(more < MORE_KIB, "{more} KiB for {MORE} VMs");
    assert_eq!(node.requested_vms(), FIRST + MORE);
    loops.abort();
}
