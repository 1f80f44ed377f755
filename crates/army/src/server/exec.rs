//! Commands in guests, with their output in the response.

use std::time::{Duration, Instant};

use agent_client::Event;
use army_api::exec::{Ended, Exec, ExecResult};
use army_api::keys::Role;
use axum::extract::State;
use axum::response::Response;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::output::Output;
use super::sessions::Followed;
use super::{Answer, App};
use army_controller::{Error, guest};

/// How long a command may take, where the client does not say.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// Runs a command in a VM and returns its output and its exit status.
///
/// The command is killed when the client disconnects, or when the caller's key is removed.
#[utoipa::path(post, path = "/v1/vms/{vm}/exec", params(("vm" = String, Path)), request_body = Exec,
    responses((status = 200, body = ExecResult)))]
pub(super) async fn exec(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<Exec>,
) -> Answer<Response> {
    let start = Instant::now();
    caller.may(Role::User)?;
    guest::check_command(&request.command)?;
    let limit = guest::check_time_limit(request.timeout_ms)?.unwrap_or(DEFAULT_LIMIT);
    let vm = caller.vm(&app, &vm).await?;
    let environment = app.controller.environment(&vm).await?;
    let mut guest = app.guest(&caller, &vm, guest::with_grace(limit)).await?;
    let stdin = request.stdin.clone();
    let exec = guest::exec(request, environment, Some(limit));
    let mut output = Output::new(app.budget.reservation(&caller.key.tenant));
    let command = async {
        let running = guest.connection.exec(exec).await.map_err(Error::from)?;
        let limit = Some(guest::with_grace(limit));
        let running = Followed::new(&app, &caller, &vm, limit, running);
        run(running, stdin, &mut output).await
    };
    let ended = guest.ending.unless_removed(command).await?;
    let took_us = start.elapsed().as_micros() as u64;
    Ok(output.into_response(ended, took_us))
}

/// Runs a command to its end. It is killed where this future is dropped, as it is when the client
/// disconnects.
async fn run(mut running: Followed, stdin: Option<String>, output: &mut Output) -> Answer<Ended> {
    if let Some(text) = stdin {
        running.get_mut().write(text.as_bytes());
        running.get_mut().end_input();
    }
    loop {
        match running.next_event().await? {
            Event::Output(stream, data) => output.add(stream, &data),
            Event::Lost(_, count) => output.omitted = output.omitted.saturating_add(count),
            Event::Exited(exited) => return Ok(guest::exit_status(exited)),
        }
    }
}
