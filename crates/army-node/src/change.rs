//! Changes of VMs that run: their time to live, their idle policy, and their network policy.

use army_node_api::requests::UpdateVmRequest;
use army_node_api::{ErrorKind, Result, validate};
use clone_host::launch::fork;

use crate::supervise::boot_ms;
use crate::{Node, lock};

impl Node {
    /// Changes a VM, unless a newer change was made before.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM has ended or is being created.
    pub fn update(&self, request: &UpdateVmRequest) -> Result<()> {
        // Two changes at the same time would leave the policy of one and the record of the other.
        self.turns
            .take(&request.vm, || self.update_in_turn(request))
    }

    fn update_in_turn(&self, request: &UpdateVmRequest) -> Result<()> {
        let entry = self.journal.get(&request.vm)?;
        entry.check_changeable()?;
        if request.revision <= entry.revision {
            return Ok(());
        }
        if let Some(network) = &request.network {
            let wanted = validate::egress(network)?;
            // The policy of a suspended VM comes into force before it goes on.
            if !entry.suspended {
                let vm = self.find(&request.vm)?;
                let ceiling = match entry.ceiling {
                    Some(ceiling) => ceiling,
                    // What the template permits was not recorded. What is in force is within it.
                    None => fork::egress(&vm)?,
                };
                fork::set_egress(&vm, &wanted, &ceiling, network.host)?;
            }
        }
        // The idle time begins with the change.
        self.mark_used(&request.vm);
        let updated = self.journal.update(&request.vm, |entry| {
            entry.revision = request.revision;
            if let Some(lifetime) = request.lifetime {
                entry.expires_ms = lifetime.expires_ms;
                entry.ttl_ms = lifetime.ttl_ms;
                *entry = entry.beginning(boot_ms());
                if entry.suspended {
                    // The host may be restarted meanwhile, and its clock since the start with it.
                    entry.ends_ms = None;
                }
            }
            if let Some(change) = request.idle {
                entry.idle = change.policy;
            }
            if let Some(network) = &request.network {
                entry.network = Some(network.clone());
            }
        });
        if updated
            .as_ref()
            .is_err_and(|it| it.kind == ErrorKind::Conflict)
        {
            // The VM has ended meanwhile, and with it its usage.
            lock(&self.usage).remove(&request.vm);
        }
        updated
    }
}

#[cfg(test)]
mod tests {
    use army_api::vms::{IdleAction, IdlePolicy};
    use army_node_api::requests::{IdleChange, Lifetime};
    use clone_host::runtime::Runtime;
    use clone_template::Store;

    use super::*;
    use crate::journal::{Entry, Stage};

    #[test]
    fn a_change_is_journalled_once_and_an_older_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let runtime = Runtime::at(&path("run")).unwrap();
        let store = Store::at(path("templates"));
        let node = Node::open("here".into(), path("state"), runtime, store).unwrap();
        let mut entry = Entry::new("1".to_owned(), 1, "a".to_owned());
        entry.ttl_ms = Some(1000);
        node.journal.begin(&entry.beginning(boot_ms())).unwrap();
        let idle = IdlePolicy {
            after_s: 60,
            action: IdleAction::Pause,
        };
        let request = |revision, ttl_ms, policy| UpdateVmRequest {
            vm: "1".into(),
            revision,
            lifetime: Some(Lifetime {
                ttl_ms,
                expires_ms: None,
            }),
            idle: Some(IdleChange { policy }),
            network: None,
        };
        let refused = node.update(&request(1, None, None)).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        node.journal.advance("1", Stage::Running).unwrap();
        let before = boot_ms();
        node.update(&request(2, Some(5000), Some(idle))).unwrap();
        let changed = node.journal.get("1").unwrap();
        assert!(changed.ends_ms.unwrap() >= before + 5000);
        assert_eq!((changed.idle, changed.revision), (Some(idle), 2));
        // Requests may overtake each other.
        node.update(&request(1, None, None)).unwrap();
        assert_eq!(node.journal.get("1").unwrap(), changed);
        node.update(&request(3, None, None)).unwrap();
        let changed = node.journal.get("1").unwrap();
        assert_eq!(
            (changed.ends_ms, changed.ttl_ms, changed.idle),
            (None, None, None)
        );
        node.destroy("1", "destroyed").unwrap();
        let refused = node.update(&request(4, Some(1), None)).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        let unknown = UpdateVmRequest {
            vm: "2".into(),
            ..request(1, None, None)
        };
        assert_eq!(node.update(&unknown).unwrap_err().kind, ErrorKind::NotFound);
    }
}
