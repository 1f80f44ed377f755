//! Requests that take effect once, however often they are repeated: by their idempotency keys.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::store::requests::KnownRequest;
use crate::{Controller, Error, ErrorKind, Result};

impl Controller {
    /// Does `work`, or returns the answer of the first request of `tenant` with the same `key`. Work
    /// that fails can be tried again with the same key. Without a key, `work` is done each time.
    ///
    /// `operation` and `request` are what the request asks for. The answer is stored as JSON, and is
    /// the answer that clients get.
    ///
    /// # Errors
    /// [`ErrorKind::IdempotencyMismatch`] where the key came with another request, and
    /// [`ErrorKind::Conflict`] while the first one is in progress.
    pub async fn idempotent<T, E>(
        &self,
        tenant: &str,
        key: Option<&str>,
        operation: &str,
        request: &impl Serialize,
        work: impl Future<Output = std::result::Result<T, E>>,
    ) -> std::result::Result<T, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<Error>,
    {
        let Some(key) = key else {
            return work.await;
        };
        let request = serde_json::to_string(&(operation, request)).map_err(internal)?;
        let known = self.store.begin_request(tenant, key, &request).await?;
        if let KnownRequest::Answered(answer) = known {
            return Ok(serde_json::from_str(&answer).map_err(internal)?);
        }
        match work.await {
            Ok(answer) => {
                let text = serde_json::to_string(&answer).map_err(internal)?;
                self.store.answer_request(tenant, key, &text).await?;
                Ok(answer)
            }
            Err(error) => {
                self.store.discard_request(tenant, key).await?;
                Err(error)
            }
        }
    }

    /// Answers the requests that an earlier process left unanswered with what became of their VMs.
    pub(crate) async fn answer_interrupted_requests(
        &self,
        interrupted: Vec<(String, String)>,
    ) -> Result<()> {
        for (tenant, request) in interrupted {
            let vms = self.store.vms_of_request(&tenant, &request).await?;
            if vms.is_empty() {
                self.store.discard_request(&tenant, &request).await?;
                continue;
            }
            let created = army_api::vms::CreatedVms {
                vms,
                failures: Vec::new(),
            };
            let answer = serde_json::to_string(&created).map_err(internal)?;
            self.store
                .answer_request(&tenant, &request, &answer)
                .await?;
        }
        Ok(())
    }
}

fn internal(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Internal, error.to_string())
}
