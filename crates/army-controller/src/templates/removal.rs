//! Removing templates: a template is in removal until no host has a copy of it any more.

use std::sync::Arc;
use std::time::Duration;

use army_api::operations::OperationKind;
use army_node_api::requests::RemoveTemplateRequest;
use futures_util::future::join_all;

use crate::operations::{Outcome, Output, Requester, StartedOperation, StoredRecord, detached};
use crate::store::reservations::Reservation;
use crate::store::template_names::TemplateKey;
use crate::{Controller, Error, ErrorKind, Result, deadlines};

/// How long to wait before hosts are asked again that could not remove their copies, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The same at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Controller {
    /// Begins to remove a template that nothing uses, also from its hosts. From then on nothing can
    /// use it. A host that does not answer is waited for.
    ///
    /// # Errors
    /// [`ErrorKind::Forbidden`] where the caller does not own the template, and
    /// [`ErrorKind::Conflict`] where VMs, a tag or a copy in progress use the template.
    pub async fn remove_template(
        self: &Arc<Self>,
        requester: &Requester,
        name: &str,
    ) -> Result<StartedOperation> {
        let caller = requester.template_caller();
        let template = self.store.find_template(name, caller).await?;
        caller.check_may_change(&template)?;
        let template = TemplateKey::of(&template);
        let record = StoredRecord {
            store_name: Some(template.store_name.clone()),
        };
        let (kind, subject) = (OperationKind::RemoveTemplate, template.name.to_string());
        let new = self.new_request(requester, kind, &subject, &subject, &record)?;
        if let Some(known) = self.repeated(&new).await? {
            return Ok(known);
        }
        if let Some(running) = self.store.running_operation(kind, &subject).await? {
            return Ok(self.started(&running.id));
        }
        let controller = Arc::clone(self);
        detached(async move {
            let reservation = Reservation {
                removal: Some(&template),
                ..Reservation::default()
            };
            if let Some(known) = controller.begin(&new, reservation).await? {
                return Ok(known);
            }
            let (id, removing) = (new.id().to_owned(), Arc::clone(&controller));
            Ok(controller.carry_out(id.clone(), async move {
                removing.remove_copies(&id, &template.store_name).await
            }))
        })
        .await
    }

    /// Has all hosts remove their copies of a template, which is named as they store it, again and again until that is done, and then
    /// removes the template.
    pub(crate) async fn remove_copies(&self, operation: &str, name: &str) -> Outcome {
        let mut pause = FIRST_PAUSE;
        loop {
            // A host that is removed meanwhile has no copies any more.
            let hosts = self.store.copies(name).await?;
            let removals = hosts.iter().map(|host| self.remove_copy(name, host));
            let failures = join_all(removals).await.into_iter().zip(&hosts);
            let waiting: Vec<String> = failures
                .filter_map(|(removed, host)| Some(format!("{host}: {}", removed.err()?.message)))
                .collect();
            if waiting.is_empty() && self.store.finish_removal(name, operation).await? {
                return Ok(Output::Nothing);
            }
            if !waiting.is_empty() {
                let progress = format!("waits for {}", waiting.join("; "));
                self.store.set_progress(operation, &progress).await?;
            }
            tokio::time::sleep(pause).await;
            pause = LONGEST_PAUSE.min(pause.saturating_mul(2));
        }
    }

    async fn remove_copy(&self, name: &str, host: &str) -> Result<()> {
        let request = RemoveTemplateRequest {
            template: name.to_owned(),
        };
        let node = self.node(host)?;
        let removed = node.remove_template(request, deadlines::operation()).await;
        match removed.map_err(Error::from) {
            // An earlier attempt has removed it, or somebody has by hand.
            Err(error) if error.kind == ErrorKind::NotFound => {}
            removed => removed?,
        }
        self.store.remove_copy(name, host).await
    }
}
