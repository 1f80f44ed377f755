//! Lists of VMs by labels and states, and what is said of one VM.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::BTreeMap;
use std::sync::Arc;

use army_api::client::ClientError;
use army_api::figures::VmFigures;
use army_api::keys::Role;
use army_api::vms::{VmFilter, VmPage, VmState};
use army_api::{Problem, ProblemKind};
use army_node_api::simulated::SimulatedNode;

use served::{Postgres, Server, on_each_database, record, server_over};

const VMS: u32 = 60;

/// A server with VMs, of which every third is red, every fifth is a test and every second has ended.
async fn serve(postgres: Option<Postgres>) -> Server {
    let node = SimulatedNode::new("here");
    node.add_vm("000000000001");
    let server = server_over(Arc::new(node), postgres).await;
    let vms = (0..VMS).map(|number| {
        let mut vm = record(&format!("{number:012}"), &format!("vm-{number}"), "root");
        let mut label = |key: &str, value: &str| vm.labels.insert(key.into(), value.into());
        label("team", if number % 3 == 0 { "red" } else { "redder" });
        label("it%s_\"odd\"!", "100%");
        if number % 5 == 0 {
            label("test", &number.to_string());
        }
        vm
    });
    let vms: Vec<_> = vms.collect();
    let records = &server.records;
    records.insert_vms(&vms, &BTreeMap::new()).await.unwrap();
    for vm in &vms {
        let state = match vm.id.ends_with(['0', '2', '4', '6', '8']) {
            true => VmState::Ended,
            false => VmState::Running,
        };
        let ids = [vm.id.clone()];
        records.set_vm_states(&ids, state, "").await.unwrap();
    }
    server
}

/// The numbers of the VMs of all pages.
async fn listed(server: &Server, filter: &VmFilter) -> Vec<u32> {
    let mut filter = filter.clone();
    let mut numbers = Vec::new();
    loop {
        let page: VmPage = server.admin.get("/v1/vms", &filter).await.unwrap();
        let limit = filter.limit.unwrap_or(1000) as usize;
        // A page is full unless it is the last one, and nothing follows a `next` that is empty.
        assert!(page.vms.len() == limit || page.next.is_none());
        assert!(!page.vms.is_empty() || numbers.is_empty());
        numbers.extend(page.vms.iter().map(|vm| vm.id.parse::<u32>().unwrap()));
        filter.after = page.next;
        if filter.after.is_none() {
            return numbers;
        }
    }
}

fn labels(labels: &[&str]) -> VmFilter {
    VmFilter {
        label: labels.iter().map(|it| (*it).to_owned()).collect(),
        ..VmFilter::default()
    }
}

async fn labels_and_states_are_met_together_on_pages_that_are_full(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let numbers = |is: &dyn Fn(u32) -> bool| (0..VMS).filter(|it| is(*it)).collect::<Vec<_>>();
    for limit in [1, 2, 7, 1000] {
        let limit = Some(limit);
        let red = VmFilter {
            limit,
            ..labels(&["team=red"])
        };
        assert_eq!(
            listed(&server, &red).await,
            numbers(&|it| it % 3 == 0 && it % 2 == 1)
        );
        let all = VmFilter {
            all: true,
            limit,
            ..labels(&["team=red", "test", "it%s_\"odd\"!=100%"])
        };
        assert_eq!(listed(&server, &all).await, numbers(&|it| it % 15 == 0));
        let ended = VmFilter {
            state: vec![VmState::Ended, VmState::Failed],
            limit,
            ..labels(&["test"])
        };
        assert_eq!(listed(&server, &ended).await, numbers(&|it| it % 10 == 0));
        let one = VmFilter {
            all: true,
            limit,
            ..labels(&["test=45"])
        };
        assert_eq!(listed(&server, &one).await, [45]);
    }
    assert_eq!(listed(&server, &labels(&["team=blue"])).await, [0; 0]);
    assert_eq!(listed(&server, &labels(&["tea"])).await, [0; 0]);
    // A record that cannot be read leaves no gap.
    server.records.spoil_vm("000000000003").await.unwrap();
    let red = VmFilter {
        limit: Some(2),
        ..labels(&["team=red"])
    };
    assert_eq!(listed(&server, &red).await[..2], [9, 15]);
    for query in ["label==x", "state=odd", "host=a&host=b", "surprise=1"] {
        let path = format!("/v1/vms?{query}");
        let refused = problem(server.admin.get::<VmPage>(&path, &()).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{query}");
    }
}

fn problem<T>(result: Result<T, ClientError>) -> Problem {
    match result {
        Err(ClientError::Refused(problem)) => problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

async fn a_vm_has_figures_and_a_console(postgres: Option<Postgres>) {
    let server = serve(postgres).await;
    let figures: VmFigures = server.admin.get("/v1/vms/vm-1/figures", &()).await.unwrap();
    assert_eq!(figures.addresses, ["192.0.2.1"]);
    let request = reqwest::Client::new()
        .get(format!("{}/v1/vms/vm-1/console?bytes=10", server.url))
        .bearer_auth(server.admin.key());
    let answer = request.send().await.unwrap();
    assert_eq!(
        answer.headers()["content-type"],
        "text/plain; charset=utf-8"
    );
    assert_eq!(answer.text().await.unwrap(), "boot\nboot\n");
    let refused = server
        .admin
        .get::<VmFigures>("/v1/vms/000000000002/figures", &());
    assert_eq!(problem(refused.await).kind, ProblemKind::Conflict);
    let viewer = server.client("root", Role::Viewer).await;
    let refused = problem(viewer.get::<String>("/v1/vms/vm-1/console", &()).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    let refused = server
        .admin
        .get::<String>("/v1/vms/vm-1/console?bytes=262145", &());
    assert_eq!(problem(refused.await).kind, ProblemKind::InvalidRequest);
}

on_each_database! {
    labels_and_states_are_met_together_on_pages_that_are_full,
    a_vm_has_figures_and_a_console,
}
