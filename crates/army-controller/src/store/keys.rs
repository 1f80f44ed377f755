//! Keys and tenants.

use army_api::keys::{CreateKey, Key, NewKey, Role};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::operations::NewOperation;
use super::{
    Store, from_word, optional_text, parse, query_failed, readable, stored, text, to_json,
    unsigned, word,
};
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
            name: request.name.clone(),
            expires_ms: request
                .ttl_s
                .map(|ttl| now_ms().saturating_add(ttl.saturating_mul(1000))),
            used_ms: None,
            scope: request.scope.clone(),
        };
        let mut change = self.change().await?;
        sqlx::query(
            "INSERT INTO access_keys (id, hash, tenant, role, created_ms, name, expires_ms, scope) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&key.id)
        .bind(hash(&secret))
        .bind(&key.tenant)
        .bind(word(&key.role)?)
        .bind(stored(key.created_ms))
        .bind(key.name.as_deref())
        .bind(key.expires_ms.map(stored))
        .bind(key.scope.as_ref().map(to_json).transpose()?)
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

    /// Whether there is a key with this id that has not expired.
    pub(crate) async fn has_key(&self, id: &str) -> Result<bool> {
        let row = sqlx::query(
            "SELECT id FROM access_keys WHERE id = $1 AND (expires_ms IS NULL OR expires_ms > $2)",
        )
        .bind(id)
        .bind(stored(now_ms()))
        .fetch_optional(&self.pool)
        .await
        .map_err(query_failed)?;
        Ok(row.is_some())
    }

    /// The key with this secret, unless it has expired.
    pub(crate) async fn find_key(&self, secret: &str) -> Result<Option<Key>> {
        // The lookup is by hash, so the time that it takes reveals nothing about other secrets.
        let row = sqlx::query("SELECT * FROM access_keys WHERE hash = $1")
            .bind(hash(secret))
            .fetch_optional(&self.pool)
            .await
            .map_err(query_failed)?;
        let found = row.as_ref().map(key).transpose()?;
        let now = now_ms();
        Ok(found.filter(|key| key.expires_ms.is_none_or(|end| now < end)))
    }

    /// Records that a key is used now.
    pub(crate) async fn record_key_use(&self, id: &str) -> Result<()> {
        let mut change = self.change().await?;
        sqlx::query("UPDATE access_keys SET used_ms = $1 WHERE id = $2")
            .bind(stored(now_ms()))
            .bind(id)
            .execute(change.connection())
            .await
            .map_err(query_failed)?;
        change.commit().await
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
        // One that is restricted, or that expires, cannot take the place of the last one.
        let query = "SELECT id FROM access_keys WHERE role = $1 AND expires_ms IS NULL \
                     AND scope IS NULL LIMIT 1";
        let admins = sqlx::query(query)
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
    let time = |column: &str| -> Result<Option<u64>> {
        let time: Option<i64> = row.try_get(column).map_err(query_failed)?;
        Ok(time.map(|time| time.max(0).unsigned_abs()))
    };
    Ok(Key {
        id: text(row, "id")?,
        tenant: text(row, "tenant")?,
        role: from_word(&text(row, "role")?)?,
        created_ms: unsigned(row, "created_ms")?,
        name: optional_text(row, "name")?,
        expires_ms: time("expires_ms")?,
        used_ms: time("used_ms")?,
        scope: optional_text(row, "scope")?
            .as_deref()
            .map(parse)
            .transpose()?,
    })
}
