//! Authentication of callers, and what their roles permit.

use army_api::keys::{Key, Role};
use army_api::vms::Vm;
use army_api::{Problem, ProblemKind};
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;

use super::{App, Failure};

/// The beginning of the WebSocket subprotocol in which a browser's terminal sends its key, because it
/// cannot set headers.
const SUBPROTOCOL: &str = "army.key.";

/// The caller of a request, who has a valid key.
pub struct Caller {
    /// The caller's key.
    pub key: Key,
}

impl Caller {
    /// The tenant whose objects the caller sees; `None` for an administrator, who sees those of all.
    pub fn scope(&self) -> Option<&str> {
        match self.key.role {
            Role::Admin => None,
            Role::User | Role::Viewer => Some(&self.key.tenant),
        }
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

    /// A VM by its id or name. A VM that the caller may not see is not found.
    pub async fn vm(&self, app: &App, key: &str) -> Result<Vm, Failure> {
        Ok(app.controller.vm(key, self.scope()).await?)
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
            Some(key) => Ok(Self { key }),
            None => Err(unauthorized("the key is unknown")),
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
