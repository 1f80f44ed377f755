//! VMs that exist: reading, ending, pausing, and reaching into their guests.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use agent_client::{Connection, Deadline};
use army_api::changes::ChangeVm;
use army_api::templates::Template;
use army_api::vms::{Balloon, Vm, VmFilter, VmPage, VmState};
use army_node_api::requests::{
    BalloonRequest, ConnectAgentRequest, DestroyVmRequest, PauseVmRequest, ResumeVmRequest,
    SuspendVmRequest,
};

use crate::admission::{AdmittedRequest, Refusal};
use crate::changes::within;
use crate::error::RETRY_S;
use crate::scheduler::Need;
use crate::store::vms::VmOwner;
use crate::{Controller, Error, ErrorKind, Node, Requester, Result, deadlines};

/// How long whoever connects to a guest waits for a VM that is between two hosts.
const MOVE_PATIENCE: Duration = Duration::from_secs(60);
/// How often such a VM is looked at.
const MOVE_LOOK: Duration = Duration::from_millis(100);

/// Why a VM ended that a client destroyed.
pub(crate) const DESTROYED: &str = "destroyed";

impl Controller {
    /// The VM that a caller of the tenant `own` means by `key`: its id, the name of a VM of that
    /// tenant that has not ended, or `TENANT/NAME`. Only VMs of the tenant `scope` are found where
    /// one is given.
    pub async fn vm(&self, key: &str, own: &str, scope: Option<&str>) -> Result<Vm> {
        self.store.find_vm(key, VmOwner { own, scope }).await
    }

    /// A page of the VMs that a caller can see.
    pub async fn vms(&self, filter: &VmFilter, requester: &Requester) -> Result<VmPage> {
        let tenant = (!requester.is_administrator).then_some(requester.tenant.as_str());
        let Some(name) = &filter.template else {
            return self.store.vms(filter, tenant).await;
        };
        let found = self.store.find_template(name, requester.template_caller());
        let store_name = match found.await {
            Ok(template) => template.stored_as().to_owned(),
            // VMs that have ended may be of a template that was removed, or `vm:` and an id.
            Err(error) if error.kind == ErrorKind::NotFound => name.clone(),
            Err(error) => return Err(error),
        };
        let filter = VmFilter {
            template: Some(store_name),
            ..filter.clone()
        };
        self.store.vms(&filter, tenant).await
    }

    /// The variables that are added to the environment of a VM's commands.
    pub async fn environment(&self, vm: &Vm) -> Result<BTreeMap<String, String>> {
        self.store.environment(&vm.id).await
    }

    /// The node of a VM that has not ended and is not being moved, for what changes the VM.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] for other VMs.
    pub(crate) fn node_of(&self, vm: &Vm) -> Result<Node> {
        if vm.state == VmState::Migrating {
            let message = format!("the VM {} is being moved to another host", vm.name);
            return Err(Error::new(ErrorKind::Conflict, message)
                .advise("try again when it is there")
                .retry_after(RETRY_S));
        }
        self.present_node_of(vm)
    }

    /// The node of a VM that has not ended, for what only looks at the VM.
    pub(crate) fn present_node_of(&self, vm: &Vm) -> Result<Node> {
        if vm.state.is_alive() {
            return self.node(&vm.host);
        }
        let reason = vm.reason.as_deref().unwrap_or("the reason is unknown");
        let message = format!("the VM {} has ended: {reason}", vm.name);
        Err(Error::new(ErrorKind::Conflict, message))
    }

