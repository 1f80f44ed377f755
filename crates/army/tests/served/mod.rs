//! The API on a port of its own, with a host that has no VMs and either database.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use army::server::{self, Doors};
use army_api::client::Client;
use army_api::keys::{CreateKey, NewKey, Role};
use army_api::templates::Template;
use army_api::vms::{Vm, VmState};
use army_controller::testing::Records;
use army_controller::{Controller, Database};
use army_node::{Node, NodeService};
use army_node_api::NodeApi;
use army_node_api::serve::{Limits, Stop};
use tokio::task::JoinHandle;

/// Runs each test with each kind of database. A test gets the PostgreSQL to use, or `None` for SQLite;
/// after `with`, it gets what that function makes of it.
#[allow(unused_macros)]
macro_rules! on_each_database {
    (with $start:path; $($name:ident,)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name($start(None).await).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let postgres = Some(super::served::Postgres::start());
                super::$name($start(postgres).await).await;
            })*
        }
    };
    ($($name:ident,)*) => {
        on_each_database! { with std::future::ready; $($name,)* }
    };
}
#[allow(unused_imports)]
pub(crate) use on_each_database;

pub struct Server {
    pub url: String,
    pub admin: Client,
    pub records: Records,
    pub controller: Arc<Controller>,
    pub dir: tempfile::TempDir,
    router: axum::Router,
    pub stop: Stop,
    /// Ends when the server has stopped.
    pub serving: JoinHandle<()>,
    _postgres: Option<Postgres>,
}

/// A PostgreSQL of one test's own.
pub struct Postgres(army_controller::testing::Postgres);

impl Postgres {
    pub fn start() -> Self {
        // What a test writes need not survive a loss of power.
        let started = army_controller::testing::Postgres::start(Path::new("/tmp"), &["-F"]);
        let started = started.unwrap();
        Self(started.expect("PostgreSQL is missing: cargo xtask setup"))
    }

    pub fn url(&self) -> String {
        self.0.url("postgres")
    }

    /// The URL of a new database, as soon as the server has started.
    pub fn create_database(&self, name: &str) -> String {
        self.0.create_database(name).unwrap()
    }

    pub async fn open(&self) -> Database {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            match Database::open(&self.url()).await {
                Ok(database) => return database,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

pub async fn server(postgres: Option<Postgres>) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let database = match &postgres {
        Some(postgres) => postgres.open().await,
        None => Database::open(&Database::sqlite_url(&path.join("army.db")))
            .await
            .unwrap(),
    };
    let node = tokio::task::spawn_blocking(move || {
        let runtime = clone_host::runtime::Runtime::at(&path.join("run")).unwrap();
        let templates = clone_template::Store::at(path.join("templates"));
        Node::open("here".into(), path.join("vms"), runtime, templates).unwrap()
    });
    let node = NodeService::in_process(node.await.unwrap());
    serve(dir, database, Arc::new(node), postgres, |doors| doors).await
}

/// The API over one host, with a database in a file.
pub async fn server_of(node: Arc<dyn NodeApi>) -> Server {
    server_with(node, |doors| doors).await
}

/// The same with other limits.
pub async fn server_with(node: Arc<dyn NodeApi>, change: impl FnOnce(Doors) -> Doors) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let database = Database::open(&url).await.unwrap();
    serve(dir, database, node, None, change).await
}

/// The API over one host, with either database.
pub async fn server_over(node: Arc<dyn NodeApi>, postgres: Option<Postgres>) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let database = match &postgres {
        Some(postgres) => postgres.open().await,
        None => {
            let url = Database::sqlite_url(&dir.path().join("army.db"));
            Database::open(&url).await.unwrap()
        }
    };
    serve(dir, database, node, postgres, |doors| doors).await
}

async fn serve(
    dir: tempfile::TempDir,
    database: Database,
    node: Arc<dyn NodeApi>,
    postgres: Option<Postgres>,
    change: impl FnOnce(Doors) -> Doors,
) -> Server {
    let records = Records::of(&database);
    let controller = Arc::new(Controller::of_one_host(database, node));
    controller.recover().await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = Stop::default();
    let doors = change(Doors::new(stop.stopping()));
    let router = server::router_with(Arc::clone(&controller), doors);
    let over_tls = router.clone();
    let plain = army_node_api::serve::Server::new(listener, None, Limits::STRANGERS);
    let serving = tokio::spawn(plain.serve(router, stop.stopping()));
    let key = create_key(&records, "root", Role::Admin, None).await;
    Server {
        admin: Client::new(&url, key.secret).unwrap(),
        url,
        records,
        controller,
        dir,
        router: over_tls,
        stop,
        serving,
        _postgres: postgres,
    }
}

pub async fn create_key(
    records: &Records,
    tenant: &str,
    role: Role,
    max_vms: Option<u32>,
) -> NewKey {
    let asked = CreateKey {
        max_vms,
        ..CreateKey::new(tenant, role)
    };
    records.create_key(&asked).await.unwrap()
}

impl Server {
    /// The same behind another address, encrypted.
    pub async fn over_tls(&self, config: rustls::ServerConfig) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let server = army_node_api::serve::Server::new(listener, Some(config), Limits::STRANGERS);
        tokio::spawn(server.serve(self.router.clone(), self.stop.stopping()));
        url
    }

    pub async fn client(&self, tenant: &str, role: Role) -> Client {
        let key = create_key(&self.records, tenant, role, None).await;
        Client::new(&self.url, key.secret).unwrap()
    }
}

pub fn template(name: &str) -> Template {
    Template {
        name: name.into(),
        id: "0".repeat(32),
        host: "here".into(),
        hosts: vec!["here".into()],
        memory_bytes: 256 << 20,
        data_bytes: 1 << 20,
        vcpus: 1,
        taken_ms: 1,
        ..Template::default()
    }
}

/// The record of a VM that no host has.
pub fn record(id: &str, name: &str, tenant: &str) -> Vm {
    Vm {
        id: id.to_owned(),
        name: name.to_owned(),
        tenant: tenant.to_owned(),
        template: "t".to_owned(),
        host: "here".to_owned(),
        state: VmState::Creating,
        reason: None,
        labels: BTreeMap::new(),
        created_ms: 1,
        expires_ms: None,
        network: None,
        idle: None,
        fork: None,
        addresses: Vec::new(),
        notices: Vec::new(),
        memory: None,
    }
}
