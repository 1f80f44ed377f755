//! Reading events as they happen.

use std::collections::VecDeque;

use army_api::events::Event;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::store::Store;
use crate::{Controller, Result};

/// Reads the events of one tenant, or of all, without an end.
pub struct EventReader {
    store: Store,
    news: broadcast::Receiver<Event>,
    tenant: Option<String>,
    last: i64,
    page: VecDeque<Event>,
}

impl Controller {
    /// Reads events after the one with the id `after`, or those that happen from now on; only
    /// those that `tenant` gets to know of where a tenant is given.
    pub async fn events(&self, tenant: Option<&str>, after: Option<i64>) -> Result<EventReader> {
        let news = self.store.subscribe();
        let last = match after {
            Some(after) => after,
            None => self.store.last_event().await?,
        };
        Ok(EventReader {
            store: self.store.clone(),
            news,
            tenant: tenant.map(str::to_owned),
            last,
            page: VecDeque::new(),
        })
    }
}

impl EventReader {
    /// The next event, which may be long in coming. `None` where the database cannot be read any
    /// more.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.page.pop_front() {
                self.last = event.id;
                return Some(event);
            }
            // Read the database until it has no more, then wait for news. News that were missed are
            // in the database.
            let tenant = self.tenant.as_deref();
            match self.store.events_after(self.last, tenant).await {
                Ok(page) if !page.is_empty() => self.page = page.into(),
                Ok(_) => match self.news.recv().await {
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                },
                Err(error) => {
                    tracing::warn!(%error, "cannot read events");
                    return None;
                }
            }
        }
    }
}
