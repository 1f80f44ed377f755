//! Keys and tenants: who may use the API, and how much of it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use army_api::keys::{CreateKey, Key, NewKey};
use army_api::operations::OperationKind;
use army_api::tenants::{ChangeTenant, Tenant};
use army_api::vms::MAX_SECONDS;
use army_node_api::time::now_ms;
use army_node_api::validate;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, timeout_at};

use crate::store::keys::KEY_REMOVED;
use crate::{Controller, Error, ErrorKind, Requester, Result};

/// How long the removal of a key by another controller of the same database may stay unnoticed.
const RECHECK: Duration = Duration::from_secs(5);

/// How often the use of a key is recorded at the most.
const USE_RECORDED: Duration = Duration::from_secs(60);
/// The longest name of a key, in characters.
const MAX_KEY_NAME: usize = 100;

/// When the use of each key was last recorded, by id. It has no more entries than there are keys
/// that are used.
#[derive(Default)]
pub(crate) struct KeyUses(Mutex<HashMap<String, Instant>>);

impl KeyUses {
    /// Whether the use of a key is to be recorded now.
    fn is_due(&self, id: &str) -> bool {
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |at: &Instant| at.elapsed() < USE_RECORDED;
        if uses.get(id).is_some_and(is_recent) {
            return false;
        }
        uses.retain(|_, at| is_recent(at));
        uses.insert(id.to_owned(), Instant::now());
        true
    }
}

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
        check_key(request)?;
        let kind = OperationKind::CreateKey;
        let new = self.new_request(requester, kind, &request.tenant, request, request)?;
        self.store.create_key(request, Some(new.operation())).await
    }

    /// Creates a key. Its secret is in the answer and nowhere else.
    pub async fn create_key(&self, request: &CreateKey) -> Result<NewKey> {
        check_key(request)?;
        self.store.create_key(request, None).await
    }

    /// The key with this secret, unless it has expired. That it is used is recorded at most once a
    /// minute.
    pub async fn find_key(&self, secret: &str) -> Result<Option<Key>> {
        let found = self.store.find_key(secret).await?;
        if let Some(key) = &found
            && self.key_uses.is_due(&key.id)
        {
            // The request does not wait for it.
            let (store, id) = (self.store.clone(), key.id.clone());
            tokio::spawn(async move {
                if let Err(error) = store.record_key_use(&id).await {
                    tracing::warn!(%error, "cannot record the use of a key");
                }
            });
        }
        Ok(found)
    }

    /// All tenants.
    pub async fn tenants(&self) -> Result<Vec<Tenant>> {
        self.store.tenants().await
    }

    /// One tenant.
    pub async fn tenant(&self, name: &str) -> Result<Tenant> {
        self.store.tenant(name).await
    }

    /// Changes the quotas and the network policy of a tenant.
    pub async fn change_tenant(&self, name: &str, request: &ChangeTenant) -> Result<Tenant> {
        if let Some(Some(network)) = &request.network {
            validate::egress(network)?;
        }
        self.store.change_tenant(name, request).await?;
        self.store.tenant(name).await
    }

    /// All keys.
    pub async fn keys(&self) -> Result<Vec<Key>> {
        self.store.keys().await
    }

    /// Revokes a key. The last administrator key cannot be removed.
    pub async fn remove_key(&self, id: &str) -> Result<()> {
        self.store.remove_key(id).await
    }

    /// Completes when a key expires, or when it is removed, or has been.
    pub fn key_ended(&self, key: &Key) -> impl Future<Output = ()> + Send + use<> {
        let removed = self.key_removed(&key.id);
        let remaining = key.expires_ms.map(|end| end.saturating_sub(now_ms()));
        async move {
            let Some(remaining) = remaining else {
                return removed.await;
            };
            // The future returns when the key is removed before.
            let _ = tokio::time::timeout(Duration::from_millis(remaining), removed).await;
        }
    }

    /// Completes when the key with this id is removed, or has been.
    fn key_removed(&self, id: &str) -> impl Future<Output = ()> + Send + use<> {
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

fn check_key(request: &CreateKey) -> Result<()> {
    if !clone_api::validate::is_valid_name(&request.tenant) {
        let message = format!("invalid tenant name `{}`", request.tenant.escape_debug());
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    let is_invalid = |name: &String| name.chars().count() > MAX_KEY_NAME || name.contains('\0');
    if request.name.as_ref().is_some_and(is_invalid) {
        let message = format!("the name of a key has at most {MAX_KEY_NAME} characters");
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    let is_invalid = |ttl: u64| !(1..=MAX_SECONDS).contains(&ttl);
    if request.ttl_s.is_some_and(is_invalid) {
        let message = format!("`ttl_s` must be 1 to {MAX_SECONDS}");
        return Err(Error::new(ErrorKind::InvalidRequest, message));
    }
    Ok(())
}
