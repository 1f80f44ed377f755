//! Keys: who may use the API.

use std::time::Duration;

use army_api::keys::{CreateKey, Key, NewKey};
use army_api::operations::OperationKind;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, timeout_at};

use crate::store::keys::KEY_REMOVED;
use crate::{Controller, Error, ErrorKind, Requester, Result};

/// How long the removal of a key by another controller of the same database may stay unnoticed.
const RECHECK: Duration = Duration::from_secs(5);

impl Controller {
    /// Whether there is any key.
    pub async fn has_keys(&self) -> Result<bool> {
        self.store.has_keys().await
    }

    /// Creates a key on a client's behalf. Its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the client has sent the request before.
    pub async fn create_requested_key(
        &self,
        requester: &Requester,
        request: &CreateKey,
    ) -> Result<NewKey> {
        check_tenant(request)?;
        let kind = OperationKind::CreateKey;
        let new = self.new_request(requester, kind, &request.tenant, request, request)?;
        self.store.create_key(request, Some(new.operation())).await
    }

    /// Creates a key. Its secret is in the answer and nowhere else.
    pub async fn create_key(&self, request: &CreateKey) -> Result<NewKey> {
        check_tenant(request)?;
        self.store.create_key(request, None).await
    }

    /// The key with this secret.
    pub async fn find_key(&self, secret: &str) -> Result<Option<Key>> {
        self.store.find_key(secret).await
    }

    /// All keys.
    pub async fn keys(&self) -> Result<Vec<Key>> {
        self.store.keys().await
    }

    /// Revokes a key. The last administrator key cannot be removed.
    pub async fn remove_key(&self, id: &str) -> Result<()> {
        self.store.remove_key(id).await
    }

    /// Completes when the key with this id is removed, or has been.
    pub fn key_removed(&self, id: &str) -> impl Future<Output = ()> + Send + use<> {
        let (store, id) = (self.store.clone(), id.to_owned());
        // What is removed from now on is news, and what was removed before is seen in the database.
        let mut news = self.store.subscribe();
        async move {
            loop {
                match store.has_key(&id).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    // A stream does not end because the database is busy: news still end it.
                    Err(error) => tracing::warn!(%error, "cannot look up a key"),
                }
                let check = Instant::now() + RECHECK;
                loop {
                    match timeout_at(check, news.recv()).await {
                        Ok(Ok(event)) if event.kind == KEY_REMOVED && event.subject == id => return,
                        Ok(Ok(_)) => {}
                        Err(_) | Ok(Err(RecvError::Lagged(_))) => break,
                        Ok(Err(RecvError::Closed)) => return,
                    }
                }
            }
        }
    }

    /// Checks that the database answers.
    pub async fn check_database(&self) -> Result<()> {
        self.store.has_keys().await.map(drop)
    }
}

fn check_tenant(request: &CreateKey) -> Result<()> {
    if clone_api::validate::is_valid_name(&request.tenant) {
        return Ok(());
    }
    let message = format!("invalid tenant name `{}`", request.tenant.escape_debug());
    Err(Error::new(ErrorKind::InvalidRequest, message))
}
