//! Creating VMs: as clones of templates, and as forks of running VMs.

use std::sync::Arc;

use army_node_api::requests::{CreatedVm, VmSpec};
use army_node_api::{Error, ErrorKind, Result, validate};
use clone_host::launch::fork::{self, Overrides, Source};

use crate::figures::addresses;
use crate::journal::{Entry, Stage};
use crate::supervise::boot_ms;
use crate::{Node, lock, vm_name};

impl Node {
    /// Creates clones of a template. The results are in the order of `vms`. A VM that is known in
    /// its epoch or a later one is refused, and not created twice.
    pub fn create(&self, template: &str, vms: &[VmSpec]) -> Vec<Result<CreatedVm>> {
        match self.source(template) {
            Ok(source) => {
                let created = self.fork(&source, vms);
                if created.iter().any(Result::is_err) {
                    // The template's files may have been replaced: the next request opens them
                    // again.
                    lock(&self.sources).remove(template);
                }
                created
            }
            Err(error) => all_failed(vms, &error),
        }
    }

    /// Creates forks of a running VM, which continues to run.
    pub fn fork_vm(&self, parent: &str, vms: &[VmSpec]) -> Vec<Result<CreatedVm>> {
        let source = self
            .find_awake(parent)
            .and_then(|vm| Ok(Source::live(&self.runtime, &vm)?));
        match source {
            Ok((source, _)) => self.fork(&source, vms),
            Err(error) => all_failed(vms, &error),
        }
    }

    fn fork(&self, source: &Source, vms: &[VmSpec]) -> Vec<Result<CreatedVm>> {
        // The VMs of a request have the same network policy.
        let network = vms.first().and_then(|vm| vm.network.as_ref());
        let egress = match network.map(validate::egress).transpose() {
            Ok(egress) => egress,
            Err(error) => return all_failed(vms, &error),
        };
        // VMs are in the journal before they are created: whatever process dies in between, no VM
        // is unknown.
        let ceiling = source.egress_ceiling();
        let begin = |vm: &VmSpec| {
            let mut entry = Entry::from(vm).beginning(boot_ms());
            entry.ceiling.clone_from(&ceiling);
            self.journal.begin(&entry)
        };
        let begun: Vec<Result<()>> = vms.iter().map(begin).collect();
        let accepted: Vec<&VmSpec> = vms
            .iter()
            .zip(&begun)
            .filter_map(|(vm, begun)| begun.is_ok().then_some(vm))
            .collect();
        let names: Vec<String> = accepted.iter().map(|vm| vm_name(&vm.id)).collect();
        let overrides = Overrides {
            egress,
            reach_host: Some(network.is_some_and(|it| it.host)),
            host_names: accepted.iter().map(|vm| vm.name.clone()).collect(),
            ..Overrides::default()
        };
        let forked = fork::fork(&self.runtime, source, &names, &overrides, true);
        let created = forked.into_iter().zip(&accepted).map(|(forked, vm)| {
            let forked = forked.map_err(Error::from);
            let stage = match &forked {
                Ok(_) => Stage::Running,
                Err(error) => Stage::Failed(error.message.clone()),
            };
            self.journal.advance(&vm.id, stage)?;
            self.mark_used(&vm.id);
            forked.map(|forked| CreatedVm {
                warm: forked.warm,
                running_us: forked.running_us,
                identity_us: forked.identity_us.unwrap_or(0),
                notices: forked.notices,
                addresses: self
                    .find(&vm.id)
                    .map(|it| addresses(&it))
                    .unwrap_or_default(),
            })
        });
        let mut created = created.collect::<Vec<_>>().into_iter();
        let missing = || Err(Error::new(ErrorKind::Internal, "the fork has no result"));
        begun
            .into_iter()
            .map(|begun| begun.and_then(|()| created.next().unwrap_or_else(missing)))
            .collect()
    }

    /// A template that is open to be forked.
    fn source(&self, name: &str) -> Result<Arc<Source>> {
        if let Some(source) = lock(&self.sources).get(name) {
            return Ok(Arc::clone(source));
        }
        let source = Source::template(&self.open_template(name)?, &self.runtime)?;
        let source = Arc::new(source);
        lock(&self.sources).insert(name.to_owned(), Arc::clone(&source));
        Ok(source)
    }
}

fn all_failed(vms: &[VmSpec], error: &Error) -> Vec<Result<CreatedVm>> {
    vms.iter().map(|_| Err(error.clone())).collect()
}
