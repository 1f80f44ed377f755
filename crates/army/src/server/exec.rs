//! Commands in guests, with their output in the response.

use std::time::{Duration, Instant};

use agent_client::{Event, Running};
use agent_proto::messages::Stream;
use army_api::exec::{Ended, Exec, ExecResult};
use army_api::keys::Role;
use axum::Json;
use axum::extract::State;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::{Answer, App};
use army_controller::{Error, guest};

/// The most output that a response has, of both streams together.
const MAX_OUTPUT: usize = 16 << 20;
/// How long a command may take, where the client does not say.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// Runs a command in a VM and returns its output and its exit status.
///
/// The command is killed when the client disconnects.
#[utoipa::path(post, path = "/v1/vms/{vm}/exec", params(("vm" = String, Path)), request_body = Exec,
    responses((status = 200, body = ExecResult)))]
pub(super) async fn exec(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    Body(request): Body<Exec>,
) -> Answer<Json<ExecResult>> {
    let start = Instant::now();
    caller.may(Role::User)?;
    guest::check_command(&request.command)?;
    let limit = guest::check_time_limit(request.timeout_ms)?.unwrap_or(DEFAULT_LIMIT);
    let vm = caller.vm(&app, &vm).await?;
    let environment = app.controller.environment(&vm).await?;
    let connection = app.controller.agent(&vm, guest::with_grace(limit)).await?;
    let stdin = request.stdin.clone();
    let exec = guest::exec(request, environment, Some(limit));
    let running = connection.exec(exec).await.map_err(Error::from)?;
    let mut result = run(running, stdin).await?;
    result.took_us = start.elapsed().as_micros() as u64;
    Ok(Json(result))
}

/// Runs a command to its end. It is killed where this future is dropped, as it is when the client
/// disconnects.
async fn run(mut running: Running, stdin: Option<String>) -> army_controller::Result<ExecResult> {
    if let Some(text) = stdin {
        running.write(text.as_bytes());
        running.end_input();
    }
    let mut output = Output::default();
    loop {
        match running.next_event().await? {
            Event::Output(stream, data) => output.add(stream, &data),
            Event::Lost(_, count) => output.omitted = output.omitted.saturating_add(count),
            Event::Exited(exited) => return Ok(output.result(guest::exit_status(exited))),
        }
    }
}

#[derive(Default)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    omitted: u64,
}

impl Output {
    /// Keeps the output that there is room for, and counts the rest.
    fn add(&mut self, stream: Stream, data: &[u8]) {
        let room = MAX_OUTPUT - self.stdout.len() - self.stderr.len();
        let taken = data.len().min(room);
        self.omitted += (data.len() - taken) as u64;
        let kept = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        kept.extend_from_slice(&data[..taken]);
    }

    /// The result of the command that wrote it.
    fn result(self, ended: Ended) -> ExecResult {
        let (stdout, lossy_out) = text(self.stdout);
        let (stderr, lossy_err) = text(self.stderr);
        ExecResult {
            exit_code: ended.exit_code,
            signal: ended.signal,
            timed_out: ended.timed_out,
            stdout,
            stderr,
            lossy: lossy_out || lossy_err,
            omitted_bytes: self.omitted,
            took_us: 0,
        }
    }
}

/// Bytes as text, and whether bytes had to be replaced.
fn text(bytes: Vec<u8>) -> (String, bool) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, false),
        Err(error) => (String::from_utf8_lossy(error.as_bytes()).into_owned(), true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_beyond_the_limit_is_counted_and_not_kept() {
        let mut output = Output::default();
        output.add(Stream::Stderr, b"eeeeeeeeee");
        output.add(Stream::Stdout, &vec![b'o'; MAX_OUTPUT]);
        output.add(Stream::Stdout, b"more");
        assert_eq!(output.stderr.len() + output.stdout.len(), MAX_OUTPUT);
        assert_eq!(output.omitted, 14);
    }

    #[test]
    fn bytes_that_are_not_text_are_replaced_and_reported() {
        assert_eq!(text(b"a\xC3\xA4".to_vec()), ("aä".to_owned(), false));
        assert_eq!(text(b"a\xFF".to_vec()), ("a\u{FFFD}".to_owned(), true));
    }
}
