//! Webhooks: events are sent in their order, at least once each, from the table of events on. What
//! waits is there and nowhere else, so it is bounded as the events are.
//!
//! How something is sent is not known here: the server gives a [`WebhookSender`].

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_proto::text::printable;
use army_api::events::Event;
use army_api::webhooks::{CreateWebhook, NewWebhook, Webhook};
use army_node_api::time::now_ms;
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::store::webhooks::DueWebhook;
use crate::{Controller, Error, ErrorKind, Result, loops, random};

/// How often webhooks are looked for that have something to deliver.
const ROUND: Duration = Duration::from_secs(1);
/// How many webhooks are served at a time.
const AT_ONCE: usize = 16;
/// The first pause after a failure, which doubles with each of them.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// A webhook without a success for so long is disabled.
const GIVEN_UP: Duration = Duration::from_secs(3 * 24 * 3600);
/// The most kinds of events of a webhook, and the longest kind.
const MAX_KINDS: usize = 50;
const MAX_KIND: usize = 100;

/// One event on its way to a webhook.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The webhook's id.
    pub webhook: String,
    /// The URL to send to.
    pub url: String,
    /// The secret to sign with.
    pub secret: String,
    /// Whether the URL may lead to addresses that are not public.
    pub is_trusted: bool,
    /// The event.
    pub event: Event,
}

impl Delivery {
    /// The id of the delivery, the same whenever the event is sent to the webhook again. It has the
    /// event's time, because the ids of events begin anew where a database is replaced by an older
    /// backup.
    pub fn id(&self) -> String {
        let Event { id, time_ms, .. } = &self.event;
        format!("{}-{id}-{time_ms}", self.webhook)
    }
}

/// Sends events to webhooks.
pub trait WebhookSender: Send + Sync + 'static {
    /// Sends one event, within some seconds.
    ///
    /// # Errors
    /// Why it was not accepted, as a sentence.
    fn send(&self, delivery: Delivery) -> BoxFuture<'_, std::result::Result<(), String>>;
}

/// The webhooks that are being served.
#[derive(Default)]
pub(crate) struct InDelivery(Mutex<HashSet<String>>);

impl InDelivery {
    fn begin(&self, id: &str) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(id.to_owned())
    }

    fn end(&self, id: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(id);
    }
}

impl Controller {
    /// Creates a webhook of `tenant`, or of administrators where it is `None`, for events from now
    /// on. Its secret is in the answer and nowhere else. `check` says why nothing can be sent to a
    /// URL, by a sender that is trusted or not.
    pub async fn create_webhook(
        &self,
        tenant: Option<&str>,
        request: CreateWebhook,
        check: impl FnOnce(&str, bool) -> std::result::Result<(), String>,
    ) -> Result<NewWebhook> {
        let invalid = |message: String| Error::new(ErrorKind::InvalidRequest, message);
        let is_kind = |kind: &String| {
            let allowed = |it: char| it.is_ascii_alphanumeric() || ".-_*".contains(it);
            (1..=MAX_KIND).contains(&kind.len()) && kind.chars().all(allowed)
        };
        if request.events.len() > MAX_KINDS || !request.events.iter().all(is_kind) {
            let message = "`events` has kinds such as `vm.running` or `vm.*`, at most 50";
            return Err(invalid(message.to_owned()));
        }
        let is_trusted = tenant.is_none();
        check(&request.url, is_trusted).map_err(invalid)?;
        let secret = match request.secret {
            Some(secret) => secret,
            None => random::hex::<32>()?,
        };
        let webhook = Webhook {
            id: random::hex::<6>()?,
            tenant: tenant.unwrap_or_default().to_owned(),
            url: request.url,
            events: request.events,
            created_ms: now_ms(),
            delivered: self.store.last_event().await?,
            failures: 0,
            error: None,
            disabled: false,
        };
        let new = DueWebhook {
            webhook,
            secret,
            is_trusted,
            failing_since_ms: None,
        };
        self.store.insert_webhook(&new).await?;
        Ok(NewWebhook {
            webhook: new.webhook,
            secret: new.secret,
        })
    }

    /// The webhooks of one tenant, or all.
    pub async fn webhooks(&self, tenant: Option<&str>) -> Result<Vec<Webhook>> {
        self.store.webhooks(tenant).await
    }

