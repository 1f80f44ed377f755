//! Numbers of VMs by host and template.

use std::collections::HashMap;

use crate::scheduler::Need;

/// Numbers of VMs by host and template.
#[derive(Debug, Default, Clone)]
pub(super) struct Counts(HashMap<String, HashMap<String, Vms>>);

/// VMs of one template on one host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vms {
    /// The number of VMs.
    pub(super) count: u32,
    /// The private memory that each is expected to have, in bytes, where none was measured.
    pub(super) cost_bytes: u64,
    /// The memory size of each, in bytes.
    pub(super) nominal_bytes: u64,
}

impl Counts {
    /// Adds one VM.
    pub(super) fn add(&mut self, host: &str, template: &str, need: Need) {
        let vms = Vms {
            count: 1,
            cost_bytes: need.cost_bytes,
            nominal_bytes: need.nominal_bytes,
        };
        self.add_vms(host, template, vms);
    }

    fn add_vms(&mut self, host: &str, template: &str, vms: Vms) {
        let host = self.0.entry(host.to_owned()).or_default();
        let known = host.entry(template.to_owned());
        known
            .and_modify(|known| known.count = known.count.saturating_add(vms.count))
            .or_insert(vms);
    }

    /// Adds all of `other`.
    pub(super) fn merge(&mut self, other: &Self) {
        for (host, templates) in &other.0 {
            for (template, vms) in templates {
                self.add_vms(host, template, *vms);
            }
        }
    }

    /// Takes away all of `other`.
    pub(super) fn subtract(&mut self, other: &Self) {
        for (host, templates) in &other.0 {
            let Some(known) = self.0.get_mut(host) else {
                continue;
            };
            for (template, vms) in templates {
                if let Some(known) = known.get_mut(template) {
                    known.count = known.count.saturating_sub(vms.count);
                }
            }
            known.retain(|_, vms| vms.count > 0);
            if known.is_empty() {
                self.0.remove(host);
            }
        }
    }

    /// The numbers of one host.
    pub(super) fn of_host(&self, host: &str) -> Self {
        let templates = self.0.get(host).cloned();
        let templates = templates.map(|templates| (host.to_owned(), templates));
        Self(templates.into_iter().collect())
    }

    /// The VMs on a host, by template.
    pub(super) fn on(&self, host: &str) -> impl Iterator<Item = (&String, &Vms)> {
        self.0.get(host).into_iter().flatten()
    }
}
