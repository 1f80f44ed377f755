//! Direct access to the database, for tests and measurements: they need VMs and templates that no
//! host has.

use std::collections::{BTreeMap, HashSet};

use army_api::keys::{CreateKey, NewKey};
use army_api::templates::Template;
use army_api::vms::{ForkTimes, Vm, VmFilter, VmPage, VmState};
use army_node_api::requests::VmReport;

use crate::store::Store;
use crate::store::vms::NewVms;
use crate::{Database, Result};

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
        self.0.insert_template(template).await
    }

    /// Lets a tag point to a template.
    pub async fn tag(&self, tag: &str, template: &str) -> Result<()> {
        self.0.tag(tag, template).await
    }

    /// Creates a key.
    pub async fn create_key(&self, request: &CreateKey) -> Result<NewKey> {
        self.0.create_key(request).await
    }

    /// Records VMs that are about to be created.
    pub async fn insert_vms(
        &self,
        vms: &[Vm],
        environment: &BTreeMap<String, String>,
    ) -> Result<()> {
        let new = NewVms {
            vms,
            environment,
            request: None,
        };
        self.0.insert_vms(&new).await
    }

    /// Records that a VM was created, with its times and its notices.
    pub async fn record_fork(&self, id: &str, times: ForkTimes, notices: &[String]) -> Result<()> {
        let forked = Ok((times, notices.to_vec()));
        self.0.record_fork_result(id, &forked).await
    }

    /// Records a state of VMs.
    pub async fn set_vm_states(&self, ids: &[String], state: VmState, reason: &str) -> Result<()> {
        self.0.set_vm_states(ids, state, reason).await
    }

    /// Records what a host reports of its VMs.
    pub async fn apply_node_report(&self, host: &str, reports: &[VmReport]) -> Result<()> {
        let in_creation = HashSet::new();
        let applied = self.0.apply_node_report(host, reports, &in_creation);
        applied.await.map(drop)
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