    /// Connects to the agent in a VM. The connection is for one request, which must end within
    /// `limit`; the VM counts as used while the connection lives, or what becomes of it.
    ///
    /// A suspended VM is woken.
    /// One that is being moved answers where it runs; in the instant in between, it is waited for.
    pub async fn agent(&self, vm: &Vm, limit: Duration) -> Result<Connection> {
        let end = Instant::now() + MOVE_PATIENCE;
        let mut vm = vm.clone();
        loop {
            let error = match self.connect_agent(&vm, limit).await {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            match self.moved_since(&vm).await? {
                Some(now) if Instant::now() < end => vm = now,
                _ => return Err(error),
            }
            tokio::time::sleep(MOVE_LOOK).await;
        }
    }

    /// The VM as it is now, where it has moved to another host since it was read, or is about to.
    pub async fn moved_since(&self, vm: &Vm) -> Result<Option<Vm>> {
        let now = self.store.vm(&vm.id).await?;
        let moves = now.state == VmState::Migrating || now.host != vm.host;
        Ok(moves.then_some(now))
    }

    async fn connect_agent(&self, vm: &Vm, limit: Duration) -> Result<Connection> {
        let node = self.present_node_of(vm)?;
        if vm.state == VmState::Suspended {
            self.resume(vm).await?;
        }
        let request = ConnectAgentRequest { vm: vm.id.clone() };
        let deadline = deadlines::agent();
        let stream = node.connect_agent(request, deadline.into()).await?;
        let mut connection = stream.open(deadline).await?;
        connection.set_deadline(Deadline::after(limit));
        Ok(connection)
    }

    /// Ends a VM. A VM that has ended is returned unchanged.
    pub async fn destroy(&self, vm: &Vm) -> Result<Vm> {
        if vm.state.is_alive() {
            self.store.request_deletion(&vm.id).await?;
            match self.destroy_on_host(vm).await {
                Ok(()) => {
                    let ids = [vm.id.clone()];
                    self.store
                        .set_vm_states(&ids, VmState::Ended, DESTROYED)
                        .await?;
                }
                // The VM is ended when its host answers again.
                Err(error) if error.kind == ErrorKind::HostUnavailable => {}
                Err(error) => return Err(error),
            }
        }
        self.store.vm(&vm.id).await
    }

    async fn destroy_on_host(&self, vm: &Vm) -> Result<()> {
        let request = DestroyVmRequest {
            vm: vm.id.clone(),
            reason: DESTROYED.to_owned(),
        };
        let node = self.node(&vm.host)?;
        Ok(node.destroy_vm(request, deadlines::operation()).await?)
    }

    /// Pauses a running VM.
    pub async fn pause(&self, vm: &Vm) -> Result<Vm> {
        let request = PauseVmRequest { vm: vm.id.clone() };
        let node = self.node_of(vm)?;
        node.pause_vm(request, deadlines::operation()).await?;
        self.record_state(vm, VmState::Paused).await
    }

    /// Suspends a running or paused VM.
    pub async fn suspend(&self, vm: &Vm) -> Result<Vm> {
        let request = SuspendVmRequest { vm: vm.id.clone() };
        let node = self.node_of(vm)?;
        node.suspend_vm(request, deadlines::transfer()).await?;
        self.record_state(vm, VmState::Suspended).await
    }

    /// Resumes a paused VM, and wakes a suspended one.
    pub async fn resume(&self, vm: &Vm) -> Result<Vm> {
        let request = ResumeVmRequest { vm: vm.id.clone() };
        let node = self.node_of(vm)?;
        let ceiling = self.store.tenant_network(&vm.tenant).await?;
        if within(vm.network.clone(), ceiling.as_ref())? != vm.network {
            // The tenant's policy has changed since. A change is always within it.
            self.change_vm(vm, &ChangeVm::default()).await?;
        }
        let _room = self.admit_resumption(vm).await?;
        if vm.state != VmState::Suspended {
            node.resume_vm(request, deadlines::operation()).await?;
            return self.record_state(vm, VmState::Running).await;
        }
        self.store.begin_resumption(&vm.id).await?;
        match node.resume_vm(request, deadlines::transfer()).await {
            Ok(()) => self.record_state(vm, VmState::Running).await,
            Err(error) => {
                // Where it is not known whether the host has resumed the VM, the next report says so.
                self.record_state(vm, VmState::Suspended).await?;
                Err(error.into())
            }
        }
    }

    /// Reserves the memory on a VM's host that the VM had given back while it was paused or suspended. A
    /// VM is on its host already, so a drained host resumes it.
    async fn admit_resumption(&self, vm: &Vm) -> Result<Option<AdmittedRequest>> {
        let memory = vm.memory.unwrap_or_default();
        let missing_bytes = match vm.state {
            // What the VM used before, as last measured.
            VmState::Suspended => memory.private_bytes + memory.swapped_bytes,
            _ => memory.swapped_bytes,
        };
        if missing_bytes == 0 {
            return Ok(None);
        }
        let origin = Template {
            name: vm.template.clone(),
            hosts: vec![vm.host.clone()],
            ..Template::default()
        };
        let mut views = self.host_views(&origin, &BTreeMap::new()).await?;
        views.retain(|view| view.name == vm.host);
        for view in &mut views {
            view.open = true;
        }
        let need = Need {
            cost_bytes: missing_bytes,
            ..Need::default()
        };
        let mut admitted = self.admission.admit()?;
        // It counts for itself, and not as what a clone of its template costs.
        let placed = admitted.place(views, &format!("resumed:{}", vm.id), need, 1);
        match placed {
            Ok(_) => Ok(Some(admitted)),
            Err(Refusal::Estimated(error) | Refusal::Final(error)) => Err(error),
        }
    }

    async fn record_state(&self, vm: &Vm, state: VmState) -> Result<Vm> {
        let ids = std::slice::from_ref(&vm.id);
        self.store.set_vm_states(ids, state, "").await?;
        self.store.vm(&vm.id).await
    }

    /// Reads a VM's balloon, after requesting the size `target_bytes` where it is given.
    pub async fn balloon(&self, vm: &Vm, target_bytes: Option<u64>) -> Result<Balloon> {
        let request = BalloonRequest {
            vm: vm.id.clone(),
            target_bytes,
        };
        let node = self.node_of(vm)?;
        Ok(node.balloon(request, deadlines::operation()).await?)
    }
}
