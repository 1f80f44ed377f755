//! What is read from guests, as the bodies of responses.

use std::io;

use agent_client::Download;
use axum::body::{Body, Bytes};
use futures_util::stream;

use super::auth::Caller;
use super::budget::Budget;
use super::sessions::Ending;
use super::{Answer, App};
use army_controller::Error;

/// The content of a file as the body of a response. An error before the first bytes becomes the
/// response.
pub(super) async fn body(
    app: &App,
    caller: &Caller,
    mut download: Download,
    ending: Ending,
) -> Answer<Body> {
    let first = download.next().await.map_err(Error::from)?;
    Ok(match first {
        Some(first) => Reading {
            first: Some(first),
            download,
            ending,
            budget: app.budget.clone(),
            tenant: caller.key.tenant.clone(),
        }
        .into_body(),
        None => Body::empty(),
    })
}

/// A file that is being read. It is read from the guest as the client takes it, and not any more
/// where the client disconnects.
struct Reading {
    first: Option<Vec<u8>>,
    download: Download,
    ending: Ending,
    budget: Budget,
    tenant: String,
}

impl Reading {
    fn into_body(self) -> Body {
        let bytes = stream::try_unfold(self, |mut reading| async move {
            let data = reading.next().await?;
            Ok::<_, io::Error>(data.map(|data| (data, reading)))
        });
        Body::from_stream(bytes)
    }

    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let data = match self.first.take() {
            Some(first) => Some(first),
            None => tokio::select! {
                data = self.download.next() => data.map_err(io::Error::other)?,
                // An error, because a part of a file must not look like all of it.
                () = self.ending.key_removed() => {
                    return Err(io::Error::other("the key was removed"));
                }
            },
        };
        Ok(match data {
            Some(data) => Some(self.budget.count(&self.tenant, data).await),
            None => None,
        })
    }
}
