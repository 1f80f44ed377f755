//! Calls to nodes in the present epoch of their host.
//!
//! Every node of the controller is wrapped in [`Fenced`]. It adds the host's epoch to each call. Where
//! the node has seen a newer one, the host was given to another controller: the epoch is read again
//! from the database, and the call is made once more. A controller whose own term has ended notices
//! that there, and ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use army_node_api::chunks::ChunkReceiver;
use army_node_api::requests::{ImportTemplateRequest, TemplateFacts};
use army_node_api::{Call, Error, ErrorKind, NodeApi, Reply, Result};

use crate::operation_list::for_each_operation;
use crate::store::Store;

/// The epoch of a host, as this process knows it.
pub(crate) struct HostEpoch {
    host: String,
    store: Store,
    /// Whether the host's node is in this process, which then owns the host.
    is_own_host: bool,
    /// 0 where it was not read yet.
    known: AtomicU64,
}

impl HostEpoch {
    pub(crate) fn new(host: &str, store: Store, is_own_host: bool) -> Arc<Self> {
        Arc::new(Self {
            host: host.to_owned(),
            store,
            is_own_host,
            known: AtomicU64::new(0),
        })
    }

    /// Notes the epoch that was read from the database. Epochs never decrease.
    pub(crate) fn note(&self, epoch: u64) {
        self.known.fetch_max(epoch, Ordering::Relaxed);
    }

    /// The epoch for a call.
    async fn present(&self) -> Result<u64> {
        match self.known.load(Ordering::Relaxed) {
            0 => self.read().await,
            known => Ok(known),
        }
    }

    async fn read(&self) -> Result<u64> {
        let epoch = match self.is_own_host {
            true => self.store.claim_own_host(&self.host).await,
            false => self.store.host_epoch(&self.host).await,
        };
        let epoch = epoch.map_err(|error| {
            let kind = match error.kind {
                crate::ErrorKind::Superseded => ErrorKind::StaleEpoch,
                crate::ErrorKind::NotFound => ErrorKind::HostUnreachable,
                _ => ErrorKind::Internal,
            };
            Error::new(kind, error.message)
        })?;
        self.note(epoch);
        Ok(epoch)
    }

    /// The epoch in which a call is to be made again that was made in `epoch` and has failed with this
    /// error, if any; `None` where it is not to be made again.
    async fn newer(&self, epoch: u64, error: Option<ErrorKind>) -> Result<Option<u64>> {
        if error != Some(ErrorKind::StaleEpoch) {
            return Ok(None);
        }
        let present = self.read().await?;
        Ok((present > epoch).then_some(present))
    }
}

/// A node whose calls are in the present epoch of its host.
pub(crate) struct Fenced {
    node: Arc<dyn NodeApi>,
    epoch: Arc<HostEpoch>,
}

impl Fenced {
    pub(crate) fn new(node: Arc<dyn NodeApi>, epoch: Arc<HostEpoch>) -> Self {
        Self { node, epoch }
    }
}

/// Passes calls on in the host's epoch, and once more where it is not the present one.
macro_rules! pass_on {
    ($($name:ident: $request:ty => $response:ty;)*) => {
        $(fn $name(&self, request: $request, call: Call) -> Reply<'_, $response> {
            Box::pin(async move {
                let epoch = self.epoch.present().await?;
                let ended = self.node.$name(request.clone(), call.in_epoch(epoch)).await;
                let error = ended.as_ref().err().map(|error| error.kind);
                match self.epoch.newer(epoch, error).await? {
                    Some(newer) => self.node.$name(request, call.in_epoch(newer)).await,
                    None => ended,
                }
            })
        })*
    };
}

impl NodeApi for Fenced {
    fn name(&self) -> &str {
        self.node.name()
    }

    fn address(&self) -> Option<SocketAddr> {
        self.node.address()
    }

    for_each_operation!(pass_on);

    fn import_template(
        &self,
        request: ImportTemplateRequest,
        content: ChunkReceiver,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        Box::pin(async move {
            // The content can be sent once only, so the epoch is read before.
            let epoch = self.epoch.read().await?;
            let call = call.in_epoch(epoch);
            self.node.import_template(request, content, call).await
        })
    }
}
