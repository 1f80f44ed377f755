//! A host with a template, and Army's server on it in this process.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use army_api::client::Client;
use army_api::keys::{CreateKey, Role};
use army_api::templates::RegisterTemplate;
use army_api::vms::{CreateVms, CreatedVms, Vm};
use army_controller::testing::Records;
use army_controller::{Controller, Database, Requester};
use army_node::{Node, NodeService};
use clone_host::launch::fork;
use clone_start::VmDir;

use super::super::fork::ForkBench;
use crate::context::Context;
use crate::guests::Machine;

/// The template's name.
pub(super) const TEMPLATE: &str = "base";

/// A server of the API, without VMs.
pub(crate) struct Server {
    pub(crate) controller: Arc<Controller>,
    pub(crate) records: Records,
    url: String,
    key: String,
}

impl Server {
    /// On a port of its own, with its database in `state`; looked after as `army dev` does where
    /// it is `alive`, else nobody looks at what VMs there really are.
    pub(crate) async fn start(state: &Path, node: Arc<Node>, alive: bool) -> Result<Self> {
        let url = Database::sqlite_url(&state.join("army.db"));
        let database = Database::open(&url).await?;
        let records = Records::of(&database);
        let service = Arc::new(NodeService::in_process(node));
        let controller = Arc::new(Controller::of_one_host(database, service));
        controller.recover().await?;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let router = army::server::router(Arc::clone(&controller));
        tokio::spawn(async move { axum::serve(listener, router).await });
        if alive {
            tokio::spawn(Arc::clone(&controller).reconcile());
        }
        let admin = CreateKey::new("root", Role::Admin);
        let key = controller.create_key(&admin).await?.secret;
        Ok(Self {
            controller,
            records,
            url,
            key,
        })
    }

    /// A client with connections of its own.
    pub(crate) fn client(&self) -> Result<Client> {
        Ok(Client::new(&self.url, &self.key)?)
    }
}

/// All of it.
pub(super) struct Rig<'a> {
    pub(super) node: Arc<Node>,
    pub(super) controller: Arc<Controller>,
    pub(super) client: Client,
    server: Server,
    tokio: tokio::runtime::Runtime,
    /// The template, and forks of it without Army.
    pub(super) forks: ForkBench<'a>,
}

impl<'a> Rig<'a> {
    pub(super) fn new(context: &'a Context) -> Result<Self> {
        let machine = Machine::standard(context, "vmlinux");
        let forks = ForkBench::new(context, TEMPLATE, &machine)?;
        forks.train()?;
        let tokio = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
        let state = context.scratch("army");
        std::fs::create_dir_all(&state)?;
        let node = Node::open(
            "here".to_owned(),
            state.join("vms"),
            forks.runtime.clone(),
            clone_template::Store::at(context.scratch("templates")),
        )?;
        node.supervise()?;
        let server = tokio.block_on(Server::start(&state, Arc::clone(&node), true))?;
        let client = server.client()?;
        let asked = RegisterTemplate {
            name: TEMPLATE.to_owned(),
            ..RegisterTemplate::default()
        };
        tokio.block_on(async {
            let controller = &server.controller;
            let requester = Requester::default();
            let started = controller.register_template(&requester, asked).await?;
            controller.outcome(started, None).await
        })?;
        Ok(Self {
            node,
            controller: Arc::clone(&server.controller),
            client,
            server,
            tokio,
            forks,
        })
    }

    /// What comes of `work`, which may use everything here.
    pub(super) fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.tokio.block_on(work)
    }

    pub(super) fn client(&self) -> Result<Client> {
        self.server.client()
    }

    pub(super) fn vm_dir(&self, id: &str) -> VmDir {
        self.forks
            .runtime
            .dir(&format!("{}{id}", army_node::VM_PREFIX))
    }

    /// A VM of that name, through the API.
    pub(super) fn create(&self, name: &str) -> Result<Vm> {
        let asked = CreateVms {
            template: TEMPLATE.to_owned(),
            count: 1,
            name: Some(name.to_owned()),
            ..CreateVms::default()
        };
        let made: CreatedVms =
            self.wait(async { Ok(self.client.create("/v1/vms", &asked, None).await?) })?;
        made.vms.into_iter().next().context("the answer has no VM")
    }

    pub(super) fn destroy(&self, vm: &Vm) -> Result<()> {
        self.wait(async { Ok(self.controller.destroy(vm).await.map(drop)?) })
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        // Of a bench that failed; its VMs outlive their server.
        for vm in self.forks.runtime.running().unwrap_or_default() {
            if vm.dir.name().starts_with(army_node::VM_PREFIX) {
                fork::end(&self.forks.runtime, &vm);
            }
        }
    }
}
