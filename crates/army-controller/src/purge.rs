//! Removing the records of VMs that ended long ago.

use std::sync::Arc;
use std::time::Duration;

use army_node_api::time::now_ms;

use crate::{Controller, Result, loops};

/// How long the record of a VM that has ended is kept, where nothing else is set.
pub const DEFAULT_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// How often it is looked for such records.
const ROUND: Duration = Duration::from_secs(60);
/// The pause between two transactions, in which others write.
const PAUSE: Duration = Duration::from_millis(50);

impl Controller {
    /// Lets the records of VMs that have ended be kept for so long.
    #[must_use]
    pub fn keeping_ended_vms(mut self, kept: Duration) -> Self {
        self.kept_ended = kept;
        self
    }

    /// Removes records, without an end.
    pub(crate) async fn purge(self: Arc<Self>) {
        loop {
            self.loops.begin_round(loops::PURGE);
            if let Err(error) = self.purge_once().await {
                tracing::warn!(%error, "cannot remove records of VMs that ended long ago");
            }
            tokio::time::sleep(ROUND).await;
        }
    }

    /// Removes what is to be removed now. Only the controller with the oldest term does.
    pub(crate) async fn purge_once(&self) -> Result<()> {
        let live = self.store.live_controllers().await?;
        if live.first() != Some(self.store.term()) {
            return Ok(());
        }
        let before_ms = now_ms().saturating_sub(self.kept_ended.as_millis() as u64);
        while self.store.purge_ended(before_ms).await? > 0 {
            self.loops.begin_round(loops::PURGE);
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}
