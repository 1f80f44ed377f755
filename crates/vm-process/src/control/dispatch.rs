//! Dispatches a request to the VM's operation, and turns the result into a response.

use std::os::fd::OwnedFd;

use clone_api::checkpoints::{CheckpointRequest, NewCheckpoint};
use clone_api::control::{Adoption, BalloonTarget, MigrationRequest, SnapshotRequest};
use clone_api::routes::{self, Operation, Route};
use clone_api::{ApiError, ErrorCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::http::{Request, Response};
use super::{Responder, VmControl};

/// Carries out `request` on `control`. `None` means that `responder` sends the answer later.
pub(super) fn answer(
    control: &mut dyn VmControl,
    request: &Request<'_>,
    files: Vec<OwnedFd>,
    responder: impl FnOnce() -> Responder,
) -> Option<Response> {
    let route = match find(request) {
        Ok(route) => route,
        Err(refusal) => return Some(refusal),
    };
    match run(control, route.operation, request.body, files, responder) {
        Ok(Answer::Now(body)) => Some(Response {
            status: if body.is_some() { 200 } else { 204 },
            body,
            allow: None,
        }),
        Ok(Answer::Later) => None,
        Err(error) => Some(Response::error(&error)),
    }
}

/// The result of an operation.
enum Answer {
    /// The body of the answer, for operations that have one.
    Now(Option<Vec<u8>>),
    /// The responder sends the answer.
    Later,
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

fn run(
    control: &mut dyn VmControl,
    operation: Operation,
    body: &[u8],
    files: Vec<OwnedFd>,
    responder: impl FnOnce() -> Responder,
) -> Result<Answer, ApiError> {
    let nothing = Ok(Answer::Now(None));
    match operation {
        Operation::Info => json(&control.info()),
        Operation::Stats => json(&control.stats()?),
        Operation::Pause => control.pause().and(nothing),
        Operation::Resume => control.resume().and(nothing),
        Operation::PowerButton => control.power_button().and(nothing),
        Operation::Kill => {
            control.kill();
            nothing
        }
        Operation::GetBalloon => json(&control.balloon()?),
        Operation::SetBalloon => {
            let target: BalloonTarget = parse(body)?;
            json(&control.set_balloon(target.size)?)
        }
        Operation::Console => json(&control.console()),
        Operation::Snapshot => {
            let wanted: SnapshotRequest = parse(body)?;
            control.snapshot(wanted, files, responder());
            Ok(Answer::Later)
        }
        Operation::Checkpoints => json(&control.checkpoints()?),
        Operation::Checkpoint => {
            let new: NewCheckpoint = parse(body)?;
            control.checkpoint(new, files, responder());
            Ok(Answer::Later)
        }
        Operation::RemoveCheckpoint => {
            let wanted: CheckpointRequest = parse(body)?;
            json(&control.remove_checkpoint(&wanted.name)?)
        }
        Operation::Rewind => {
            let wanted: CheckpointRequest = parse(body)?;
            control.rewind(wanted.name, files, responder());
            Ok(Answer::Later)
        }
        Operation::Touched => json(&control.touched_pages()?),
        Operation::Adopt => {
            let adoption: Adoption = parse(body)?;
            control.adopt(&adoption).and(nothing)
        }
        Operation::Migrate => {
            let wanted: MigrationRequest = parse(body)?;
            control.migrate(wanted, files, responder());
            Ok(Answer::Later)
        }
        Operation::Receive => {
            control.receive(files, responder());
            Ok(Answer::Later)
        }
        Operation::Migration => json(&control.migration()),
        Operation::ConfirmMigration => control.confirm_migration().and(nothing),
        Operation::CancelMigration => control.cancel_migration().and(nothing),
        Operation::OpenApi => Ok(Answer::Now(Some(clone_api::OPENAPI.as_bytes().to_vec()))),
    }
}

fn json(value: &impl Serialize) -> Result<Answer, ApiError> {
    serde_json::to_vec(value)
        .map(|body| Answer::Now(Some(body)))
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
