//! Direct access to the database, for tests and measurements: they need VMs and templates that no
//! host has. `postgres` has a server for them.

mod postgres;

use std::collections::BTreeMap;

use army_api::keys::{CreateKey, NewKey};
use army_api::templates::Template;
use army_api::vms::{ForkTimes, Vm, VmFilter, VmPage, VmState};
use army_node_api::requests::VmReport;

use crate::store::Store;
use crate::store::creation::{Forked, NewVms};
use crate::store::template_names::TemplateName;
use crate::store::tenants::Nominal;
use crate::store::vm_states::StateChange;
use crate::{Cluster, Database, Error, ErrorKind, Result};

pub use postgres::Postgres;

/// What a controller needs that reaches its hosts by simulation only.
pub(crate) fn no_cluster() -> Result<Cluster> {
    let builder =
        rustls::ClientConfig::builder_with_provider(army_node_api::cluster::tls::provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))?;
    let tls = builder.with_root_certificates(rustls::RootCertStore::empty());
    Ok(Cluster {
        tls: tls.with_no_client_auth(),
        fingerprint: String::new(),
    })
}

/// Writes records as the controller does.
#[derive(Clone)]
pub struct Records(Store);

impl Records {
    /// The records of a database, beside the controller that uses it.
    pub fn of(database: &Database) -> Self {
        Self(database.0.clone())
    }

    /// Records a template.
    pub async fn insert_template(&self, template: &Template) -> Result<()> {
        self.0.insert_template(template, None).await
    }

    /// Records that another host has a template.
    pub async fn insert_copy(&self, template: &str, host: &str) -> Result<()> {
        self.0.insert_copy(template, host).await
    }

    /// Lets a tag point to a template.
    pub async fn tag(&self, tag: &str, template: &str) -> Result<()> {
        self.0.tag(&TemplateName::recorded(tag), template).await
    }

    /// Creates a key.
    pub async fn create_key(&self, request: &CreateKey) -> Result<NewKey> {
        self.0.create_key(request, None).await
    }

    /// Records VMs that are about to be created.
    pub async fn insert_vms(
        &self,
        vms: &[Vm],
        environment: &BTreeMap<String, String>,
    ) -> Result<()> {
        let new = NewVms {
            vms,
            template: None,
            environment,
            host_labels: &BTreeMap::new(),
            operation: None,
            nominal: Nominal::default(),
        };
        self.0.insert_vms(&new).await
    }

    /// Records that a VM was created, with its times and its notices.
    pub async fn record_fork(&self, id: &str, times: ForkTimes, notices: &[String]) -> Result<()> {
        let forked = Ok(Forked {
            times,
            notices: notices.to_vec(),
            addresses: Vec::new(),
        });
        self.0.record_fork_results(&[(id, &forked)], None).await
    }

    /// Records a state of VMs.
    pub async fn set_vm_states(&self, ids: &[String], state: VmState, reason: &str) -> Result<()> {
        self.0.set_vm_states(ids, state, reason).await
    }

    /// Records the states and the memory of VMs, as their host reports them.
    pub async fn apply_node_report(&self, reports: &[VmReport]) -> Result<()> {
        let changes = reports.iter().map(|report| StateChange {
            id: &report.id,
            state: report.state,
            reason: report.reason.as_deref(),
            unless_changed_since: None,
        });
        let changes: Vec<_> = changes.collect();
        self.0.change_vm_states(&changes).await?;
        let measured = reports.iter();
        let measured =
            measured.filter_map(|it| Some((it.id.clone(), it.memory?, it.addresses.clone())));
        let measured: Vec<_> = measured.collect();
        self.0.record_memory(&measured).await
    }

    /// Lets the lease of this database's controller be over, as if it had not been renewed for long.
    pub async fn expire_lease(&self) -> Result<()> {
        self.0.expire_lease().await
    }

    /// The hosts that each controller owns, whether its term lasts or not. Those that nobody owns are
    /// in the list of the empty name.
    pub async fn hosts_by_owner(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let mut owners: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for host in self.0.hosts().await? {
            let owner = host.owner.unwrap_or_default();
            owners.entry(owner).or_default().push(host.name);
        }
        Ok(owners)
    }

    /// The id of this database's controller.
    pub fn controller_id(&self) -> String {
        self.0.term().id.clone()
    }

    /// Inserts VMs by SQL, as many as a large fleet has: `alive` VMs that run on `hosts` hosts, and
    /// `ended` that ended long ago. Their ids are [`fleet_vm_id`].
    pub async fn fill(&self, hosts: u32, alive: u32, ended: u32) -> Result<()> {
        self.0.fill(hosts, alive, ended).await
    }

    /// Spoils the record of a VM as no release does.
    pub async fn spoil_vm(&self, id: &str) -> Result<()> {
        self.0.spoil_vm(id).await
    }

    /// One VM.
    pub async fn vm(&self, id: &str) -> Result<Vm> {
        self.0.vm(id).await
    }

    /// A page of VMs.
    pub async fn vms(&self, filter: &VmFilter) -> Result<VmPage> {
        self.0.vms(filter, None).await
    }
}

/// The id of a VM of [`Records::fill`] that runs, by its number from 1.
pub fn fleet_vm_id(number: u32) -> String {
    format!("fleet-{number}")
}

/// The name of the host of that VM, of so many hosts.
pub fn fleet_host(number: u32, hosts: u32) -> String {
    format!("host-{}", number % hosts.max(1))
}
