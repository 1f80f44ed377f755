//! Changes of VMs that run.
//!
//! A change is recorded first, and then applied by the VM's host. A host that does not answer applies
//! it when it answers again; a change that a host refuses is taken back.

use army_api::changes::ChangeVm;
use army_api::vms::{MAX_SECONDS, NetworkPolicy, Vm};
use army_node_api::requests::{IdleChange, Lifetime, UpdateVmRequest};
use army_node_api::time::now_ms;
use army_node_api::{Call, validate};

use crate::store::changes::{Details, RequestedChange};
use crate::{Controller, Error, ErrorKind, Node, Result, deadlines};

/// The most labels of a VM.
const MAX_LABELS: usize = 64;

impl Controller {
    /// Changes a VM, and answers when its host has applied the change.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the VM has ended, even during the change, and
    /// [`ErrorKind::HostUnavailable`] where its host does not answer, which applies the change when
    /// it answers again.
    pub async fn change_vm(&self, vm: &Vm, request: &ChangeVm) -> Result<Vm> {
        check(request)?;
        let now = now_ms();
        let detail = describe(request);
        let ceiling = self.store.tenant_network(&vm.tenant).await?;
        let changed = self.store.change_vm(&vm.id, &detail, |details| {
            let (labels, mut enforced) = changed_details(details, request, now)?;
            enforced.network = within(enforced.network, ceiling.as_ref())?;
            Ok((labels, enforced))
        });
        if let Some((former, change)) = changed.await? {
            let node = self.node(&vm.host)?;
            match self.apply(&node, &change, deadlines::operation()).await {
                Ok(()) => {}
                Err(error) if is_pending(error.kind) => {
                    let message = format!(
                        "the change of the VM {} is recorded, and its host applies it when it \
                         answers again: {}",
                        vm.name, error.message
                    );
                    return Err(Error { message, ..error });
                }
                Err(error) => {
                    self.store.revert_change(&change, &former).await?;
                    return Err(match error.kind {
                        ErrorKind::NotFound => {
                            let message = format!("the VM {} has ended on its host", vm.name);
                            Error::new(ErrorKind::Conflict, message)
                        }
                        _ => error,
                    });
                }
            }
        }
        self.store.vm(&vm.id).await
    }

    /// Sends changes to a host that it has not applied, because it did not answer. The failure of one
    /// does not delay the others.
    ///
    /// # Errors
    /// The first failure, where there was one.
    pub(crate) async fn resend_changes(&self, node: &Node) -> Result<()> {
        let mut result = Ok(());
        for change in self.store.unapplied_changes(node.name()).await? {
            let limit = deadlines::question(node.as_ref());
            if let Err(error) = self.apply(node, &change, limit).await {
                tracing::debug!(vm = change.vm, %error, "a host cannot apply a change yet");
                let is_pending = is_pending(error.kind);
                result = result.and(Err(error));
                if is_pending {
                    break;
                }
            }
        }
        result
    }

    async fn apply(&self, node: &Node, change: &RequestedChange, call: Call) -> Result<()> {
        let enforced = &change.enforced;
        let remaining = |end: u64| end.saturating_sub(now_ms());
        let request = UpdateVmRequest {
            vm: change.vm.clone(),
            revision: change.revision,
            lifetime: Some(Lifetime {
                ttl_ms: enforced.expires_ms.map(remaining),
                expires_ms: enforced.expires_ms,
            }),
            idle: Some(IdleChange {
                policy: enforced.idle,
            }),
            network: enforced.network.clone(),
        };
        node.update_vm(request, call).await?;
        self.store.record_applied(&change.vm, change.revision).await
    }
}

/// The network policy of a VM within that of its tenant.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where both together are too many networks.
pub(crate) fn within(
    policy: Option<NetworkPolicy>,
    ceiling: Option<&NetworkPolicy>,
) -> Result<Option<NetworkPolicy>> {
    match (policy, ceiling) {
        (Some(policy), Some(ceiling)) => Ok(Some(validate::narrowed(&policy, ceiling)?)),
        (None, Some(ceiling)) => Ok(Some(ceiling.clone())),
        (policy, None) => Ok(policy),
    }
}

/// Whether a change that failed like this may still be applied, or has been.
fn is_pending(kind: ErrorKind) -> bool {
    use ErrorKind::{HostUnavailable, Internal, Timeout};
    matches!(kind, HostUnavailable | Timeout | Internal)
}

fn changed_details(details: Details, request: &ChangeVm, now: u64) -> Result<Details> {
    let (mut labels, mut enforced) = details;
    for (key, value) in &request.labels {
        match value {
            Some(value) => labels.insert(key.clone(), value.clone()),
            None => labels.remove(key),
        };
    }
    if labels.len() > MAX_LABELS {
        let message = format!("a VM has at most {MAX_LABELS} labels, not {}", labels.len());
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    if let Some(ttl_s) = request.ttl_s {
        enforced.expires_ms = ttl_s.map(|ttl| now.saturating_add(ttl.saturating_mul(1000)));
    }
    if let Some(idle) = request.idle {
        enforced.idle = idle;
    }
    if let Some(network) = &request.network {
        enforced.network = Some(network.clone());
    }
    Ok((labels, enforced))
}

/// Checks what can be checked before anything is recorded.
fn check(request: &ChangeVm) -> Result<()> {
    let idle = request.idle.flatten().map(|idle| idle.after_s);
    let times = [request.ttl_s.flatten(), idle];
    let is_invalid = |seconds: u64| !(1..=MAX_SECONDS).contains(&seconds);
    if times.into_iter().flatten().any(is_invalid) {
        let message = format!("`ttl_s` and `idle.after_s` must be 1 to {MAX_SECONDS}");
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    if let Some(network) = &request.network {
        validate::egress(network)?;
    }
    Ok(())
}

/// What is changed, in words for an event.
fn describe(request: &ChangeVm) -> String {
    let parts = [
        (request.ttl_s.is_some(), "time to live"),
        (request.idle.is_some(), "idle policy"),
        (request.network.is_some(), "network policy"),
        (!request.labels.is_empty(), "labels"),
    ];
    let changed = parts.iter().filter(|(is, _)| *is).map(|(_, name)| *name);
    let changed: Vec<&str> = changed.collect();
    match changed.is_empty() {
        true => "nothing".to_owned(),
        false => changed.join(", "),
    }
}
