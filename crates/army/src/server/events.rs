//! Events, as they happen: server-sent.

use std::convert::Infallible;

use army_api::events::{Event, EventFilter};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use super::auth::Caller;
use super::extract::Params;
use super::{Answer, App};
use army_controller::store::Store;

/// Streams events, the oldest first, and continues as they happen.
///
/// Each event is sent with its id, so that a client that reconnects resumes where it stopped.
#[utoipa::path(get, path = "/v1/events", params(EventFilter),
    responses((status = 200, content_type = "text/event-stream", body = Event)))]
pub(super) async fn events(
    State(app): State<App>,
    caller: Caller,
    Params(filter): Params<EventFilter>,
    headers: HeaderMap,
) -> Answer<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>> {
    let last = headers
        .get("last-event-id")
        .and_then(|id| id.to_str().ok()?.parse().ok());
    let store = app.controller.store.clone();
    let after = match filter.after.or(last) {
        Some(after) => after,
        None => store.last_event().await?,
    };
    let tenant = caller.scope().map(str::to_owned);
    let reader = Reader::new(store, tenant, after);
    let events = stream::unfold(reader, |mut reader| async move {
        Some((Ok(sse_event(&reader.next().await?)), reader))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

fn sse_event(event: &Event) -> sse::Event {
    let text = serde_json::to_string(event).unwrap_or_default();
    let id = event.id.to_string();
    sse::Event::default()
        .id(id)
        .event(event.kind.clone())
        .data(text)
}

/// What is received as an answer of server-sent events, behind the `first`.
pub(super) fn sent_events<T: Serialize + Send + 'static>(
    first: Option<T>,
    receiver: mpsc::Receiver<T>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let rest = stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    let events = stream::iter(first).chain(rest).map(|event| {
        let text = serde_json::to_string(&event).unwrap_or_default();
        Ok(sse::Event::default().data(text))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// Reads the store until it has caught up, then waits for news; news that were missed are read.
struct Reader {
    store: Store,
    news: tokio::sync::broadcast::Receiver<Event>,
    tenant: Option<String>,
    last: i64,
    page: std::collections::VecDeque<Event>,
}

impl Reader {
    fn new(store: Store, tenant: Option<String>, last: i64) -> Self {
        Self {
            news: store.news(),
            store,
            tenant,
            last,
            page: Default::default(),
        }
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.page.pop_front() {
                self.last = event.id;
                return Some(event);
            }
            let page = self
                .store
                .events_after(self.last, self.tenant.as_deref())
                .await;
            match page {
                Ok(page) if !page.is_empty() => self.page = page.into(),
                Ok(_) => match self.news.recv().await {
                    // What it was is read with all that came with it.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                },
                Err(problem) => {
                    tracing::warn!(%problem, "events cannot be read");
                    return None;
                }
            }
        }
    }
}
