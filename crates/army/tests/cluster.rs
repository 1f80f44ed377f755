//! A controller and its nodes over mutual TLS, without guests: who gets in, and who may ask what.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use army::enrol::{self, SigningRequest};
use army_api::ProblemKind;
use army_api::hosts::HostState;
use army_controller::{Cluster, Controller, Database, Requester};
use army_node::membership::Membership;
use army_node::{Node, NodeService};
use army_node_api::chunks;
use army_node_api::cluster::authority::{Authority, Credentials};
use army_node_api::cluster::tls::{self, Identity};
use army_node_api::cluster::token::Token;
use army_node_api::cluster::{Member, authority};
use army_node_api::requests::{
    AdmitFetchRequest, ConnectAgentRequest, ExportTemplateRequest, FetchTemplateRequest,
    HostReport, ImportTemplateRequest, RenewalRequest, RenewalResponse, ReportRequest,
};
use army_node_api::serve::{Limits, Server, Stop};
use army_node_api::simulated::SimulatedNode;
use army_node_api::{Call, Deadline, ErrorKind, NodeApi, Remote, Result, router};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

struct Army {
    controller: Arc<Controller>,
    authority: Arc<Authority>,
    /// Where hosts join.
    desk: SocketAddr,
    dir: tempfile::TempDir,
}

