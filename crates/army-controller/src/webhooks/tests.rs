//! Deliveries to senders that fail and that do not.

use army_api::keys::{CreateKey, Role};
use army_node_api::simulated::SimulatedNode;

use super::*;
use crate::Database;

/// Accepts events, except for the first ones.
#[derive(Default)]
struct Sender {
    failures: Mutex<u32>,
    accepted: Mutex<Vec<(String, String)>>,
    ids: Mutex<Vec<String>>,
}

impl WebhookSender for Sender {
    fn send(&self, delivery: Delivery) -> BoxFuture<'_, std::result::Result<(), String>> {
        self.ids.lock().unwrap().push(delivery.id());
        let mut failures = self.failures.lock().unwrap();
        let result = match failures.checked_sub(1) {
            Some(left) => {
                *failures = left;
                Err("the answer was \u{1b}[2J 500".to_owned())
            }
            None => {
                let event = (delivery.event.kind, delivery.event.tenant);
                self.accepted.lock().unwrap().push(event);
                Ok(())
            }
        };
        Box::pin(std::future::ready(result))
    }
}

impl Sender {
    fn failing(failures: u32) -> Self {
        Self {
            failures: Mutex::new(failures),
            ..Self::default()
        }
    }

    fn accepted(&self) -> Vec<(String, String)> {
        self.accepted.lock().unwrap().clone()
    }
}

async fn controller() -> (tempfile::TempDir, Controller) {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let database = Database::open(&url).await.unwrap();
    let node = Arc::new(SimulatedNode::new("here"));
    (dir, Controller::of_one_host(database, node))
}

async fn create(controller: &Controller, tenant: Option<&str>, events: &[&str]) -> Webhook {
    let request = CreateWebhook {
        url: "https://example.org".into(),
        events: events.iter().map(|it| (*it).to_owned()).collect(),
        secret: None,
    };
    let created = controller.create_webhook(tenant, request, |_, _| Ok(()));
    created.await.unwrap().webhook
}

/// Makes an event of a tenant.
async fn happen(controller: &Controller, tenant: &str) {
    let request = CreateKey::new(tenant, Role::User);
    controller.create_key(&request).await.unwrap();
}

async fn deliver(controller: &Controller, sender: &Sender) {
    for due in controller.store.due_webhooks().await.unwrap() {
        controller.deliver_page(due, sender).await.unwrap();
    }
}

async fn only(controller: &Controller) -> Webhook {
    controller.webhooks(None).await.unwrap().remove(0)
}

#[tokio::test]
async fn events_come_in_their_order_and_once_more_after_a_failure() {
    let (_dir, controller) = controller().await;
    create(&controller, None, &["key.*"]).await;
    happen(&controller, "red").await;
    happen(&controller, "blue").await;
    let sender = Sender::failing(1);
    deliver(&controller, &sender).await;
    let failed = only(&controller).await;
    assert_eq!((failed.failures, failed.disabled), (1, false));
    let error = failed.error.unwrap();
    assert!(
        error.contains("500") && !error.contains('\u{1b}'),
        "{error}"
    );
    // There is a pause.
    deliver(&controller, &sender).await;
    assert_eq!(sender.accepted(), []);
    controller.store.hurry_webhooks(0).await.unwrap();
    deliver(&controller, &sender).await;
    let event = |tenant: &str| ("key.created".to_owned(), tenant.to_owned());
    assert_eq!(sender.accepted(), [event("red"), event("blue")]);
    let works = only(&controller).await;
    assert_eq!((works.failures, works.error), (0, None));
    // Nothing is left.
    deliver(&controller, &sender).await;
    assert!(controller.store.due_webhooks().await.unwrap().is_empty());
    assert_eq!(sender.accepted().len(), 2);
}

#[tokio::test]
async fn an_event_that_two_controllers_deliver_has_the_same_id_both_times() {
    let dir = tempfile::tempdir().unwrap();
    let url = Database::sqlite_url(&dir.path().join("army.db"));
    let open = async || {
        let database = Database::open(&url).await.unwrap();
        Controller::of_one_host(database, Arc::new(SimulatedNode::new("here")))
    };
    let first = open().await;
    for _ in 0..2 {
        create(&first, None, &["key.*"]).await;
    }
    happen(&first, "red").await;
    let due = first.store.due_webhooks().await.unwrap();
    // The term of the first one ends while it delivers.
    let second = open().await;
    let sender = Sender::default();
    for due in due {
        let recorded = first.deliver_page(due, &sender).await;
        assert_eq!(recorded.unwrap_err().kind, ErrorKind::Superseded);
    }
    deliver(&second, &sender).await;
    assert_eq!(sender.accepted().len(), 4);
    let ids = sender.ids.lock().unwrap().clone();
    let (once, again) = ids.split_at(2);
    assert_ne!(once[0], once[1]);
    let set = |ids: &[String]| ids.iter().cloned().collect::<HashSet<_>>();
    assert_eq!(set(once), set(again));
}

#[tokio::test]
async fn a_tenant_gets_its_own_events_and_removes_its_own_webhooks() {
    let (_dir, controller) = controller().await;
    let webhook = create(&controller, Some("red"), &[]).await;
    for tenant in ["blue", "red"] {
        // Events of keys are for administrators.
        happen(&controller, tenant).await;
        controller.store.vm_event(tenant).await.unwrap();
    }
    let sender = Sender::default();
    deliver(&controller, &sender).await;
    let its_own = ("vm.running".to_owned(), "red".to_owned());
    assert_eq!(sender.accepted(), [its_own]);
    assert_eq!(controller.webhooks(Some("blue")).await.unwrap(), []);
    let refused = controller.remove_webhook(&webhook.id, Some("blue")).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::NotFound);
    controller
        .remove_webhook(&webhook.id, Some("red"))
        .await
        .unwrap();
    assert_eq!(controller.webhooks(None).await.unwrap(), []);
}

#[tokio::test]
async fn a_webhook_that_fails_for_days_is_disabled_with_an_event() {
    let (_dir, controller) = controller().await;
    let webhook = create(&controller, None, &[]).await;
    happen(&controller, "red").await;
    let sender = Sender::failing(u32::MAX);
    deliver(&controller, &sender).await;
    controller
        .store
        .hurry_webhooks(GIVEN_UP.as_millis() as i64)
        .await
        .unwrap();
    deliver(&controller, &sender).await;
    assert!(only(&controller).await.disabled);
    let events = controller.store.events_after(0, None).await.unwrap();
    let last = events.last().unwrap();
    assert_eq!(
        (&*last.kind, &last.subject),
        ("webhook.disabled", &webhook.id)
    );
    controller.store.hurry_webhooks(0).await.unwrap();
    assert!(controller.store.due_webhooks().await.unwrap().is_empty());
}

#[test]
fn a_kind_is_named_or_begins_like_a_star_says() {
    let kinds = |kinds: &[&str]| kinds.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
    assert!(wants(&[], "vm.running"));
    assert!(wants(&kinds(&["host.back", "vm.*"]), "vm.running"));
    assert!(wants(&kinds(&["vm.running"]), "vm.running"));
    assert!(!wants(&kinds(&["vm.run", "host.*"]), "vm.running"));
}

#[test]
fn pauses_grow_to_an_hour() {
    assert_eq!(pause(0), FIRST_PAUSE);
    assert_eq!(pause(3), FIRST_PAUSE * 8);
    assert_eq!(pause(50), LONGEST_PAUSE);
}
