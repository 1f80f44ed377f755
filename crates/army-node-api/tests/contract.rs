//! The contract over mutual TLS: what a simulated node answers arrives at the controller unchanged.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use army_api::vms::VmState;
use army_node_api::chunks;
use army_node_api::cluster::Member;
use army_node_api::cluster::authority::Authority;
use army_node_api::cluster::tls::Identity;
use army_node_api::requests::{
    ConnectAgentRequest, CreateVmsRequest, DestroyVmRequest, ExportTemplateRequest,
    ImportTemplateRequest, InspectTemplateRequest, PauseVmRequest, ReportRequest, TemplateFacts,
    VmSpec,
};
use army_node_api::serve::{Limits, Server, Stop};
use army_node_api::simulated::SimulatedNode;
use army_node_api::{Call, Deadline, Error, ErrorKind, NodeApi, Remote, router};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

fn deadline() -> Call {
    Deadline::after(Duration::from_secs(60)).into()
}

fn identity(authority: &Authority, member: &Member) -> Identity {
    Identity::new(&authority.credentials(member).unwrap()).unwrap()
}

/// Serves a node, and returns the controller's end of the connection.
async fn remote(node: &Arc<SimulatedNode>) -> Remote {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let member = Member::Node(node.name().to_owned());
    let tls = identity(&authority, &member).server(false).unwrap();
    let server = Server::new(listener, Some(tls), Limits::MEMBERS);
    let service: Arc<dyn NodeApi> = Arc::<SimulatedNode>::clone(node);
    tokio::spawn(server.serve(router::router(service), Stop::default().stopping()));
    let controller = identity(&authority, &Member::Controller);
    Remote::new(node.name(), address, controller.client().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_created_reported_paused_and_destroyed() {
    let node = Arc::new(SimulatedNode::new("a"));
    let remote = remote(&node).await;
    let request = CreateVmsRequest {
        template: "t".into(),
        vms: ["1", "2"]
            .map(|id| VmSpec::new(id.into(), 1, id.into()))
            .into(),
    };
    let created = remote.create_vms(request, deadline()).await.unwrap();
    assert!(created.results.iter().all(Result::is_ok));
    let pause = PauseVmRequest { vm: "1".into() };
    remote.pause_vm(pause, deadline()).await.unwrap();
    let destroy = DestroyVmRequest {
        vm: "2".into(),
        reason: "destroyed".into(),
    };
    remote.destroy_vm(destroy, deadline()).await.unwrap();
    let report = remote.report(ReportRequest::default(), deadline()).await;
    let vms = report.unwrap().vms.into_iter().map(|vm| (vm.id, vm.state));
    let expected = [("1", VmState::Paused), ("2", VmState::Ended)];
    assert!(vms.eq(expected.map(|(id, state)| (id.to_owned(), state))));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_arrive_as_they_are() {
    let refused = Error::new(ErrorKind::HostUnsupported, "it lacks avx512f").advise("buy one");
    let node = SimulatedNode::new("a").with_creation(Err(refused.clone()));
    let remote = remote(&Arc::new(node)).await;
    let request = CreateVmsRequest {
        template: "t".into(),
        vms: vec![VmSpec::new("1".into(), 1, "1".into())],
    };
    let created = remote.create_vms(request, deadline()).await.unwrap();
    assert_eq!(created.results, [Err(refused)]);
    let request = InspectTemplateRequest {
        template: "none".into(),
    };
    let error = remote.inspect_template(request, deadline()).await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_ends_with_its_deadline() {
    let node = Arc::new(SimulatedNode::new("a").gated());
    let remote = remote(&node).await;
    let passed = Deadline::after(Duration::ZERO).into();
    let error = remote.report(ReportRequest::default(), passed).await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::DeadlineExceeded);
    // The node never answers.
    let soon = Deadline::after(Duration::from_millis(50)).into();
    let error = remote.report(ReportRequest::default(), soon).await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::HostUnreachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_are_sent_both_ways() {
    let node = Arc::new(SimulatedNode::new("a"));
    let remote = remote(&node).await;
    let content = vec![7; 1_000_000];
    let facts = TemplateFacts {
        id: "0".into(),
        ..TemplateFacts::default()
    };
    node.add_template("t", facts, &content);
    let template = || "t".to_owned();
    let export = ExportTemplateRequest {
        template: template(),
    };
    let mut chunks = remote.export_template(export, deadline()).await.unwrap();
    let mut received = Vec::new();
    while let Some(chunk) = chunks.recv().await {
        received.extend_from_slice(&chunk.unwrap());
    }
    assert!(received == content);
    let (sender, chunks) = chunks::channel();
    tokio::spawn(async move {
        for chunk in received.chunks(100_000) {
            sender.send(Ok(chunk.to_vec().into())).await.unwrap();
        }
    });
    let import = ImportTemplateRequest {
        template: "copy".into(),
    };
    let imported = remote.import_template(import, chunks, deadline()).await;
    assert_eq!(imported.unwrap().data_bytes, 1_000_000);
    let export = ExportTemplateRequest {
        template: "none".into(),
    };
    let error = remote.export_template(export, deadline()).await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agents_stream_outlives_the_deadline_of_connecting() {
    let node = Arc::new(SimulatedNode::new("a"));
    let remote = remote(&node).await;
    let (near, mut agent) = UnixStream::pair().unwrap();
    node.add_agent(near);
    let limit = Duration::from_millis(300);
    let request = || ConnectAgentRequest { vm: "1".into() };
    let stream = remote.connect_agent(request(), Deadline::after(limit).into());
    let (mut ours, read) = stream.await.unwrap().into_parts().unwrap();
    assert!(read.is_empty());
    // Longer than the client waits for a late answer.
    tokio::time::sleep(limit + Duration::from_secs(3)).await;
    agent.write_all(b"hello").await.unwrap();
    let mut bytes = [0; 5];
    ours.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"hello");
    drop(ours);
    // The agent sees that its client is gone.
    assert_eq!(agent.read(&mut bytes).await.unwrap(), 0);
    let error = remote.connect_agent(request(), deadline()).await;
    assert_eq!(
        error.map(drop).unwrap_err().kind,
        ErrorKind::GuestUnavailable
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_an_older_epoch_is_refused_whatever_it_asks_for() {
    let node = Arc::new(SimulatedNode::new("a"));
    let remote = remote(&node).await;
    let report = ReportRequest::default;
    remote
        .report(report(), deadline().in_epoch(7))
        .await
        .unwrap();
    for epoch in [0, 6] {
        let old = deadline().in_epoch(epoch);
        let error = remote.report(report(), old).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::StaleEpoch);
        let request = CreateVmsRequest {
            template: "t".into(),
            vms: vec![VmSpec::new("1".into(), 1, "1".into())],
        };
        let error = remote.create_vms(request, old).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::StaleEpoch);
    }
    assert_eq!(node.requested_vms(), 0);
    remote
        .report(report(), deadline().in_epoch(8))
        .await
        .unwrap();
}
