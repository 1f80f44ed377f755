//! Events as they happen, as server-sent events.

use std::convert::Infallible;

use army_api::events::{Event, EventFilter};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use tokio::sync::mpsc;

use super::auth::Caller;
use super::extract::Params;
use super::{Answer, App};

/// Streams events, the oldest first, and continues as they happen.
///
/// Each event is sent with its id, so that a client that reconnects resumes where it stopped. The
/// stream ends when the caller's key is removed, or the server stops.
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
    let after = filter.after.or(last);
    let reader = app.controller.events(caller.scope(), after).await?;
    let events = stream::unfold(reader, |mut reader| async move {
        Some((Ok(sse_event(&reader.next().await?)), reader))
    });
    let mut ending = app.sessions.ending(&caller);
    let events = events.take_until(async move { ending.reason().await });
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

/// A response of server-sent events: `first`, and then what is received.
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
