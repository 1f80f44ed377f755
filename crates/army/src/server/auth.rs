//! Who asks, and what they may.

use army_api::keys::{Key, Role};
use army_api::vms::Vm;
use army_api::{Problem, ProblemKind};
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;

use super::{App, Failure};

/// Where a browser's terminal puts its key, which cannot send headers: a WebSocket subprotocol.
const SUBPROTOCOL: &str = "army.key.";

/// Whoever asks, with a key that is known.
pub struct Caller {
    /// The key.
    pub key: Key,
}

impl Caller {
    /// Whose things are seen: all tenants' for an administrator.
    pub fn scope(&self) -> Option<&str> {
        match self.key.role {
            Role::Admin => None,
            Role::User | Role::Viewer => Some(&self.key.tenant),
        }
    }

    /// The caller, where the key allows what a `role` may.
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

    /// A VM that the caller may see, by id or name. Others' are not there.
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
