//! From a request to what the VM is asked, and from its answer to a response.

use clone_api::control::BalloonTarget;
use clone_api::routes::{self, Operation, Route};
use clone_api::{ApiError, ErrorCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::VmControl;
use super::http::{Request, Response};

/// Asks `control` what `request` wants.
pub(super) fn answer(control: &mut dyn VmControl, request: &Request<'_>) -> Response {
    let route = match find(request) {
        Ok(route) => route,
        Err(refusal) => return refusal,
    };
    match run(control, route.operation, request.body) {
        Ok(body) => Response {
            status: if body.is_some() { 200 } else { 204 },
            body,
            allow: None,
        },
        Err(error) => Response::error(&error),
    }
}

fn find(request: &Request<'_>) -> Result<&'static Route, Response> {
    let mut methods = Vec::new();
    for route in routes::on_path(request.path) {
        if route.method.as_str() == request.method {
            return Ok(route);
        }
        methods.push(route.method.as_str());
    }
    if methods.is_empty() {
        let message = format!("there is nothing at {}", request.path.escape_debug());
        let error = ApiError::new(ErrorCode::NotFound, message)
            .advise("GET /openapi.json lists what there is");
        return Err(Response::error(&error));
    }
    let allow = methods.join(", ");
    let message = format!("{} takes {allow}, not {}", request.path, request.method);
    let error = ApiError::new(ErrorCode::MethodNotAllowed, message);
    Err(Response {
        allow: Some(allow),
        ..Response::error(&error)
    })
}

/// The body of the answer, for operations that have one.
fn run(
    control: &mut dyn VmControl,
    operation: Operation,
    body: &[u8],
) -> Result<Option<Vec<u8>>, ApiError> {
    match operation {
        Operation::Info => json(&control.info()),
        Operation::Stats => json(&control.stats()?),
        Operation::Pause => control.pause().map(|()| None),
        Operation::Resume => control.resume().map(|()| None),
        Operation::PowerButton => control.power_button().map(|()| None),
        Operation::Kill => {
            control.kill();
            Ok(None)
        }
        Operation::GetBalloon => json(&control.balloon()?),
        Operation::SetBalloon => {
            let target: BalloonTarget = parse(body)?;
            json(&control.set_balloon(target.size)?)
        }
        Operation::Console => json(&control.console()),
        Operation::OpenApi => Ok(Some(clone_api::OPENAPI.as_bytes().to_vec())),
    }
}

fn json(value: &impl Serialize) -> Result<Option<Vec<u8>>, ApiError> {
    serde_json::to_vec(value)
        .map(Some)
        .map_err(|error| ApiError::internal(&error))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        let code = if error.is_data() {
            ErrorCode::InvalidConfig
        } else {
            ErrorCode::BadRequest
        };
        ApiError::new(code, format!("the request's body: {error}"))
            .advise("GET /openapi.json tells what is expected")
    })
}