    /// Removes a webhook, only of `tenant` where one is given.
    pub async fn remove_webhook(&self, id: &str, tenant: Option<&str>) -> Result<()> {
        self.store.remove_webhook(id, tenant).await
    }

    /// Delivers events to webhooks, without an end. A webhook that is slow delays no other one.
    pub async fn deliver_webhooks(self: Arc<Self>, sender: Arc<dyn WebhookSender>) {
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            self.loops.begin_round(loops::WEBHOOKS);
            match self.due_webhooks().await {
                Ok(due) => {
                    for webhook in due {
                        self.serve_webhook(webhook, &sender, &permits);
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot read the webhooks"),
            }
            tokio::time::sleep(ROUND).await;
        }
    }

    /// The webhooks that have something to deliver, for one of the controllers: that whose id comes
    /// first. Where another one takes its place, an event may be delivered by both.
    async fn due_webhooks(&self) -> Result<Vec<DueWebhook>> {
        let live = self.store.live_controllers().await?;
        let first = live.into_iter().map(|term| term.id).min();
        match first.is_some_and(|first| first == self.store.term().id) {
            true => self.store.due_webhooks().await,
            false => Ok(Vec::new()),
        }
    }

    /// Delivers what waits for one webhook, on a task of its own, unless that is done already.
    fn serve_webhook(
        self: &Arc<Self>,
        due: DueWebhook,
        sender: &Arc<dyn WebhookSender>,
        permits: &Arc<Semaphore>,
    ) {
        let Ok(permit) = Arc::clone(permits).try_acquire_owned() else {
            return;
        };
        if !self.in_delivery.begin(&due.webhook.id) {
            return;
        }
        let (controller, sender) = (Arc::clone(self), Arc::clone(sender));
        tokio::spawn(async move {
            let id = due.webhook.id.clone();
            if let Err(error) = controller.deliver_page(due, sender.as_ref()).await {
                tracing::warn!(webhook = id, %error, "cannot record a delivery");
            }
            controller.in_delivery.end(&id);
            drop(permit);
        });
    }

    /// Delivers one page of events, until one fails.
    async fn deliver_page(&self, due: DueWebhook, sender: &dyn WebhookSender) -> Result<()> {
        let webhook = &due.webhook;
        let tenant = Some(webhook.tenant.as_str()).filter(|tenant| !tenant.is_empty());
        let events = self.store.events_after(webhook.delivered, tenant).await?;
        if events.is_empty() {
            // What there is concerns other tenants.
            let last = self.store.last_event().await?;
            return self.store.record_delivered(&webhook.id, last).await;
        }
        let mut passed = None;
        for event in events {
            let id = event.id;
            if wants(&webhook.events, &event.kind) {
                let delivery = Delivery {
                    webhook: webhook.id.clone(),
                    url: webhook.url.clone(),
                    secret: due.secret.clone(),
                    is_trusted: due.is_trusted,
                    event,
                };
                if let Err(error) = sender.send(delivery).await {
                    if let Some(id) = passed {
                        self.store.record_delivered(&webhook.id, id).await?;
                    }
                    return self.record_failure(&due, &printable(&error)).await;
                }
                self.store.record_delivered(&webhook.id, id).await?;
                passed = None;
            } else {
                passed = Some(id);
            }
        }
        match passed {
            Some(id) => self.store.record_delivered(&webhook.id, id).await,
            None => Ok(()),
        }
    }

    async fn record_failure(&self, due: &DueWebhook, error: &str) -> Result<()> {
        let now = now_ms();
        let failing = due.failing_since_ms.map(|since| now.saturating_sub(since));
        let is_over = failing.is_some_and(|ms| u128::from(ms) >= GIVEN_UP.as_millis());
        let pause = pause(due.webhook.failures);
        let due_ms = (!is_over).then(|| now.saturating_add(pause.as_millis() as u64));
        self.store.record_failed_delivery(due, error, due_ms).await
    }
}

/// Whether a webhook is for events of a kind.
fn wants(kinds: &[String], kind: &str) -> bool {
    let is_it = |wanted: &String| match wanted.strip_suffix('*') {
        Some(beginning) => kind.starts_with(beginning),
        None => wanted == kind,
    };
    kinds.is_empty() || kinds.iter().any(is_it)
}

/// The pause after the failure that follows `failures` others.
fn pause(failures: u32) -> Duration {
    let factor = 2_u32.saturating_pow(failures);
    FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE)
}
