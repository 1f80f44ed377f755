//! What keys are restricted to, by the paths of the API.

use army_api::keys::KeyScope;
use army_api::{Problem, ProblemKind};
use axum::extract::MatchedPath;
use axum::http::Method;
use axum::http::request::Parts;

use super::failure::Failure;

/// Paths of one VM that make something beyond it.
const BEYOND_VM: [&str; 2] = ["/v1/vms/{vm}/fork", "/v1/vms/{vm}/snapshot"];
/// The paths about templates.
const TEMPLATES: [&str; 3] = ["/v1/templates", "/v1/tags", "/v1/builds"];

/// The path of one operation. A key for templates sees the operations that it has requested.
const OPERATION: &str = "/v1/operations/{id}";

/// Checks that a key with this scope may be used for a request. Which VM a request is about is
/// checked where the VM is looked up.
pub(super) fn check(scope: &KeyScope, parts: &Parts) -> Result<(), Failure> {
    let path = parts.extensions.get::<MatchedPath>();
    let path = path.map_or("", MatchedPath::as_str);
    if permits(scope, &parts.method, path) {
        return Ok(());
    }
    let what = match scope {
        KeyScope::Vm(_) => "one VM",
        KeyScope::Metrics => "metrics",
        KeyScope::Templates => "templates",
    };
    let detail = format!("this key is for {what} only");
    Err(Failure(Problem::new(ProblemKind::Forbidden, detail)))
}

fn permits(scope: &KeyScope, method: &Method, path: &str) -> bool {
    match scope {
        KeyScope::Vm(_) => {
            (path == "/v1/vms/{vm}" || path.starts_with("/v1/vms/{vm}/"))
                && !BEYOND_VM.contains(&path)
        }
        KeyScope::Metrics => path == "/metrics" && method == Method::GET,
        KeyScope::Templates => {
            let is_about_templates = TEMPLATES.iter().any(|of| {
                let rest = path.strip_prefix(of);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            });
            is_about_templates || (path == OPERATION && method == Method::GET)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_permits_its_paths_and_no_others() {
        let vm = KeyScope::Vm("1".into());
        for (scope, method, path, expected) in [
            (&vm, Method::PATCH, "/v1/vms/{vm}", true),
            (&vm, Method::GET, "/v1/vms/{vm}/files/list", true),
            (&vm, Method::POST, "/v1/vms/{vm}/fork", false),
            (&vm, Method::POST, "/v1/vms/{vm}/snapshot", false),
            (&vm, Method::GET, "/v1/vms", false),
            (&vm, Method::GET, "/v1/events", false),
            (&KeyScope::Metrics, Method::GET, "/metrics", true),
            (&KeyScope::Metrics, Method::GET, "/v1/vms", false),
            (&KeyScope::Templates, Method::POST, "/v1/builds", true),
            (
                &KeyScope::Templates,
                Method::PUT,
                "/v1/templates/{name}/content",
                true,
            ),
            (
                &KeyScope::Templates,
                Method::GET,
                "/v1/templates-of-others",
                false,
            ),
            (&KeyScope::Templates, Method::GET, OPERATION, true),
            (&KeyScope::Templates, Method::GET, "/v1/operations", false),
            (&KeyScope::Metrics, Method::GET, OPERATION, false),
            (&KeyScope::Templates, Method::POST, "/v1/vms", false),
            (&KeyScope::Templates, Method::GET, "", false),
        ] {
            assert_eq!(permits(scope, &method, path), expected, "{scope:?} {path}");
        }
    }
}
