//! Holding the term of this controller as a writer of the database. What a term is says
//! [`store::leases`](crate::store::leases).

use std::sync::Arc;
use std::time::Duration;

use crate::{Controller, Error, ErrorKind, Result, loops};

/// How often the lease is renewed: three times in the time that it lasts.
const ROUND: Duration = Duration::from_secs(2);

impl Controller {
    /// Renews the lease of this controller, and takes its share of the hosts, until its term ends.
    /// Returns why it ended.
    pub async fn hold_term(self: Arc<Self>) -> Error {
        loop {
            self.loops.begin_round(loops::TERM);
            match self.store.keep_term(self.cluster.is_some()).await {
                Ok(true) => self.fleet_changed.notify_one(),
                Ok(false) => {}
                Err(error) if error.kind == ErrorKind::Superseded => return error,
                // The database is not there for the moment. Where another controller finds it before
                // this one does, the term ends.
                Err(error) => tracing::warn!(%error, "cannot renew the lease of this controller"),
            }
            tokio::select! {
                () = tokio::time::sleep(ROUND) => {}
                // A node or a transaction has found it.
                () = self.store.term_ended() => {}
            }
        }
    }

    /// Ends the term of this controller, so that others take over at once.
    ///
    /// # Errors
    /// Where the database cannot be used: then they take over when the lease has run out.
    pub async fn end_term(&self) -> Result<()> {
        self.store.end_term().await
    }
}
