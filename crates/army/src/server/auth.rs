//! Authentication of callers, and what their roles permit.

use std::sync::Arc;

use army_api::keys::{Key, KeyScope, Role};
use army_api::vms::Vm;
use army_api::{Problem, ProblemKind};
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;

use super::{App, Failure, audit, scopes};
use army_controller::{Controller, Requester};

/// The beginning of the WebSocket subprotocol in which a browser's terminal sends its key, because it
/// cannot set headers.
const SUBPROTOCOL: &str = "army.key.";

/// The caller of a request, who has a valid key.
#[derive(Clone)]
pub struct Caller {
    /// The caller's key.
    pub key: Key,
    controller: Arc<Controller>,
}

impl Caller {
    /// The tenant whose objects the caller sees; `None` for an administrator, who sees those of all.
    pub fn scope(&self) -> Option<&str> {
        match self.key.role {
            Role::Admin => None,
            Role::User | Role::Viewer => Some(&self.key.tenant),
        }
    }

    /// The caller as an operation records it.
    pub fn requester(&self, idempotency_key: Option<String>) -> Requester {
        Requester {
            tenant: self.key.tenant.clone(),
            is_administrator: self.key.role == Role::Admin,
            key: self.key.id.clone(),
            idempotency_key,
        }
    }

    /// Completes when the caller's key is removed or expires. A response that goes on for some time
    /// must end then.
    pub fn revoked(&self) -> impl Future<Output = ()> + Send + use<> {
        self.controller.key_ended(&self.key)
    }

    /// Checks that the caller may do what a `role` may.
    pub fn may(&self, role: Role) -> Result<(), Failure> {
        if self.key.role >= role {
            return Ok(());
        }
        let wanted = match role {
            Role::Viewer => "a viewer",
            Role::User => "a user",
            Role::Admin => "an administrator",
        };
        let detail = format!("this request requires the key of {wanted}");
        Err(Failure(Problem::new(ProblemKind::Forbidden, detail)))
    }

    /// A VM by its id, by its name in the caller's own tenant, or as `TENANT/NAME`. A VM that the
    /// caller may not see is not found.
    pub async fn vm(&self, app: &App, key: &str) -> Result<Vm, Failure> {
        let vm = app.controller.vm(key, &self.key.tenant, self.scope());
        let vm = vm.await?;
        match &self.key.scope {
            Some(KeyScope::Vm(only)) if *only != vm.id => {
                let detail = "this key is for another VM only";
                Err(Failure(Problem::new(ProblemKind::Forbidden, detail)))
            }
            _ => Ok(vm),
        }
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let unauthorized = |detail: &str| {
            let problem = Problem::new(ProblemKind::Unauthorized, detail);
            Failure(
                problem.advise("send `Authorization: Bearer KEY`; `army key create` creates keys"),
            )
        };
        let secret = secret(parts).ok_or_else(|| unauthorized("the request has no key"))?;
        match app.controller.find_key(&secret).await? {
            Some(key) => {
                audit::identify(parts, &key);
                if let Some(scope) = &key.scope {
                    scopes::check(scope, parts)?;
                }
                Ok(Self {
                    key,
                    controller: Arc::clone(&app.controller),
                })
            }
            None => Err(unauthorized("the key is unknown or has expired")),
        }
    }
}

fn secret(parts: &Parts) -> Option<String> {
    let header = |name| parts.headers.get(name)?.to_str().ok();
    if let Some(value) = header(header::AUTHORIZATION) {
        let (scheme, secret) = value.split_once(' ')?;
        return scheme
            .eq_ignore_ascii_case("bearer")
            .then(|| secret.trim().to_owned());
    }
    let offered = header(header::SEC_WEBSOCKET_PROTOCOL)?;
    let mut offered = offered.split(',').map(str::trim);
    offered.find_map(|word| Some(word.strip_prefix(SUBPROTOCOL)?.to_owned()))
}