async fn army() -> Army {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let database = Database::open(&url).await.unwrap();
    let authority = Arc::new(Authority::open(dir.path()).unwrap());
    let credentials = authority.credentials(&Member::Controller).unwrap();
    let identity = Identity::new(&credentials).unwrap();
    let cluster = Cluster {
        tls: identity.client().unwrap(),
        fingerprint: fingerprint(&authority),
    };
    let controller = Arc::new(Controller::of_cluster(database, cluster).await.unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let desk = listener.local_addr().unwrap();
    let server = Server::new(
        listener,
        Some(identity.server(true).unwrap()),
        Limits::STRANGERS,
    );
    let router = enrol::router(Arc::clone(&controller), Arc::clone(&authority));
    tokio::spawn(server.serve(router, Stop::default().stopping()));
    Army {
        controller,
        authority,
        desk,
        dir,
    }
}

fn fingerprint(authority: &Authority) -> String {
    let pem = authority.certificate().as_bytes();
    tls::fingerprint(&CertificateDer::from_pem_slice(pem).unwrap())
}

impl Army {
    /// A host that joins, and its node.
    async fn host(&self, name: &str) -> (SocketAddr, Credentials, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (token, _) = self
            .controller
            .create_join_token(&Requester::default(), 1)
            .await
            .unwrap();
        let credentials = enrol::join(self.desk, &token, name, address).await.unwrap();
        let file = self.dir.path().join(format!("{name}.json"));
        let member = Membership::join(file, name.to_owned(), credentials.clone()).unwrap();
        let task = self.serve(listener, member).await;
        (address, credentials, task)
    }

    async fn serve(&self, listener: TcpListener, member: Membership) -> JoinHandle<()> {
        let name = member.host().to_owned();
        let path = self.dir.path().join(&name);
        let node = tokio::task::spawn_blocking(move || {
            let runtime = clone_host::runtime::Runtime::at(&path.join("run")).unwrap();
            let templates = clone_template::Store::at(path.join("templates"));
            Node::open(name, path.join("vms"), runtime, templates).unwrap()
        });
        let tls = member.identity().server(false).unwrap();
        let server = Server::new(listener, Some(tls), Limits::MEMBERS);
        let service = NodeService::in_cluster(node.await.unwrap(), Arc::new(member)).unwrap();
        let router = router::router(Arc::new(service));
        tokio::spawn(server.serve(router, Stop::default().stopping()))
    }

    /// Looks at hosts until `done`.
    async fn wait(&self, done: impl Fn(&[army_api::hosts::Host]) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let hosts = self.controller.hosts().await.unwrap();
            if done(&hosts) {
                return;
            }
            assert!(Instant::now() < end, "waited too long: {hosts:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// The node of `name`, as a member with these credentials reaches it.
fn node(credentials: &Credentials, name: &str, address: SocketAddr) -> Remote {
    let tls = Identity::new(credentials).unwrap().client().unwrap();
    Remote::new(name, address, tls).unwrap()
}

/// A call of an epoch that is newer than any that the controller gives out.
fn deadline() -> Call {
    Call::from(Deadline::after(Duration::from_secs(60))).in_epoch(u64::MAX)
}

async fn renewal(node: &Remote) -> Result<RenewalResponse> {
    node.request_renewal(RenewalRequest::default(), deadline())
        .await
}

async fn report(node: &Remote) -> Result<HostReport> {
    node.report(ReportRequest::default(), deadline()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_once_with_a_token_and_is_heard_of() {
    let army = army().await;
    let (_, _, task) = army.host("a").await;
    let reconcile = tokio::spawn(Arc::clone(&army.controller).reconcile());
    army.wait(
        |hosts| matches!(hosts, [it] if it.state == HostState::Ready && it.capacity.is_some_and(|it| it.cpus > 0)),
    )
    .await;
    // Its name is taken, and a token works once, for whoever comes first.
    let address = "127.0.0.1:1".parse().unwrap();
    let (token, _) = army
        .controller
        .create_join_token(&Requester::default(), 1)
        .await
        .unwrap();
    let problem = enrol::join(army.desk, &token, "a", address)
        .await
        .err()
        .unwrap();
    assert_eq!(problem.kind, ProblemKind::Conflict);
    enrol::join(army.desk, &token, "b", address)
        .await
        .map(drop)
        .unwrap();
    let problem = enrol::join(army.desk, &token, "c", address)
        .await
        .err()
        .unwrap();
    assert_eq!(problem.kind, ProblemKind::Unauthorized);
    let (token, _) = army
        .controller
        .create_join_token(&Requester::default(), 1)
        .await
        .unwrap();
    let problem = enrol::join(army.desk, &token, "../x", address)
        .await
        .err()
        .unwrap();
    assert_eq!(problem.kind, ProblemKind::InvalidRequest);
    // One that never answered can be given up; one that answers and has no VMs, too.
    army.controller.remove_host("b").await.unwrap();
    army.controller.remove_host("a").await.unwrap();
    assert_eq!(army.controller.hosts().await.unwrap(), []);
    reconcile.abort();
    task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_told_to_no_other_controller() {
    let (ours, theirs) = (army().await, army().await);
    let (token, _) = ours
        .controller
        .create_join_token(&Requester::default(), 1)
        .await
        .unwrap();
    let address = "127.0.0.1:1".parse().unwrap();
    let problem = enrol::join(theirs.desk, &token, "a", address)
        .await
        .err()
        .unwrap();
    assert!(problem.detail.contains("not the token's"), "{problem}");
    let made_up = Token {
        secret: "0".repeat(64),
        fingerprint: fingerprint(&ours.authority),
    };
    let problem = enrol::join(ours.desk, &made_up, "a", address)
        .await
        .err()
        .unwrap();
    assert_eq!(problem.kind, ProblemKind::Unauthorized);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_controller_commands_a_node_and_only_members_reach_it() {
    let army = army().await;
    let (address, a, _task) = army.host("a").await;
    let (_, b, _task) = army.host("b").await;
    let controller = army.authority.credentials(&Member::Controller).unwrap();
    report(&node(&controller, "a", address)).await.unwrap();
    // Another node gets templates, and nothing else.
    for credentials in [&a, &b] {
        let refused = report(&node(credentials, "a", address)).await;
        assert_eq!(refused.unwrap_err().kind, ErrorKind::PermissionDenied);
        let refused = node(credentials, "a", address)
            .connect_agent(ConnectAgentRequest { vm: "x".into() }, deadline())
            .await
            .map(drop);
        assert_eq!(refused.unwrap_err().kind, ErrorKind::PermissionDenied);
    }
    // Another Army's controller is nobody here, and neither is a node that takes another's name.
    let folder = tempfile::tempdir().unwrap();
    let other = authority::Authority::open(folder.path()).unwrap();
    let stranger = other.credentials(&Member::Controller).unwrap();
    let refused = report(&node(&stranger, "a", address)).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::HostUnreachable);
    let refused = report(&node(&controller, "b", address)).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::HostUnreachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_certificate_is_renewed_while_its_node_goes_on() {
    let army = army().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (token, _) = army
        .controller
        .create_join_token(&Requester::default(), 1)
        .await
        .unwrap();
    let joined = enrol::join(army.desk, &token, "a", address).await.unwrap();
    // A file that does not say when it was certified is of long ago.
    let file = army.dir.path().join("a.json");
    let text = serde_json::json!({"version": 1, "host": "a", "credentials": joined});
    std::fs::write(&file, text.to_string()).unwrap();
    let member = Membership::open(file.clone()).unwrap().unwrap();
    let _task = army.serve(listener, member).await;
    let kept = || {
        let text = std::fs::read_to_string(&file).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        serde_json::from_value::<Credentials>(file["credentials"].clone()).unwrap()
    };

    // Nobody but the controller brings one.
    let refused = renewal(&node(&joined, "a", address)).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::PermissionDenied);
    army.controller
        .renew_certificates_once(&army.authority)
        .await;
    let renewed = kept();
    assert_ne!(renewed.certificate, joined.certificate);
    assert_ne!(renewed.key, joined.key);
    army.controller
        .renew_certificates_once(&army.authority)
        .await;
    assert_eq!(kept().certificate, renewed.certificate, "once is enough");

    // The node shows it, and it is believed.
    let controller = army.authority.credentials(&Member::Controller).unwrap();
    let request = renewal(&node(&controller, "a", address)).await;
    assert_eq!(request.unwrap().signing_request, None);
    let refused = report(&node(&renewed, "a", address)).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_is_nowhere_is_not_fetched() {
    let army = army().await;
    let (address, _, _task) = army.host("a").await;
    let (there, _, _task) = army.host("b").await;
    let controller = army.authority.credentials(&Member::Controller).unwrap();
    for template in ["none", "../../etc"] {
        let request = FetchTemplateRequest {
            host: "b".into(),
            address: there,
            template: template.into(),
            id: "0".into(),
            ticket: None,
        };
        let node = node(&controller, "a", address);
        let refused = node.fetch_template(request, deadline()).await;
        refused.unwrap_err();
    }
    let left = std::fs::read_dir(army.dir.path().join("a/templates"));
    assert_eq!(left.map_or(0, Iterator::count), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_lost_the_answer_gets_the_same_certificate_again() {
    let army = army().await;
    let (token, _) = army
        .controller
        .create_join_token(&Requester::default(), 1)
        .await
        .unwrap();
    let address = "127.0.0.1:1".parse().unwrap();
    let signing = SigningRequest::generate().unwrap();
    let join = |host: &'static str, signing: SigningRequest| {
        enrol::join_with(army.desk, &token, host, address, signing)
    };
    let first = join("a", signing.clone()).await.unwrap();
    let again = join("a", signing.clone()).await.unwrap();
    assert_eq!(again.certificate, first.certificate);
    assert_eq!(army.controller.hosts().await.unwrap().len(), 1);
    // Neither another host nor another key gets one with the same token.
    let other = SigningRequest::generate().unwrap();
    for (host, signing) in [("b", signing.clone()), ("a", other)] {
        let problem = join(host, signing).await.err().unwrap();
        assert_eq!(problem.kind, ProblemKind::Unauthorized);
    }
    // A host that was removed does not come back with its old token.
    army.controller.remove_host("a").await.unwrap();
    let problem = join("a", signing).await.err().unwrap();
    assert_eq!(problem.kind, ProblemKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_without_a_token_is_refused_before_its_request_is_read() {
    let army = army().await;
    let tls = tls::stranger(&fingerprint(&army.authority)).unwrap();
    let name = Member::Controller.dns_name();
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .resolve(&name, army.desk)
        .build()
        .unwrap();
    let url = format!("https://{name}:{}/v2/enrol", army.desk.port());
    for secret in ["guess".to_owned(), "0".repeat(64)] {
        // A body that would be refused for its content if it were read.
        let request = client.post(&url).bearer_auth(secret).body("not json");
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 401);
    }
    let url = format!("https://{name}:{}/v2/address", army.desk.port());
    let present = serde_json::json!({"address": "127.0.0.1:1"});
    let answer = client.put(&url).json(&present).send().await.unwrap();
    assert_eq!(answer.status(), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_moves_tells_its_new_address_with_its_certificate() {
    let army = army().await;
    let (before, credentials, task) = army.host("a").await;
    task.abort();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    assert_ne!(address, before);
    let file = army.dir.path().join("a.json");
    let member = Membership::open(file).unwrap().unwrap();
    let identity = Identity::new(&credentials).unwrap();
    let _task = army.serve(listener, member).await;
    // An unspecified address stands for the one that the controller sees.
    let told = SocketAddr::new("0.0.0.0".parse().unwrap(), address.port());
    enrol::announce(army.desk, &identity, told).await.unwrap();
    let reconcile = tokio::spawn(Arc::clone(&army.controller).reconcile());
    army.wait(|hosts| matches!(hosts, [it] if it.state == HostState::Ready && it.capacity.is_some_and(|it| it.cpus > 0)))
        .await;
    reconcile.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_a_template_of_another_only_with_the_controllers_ticket() {
    let army = army().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let origin = Arc::new(SimulatedNode::new("a"));
    let credentials = army
        .authority
        .credentials(&Member::Node("a".into()))
        .unwrap();
    let tls = Identity::new(&credentials).unwrap().server(false).unwrap();
    let server = Server::new(listener, Some(tls), Limits::MEMBERS);
    tokio::spawn(server.serve(router::router(origin), Stop::default().stopping()));
    let controller = army.authority.credentials(&Member::Controller).unwrap();
    let controller = node(&controller, "a", address);
    let (sender, content) = chunks::channel();
    sender.send(Ok("content".into())).await.unwrap();
    drop(sender);
    let import = ImportTemplateRequest {
        template: "t".into(),
    };
    let facts = controller
        .import_template(import, content, deadline())
        .await
        .unwrap();

    let b = army
        .authority
        .credentials(&Member::Node("b".into()))
        .unwrap();
    let c = army
        .authority
        .credentials(&Member::Node("c".into()))
        .unwrap();
    let (b, c) = (node(&b, "a", address), node(&c, "a", address));
    let ticket = "7".repeat(64);
    let admit = |id: &str| AdmitFetchRequest {
        ticket: ticket.clone(),
        template: "t".into(),
        id: id.to_owned(),
        host: "b".into(),
        valid_s: 60,
    };
    let read = async |node: &Remote, ticket: Option<&str>| {
        let export = ExportTemplateRequest {
            template: "t".into(),
        };
        // The host refuses older epochs since the import, and nodes know none.
        node.content(export, ticket, deadline().in_epoch(0)).await
    };
    let is_refused = async |node: &Remote, ticket: Option<&str>| {
        let refused = read(node, ticket).await.map(drop).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::PermissionDenied, "{refused}");
    };
    is_refused(&b, None).await;
    is_refused(&b, Some(&ticket)).await;
    // No node makes tickets.
    let refused = b.admit_fetch(admit(&facts.id), deadline()).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::PermissionDenied);
    controller
        .admit_fetch(admit("another"), deadline())
        .await
        .unwrap();
    is_refused(&b, Some(&ticket)).await;
    controller
        .admit_fetch(admit(&facts.id), deadline())
        .await
        .unwrap();
    is_refused(&c, Some(&ticket)).await;
    let mut content = read(&b, Some(&ticket)).await.unwrap();
    assert_eq!(content.recv().await.unwrap().unwrap(), "content");
    // The controller itself needs none.
    read(&controller, None).await.map(drop).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_segments_of_urls_and_redirects_are_not_followed() {
    let army = army().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let credentials = army
        .authority
        .credentials(&Member::Node("a".into()))
        .unwrap();
    let tls = Identity::new(&credentials).unwrap().server(false).unwrap();
    let server = Server::new(listener, Some(tls), Limits::MEMBERS);
    let (seen, mut paths) = tokio::sync::mpsc::unbounded_channel();
    let elsewhere = axum::Router::new().fallback(move |request: axum::extract::Request| {
        let _ = seen.send(request.uri().to_string());
        async { axum::response::Redirect::temporary("/elsewhere") }
    });
    tokio::spawn(server.serve(elsewhere, Stop::default().stopping()));
    let controller = army.authority.credentials(&Member::Controller).unwrap();
    let controller = node(&controller, "a", address);
    for (template, path) in [
        ("a/../b", Some("/v2/content/a%2F..%2Fb")),
        ("a?b#c%2F", Some("/v2/content/a%3Fb%23c%252F")),
        ("..", None),
        ("", None),
    ] {
        let export = ExportTemplateRequest {
            template: template.into(),
        };
        let refused = controller.content(export, None, deadline()).await;
        let kind = refused.map(drop).unwrap_err().kind;
        match path {
            Some(path) => {
                assert_eq!(kind, ErrorKind::HostUnreachable);
                assert_eq!(paths.recv().await.unwrap(), path);
            }
            None => assert_eq!(kind, ErrorKind::InvalidRequest),
        }
        assert!(paths.is_empty(), "the redirect was followed");
    }
}
