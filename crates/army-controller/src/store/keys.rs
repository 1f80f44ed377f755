//! Keys and tenants.

use army_api::keys::{CreateKey, Key, NewKey, Role};
use sqlx::any::AnyRow;

use super::operations::NewOperation;
use super::{Store, from_word, query_failed, readable, stored, text, unsigned, word};
use crate::random;
use crate::{Error, ErrorKind, Result};
use army_node_api::time::now_ms;

/// The beginning of every secret, by which a secret that has leaked is recognized.
const SECRET_PREFIX: &str = "army_";

/// The kind of the event that a key was removed.
pub(crate) const KEY_REMOVED: &str = "key.removed";

impl Store {
    /// Whether there is any key.
    pub(crate) async fn has_keys(&self) -> Result<bool> {
        let row = sqlx::query("SELECT id FROM access_keys LIMIT 1")
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(row.is_some())
    }

    /// Creates a key. Only the hash of its secret is stored. With an operation, that is recorded as
    /// ended.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the request is a repetition.
    pub(crate) async fn create_key(
        &self,
        request: &CreateKey,
        operation: Option<&NewOperation>,
    ) -> Result<NewKey> {
        let secret = format!("{SECRET_PREFIX}{}", random::hex::<32>()?);
        let key = Key {
            id: random::hex::<6>()?,
            tenant: request.tenant.clone(),
            role: request.role,
            created_ms: now_ms(),
        };
        let mut change = self.change().await?;
        sqlx::query(
            "INSERT INTO access_keys (id, hash, tenant, role, created_ms) \
             VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(&key.id)
        .bind(hash(&secret))
        .bind(&key.tenant)
        .bind(word(&key.role)?)
        .bind(stored(key.created_ms))
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        sqlx::query(
            "INSERT INTO tenants (name, max_vms) VALUES ($1, $2) \
             ON CONFLICT (name) DO UPDATE SET max_vms = COALESCE($2, tenants.max_vms)",
        )
        .bind(&key.tenant)
        .bind(request.max_vms.map(i64::from))
        .execute(change.connection())
        .await
        .map_err(query_failed)?;
        let detail = format!("a key was created for {}", key.tenant);
        change
            .event("key.created", &key.id, &key.tenant, &detail)
            .await?;
        if let Some(operation) = operation {
            change.record_made(operation, &key.id).await?;
        }
        change.commit().await?;
        Ok(NewKey { key, secret })
    }

    /// Whether there is a key with this id.
    pub(crate) async fn has_key(&self, id: &str) -> Result<bool> {
        let row = sqlx::query("SELECT id FROM access_keys WHERE id = $1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(row.is_some())
    }

    /// The key with this secret.
    pub(crate) async fn find_key(&self, secret: &str) -> Result<Option<Key>> {
        // The lookup is by hash, so the time that it takes reveals nothing about other secrets.
        let row = sqlx::query("SELECT * FROM access_keys WHERE hash = $1")
            .bind(hash(secret))
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        row.as_ref().map(key).transpose()
    }

    /// All keys.
    pub(crate) async fn keys(&self) -> Result<Vec<Key>> {
        let rows = sqlx::query("SELECT * FROM access_keys ORDER BY created_ms, id")
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        Ok(readable(&rows, "access_keys", key))
    }

    /// Removes a key. The last administrator key cannot be removed.
    pub(crate) async fn remove_key(&self, id: &str) -> Result<()> {
        let mut change = self.change().await?;
        let removed = sqlx::query("DELETE FROM access_keys WHERE id = $1")
            .bind(id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        if removed.rows_affected() == 0 {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("key {id} not found"),
            ));
        }
        let admins = sqlx::query("SELECT id FROM access_keys WHERE role = $1 LIMIT 1")
            .bind(word(&Role::Admin)?)
            .fetch_optional(change.connection())
            .await
            .map_err(query_failed)?;
        if admins.is_none() {
            let message = "the last administrator key cannot be removed";
            return Err(Error::new(ErrorKind::Conflict, message).advise("create another one first"));
        }
        change
            .event(KEY_REMOVED, id, "", "a key was removed")
            .await?;
        change.commit().await
    }
}

/// The hash of a secret, which is stored in its place.
pub(super) fn hash(secret: &str) -> String {
    blake3::hash(secret.as_bytes()).to_hex().to_string()
}

fn key(row: &AnyRow) -> Result<Key> {
    Ok(Key {
        id: text(row, "id")?,
        tenant: text(row, "tenant")?,
        role: from_word(&text(row, "role")?)?,
        created_ms: unsigned(row, "created_ms")?,
    })
}
