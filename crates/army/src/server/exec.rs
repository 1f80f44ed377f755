//! Commands in guests, with their output in the response.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use agent_proto::client::{Connection, Event};
use agent_proto::messages::Stream;
use army_api::exec::{Exec, ExecResult};
use army_api::keys::Role;
use axum::Json;
use axum::extract::State;

use super::auth::Caller;
use super::extract::{Body, Path};
use super::{Answer, App, blocking};
use army_controller::guest;

/// The most output that a response has, of both streams together.
const MAX_OUTPUT: usize = 16 << 20;
/// How long a command may take, where the client does not say.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// Runs a command in a VM and returns its output and its exit status.
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
    let vm = caller.vm(&app, &vm).await?;
    let environment = app.controller.environment(&vm).await?;
    let limit = request
        .timeout_ms
        .map_or(DEFAULT_LIMIT, Duration::from_millis);
    let agent = app.controller.agent(&vm, guest::with_grace(limit));
    let (connection, in_use) = agent.await?;
    let mut result = blocking(move || {
        let _in_use = in_use;
        run(connection, request, environment, limit)
    })
    .await?;
    result.took_us = start.elapsed().as_micros() as u64;
    Ok(Json(result))
}

fn run(
    connection: Connection,
    request: Exec,
    environment: BTreeMap<String, String>,
    limit: Duration,
) -> army_controller::Result<ExecResult> {
    let stdin = request.stdin.clone();
    let exec = guest::exec(request, environment, Some(limit));
    let mut running = connection.exec(exec)?;
    if let Some(text) = stdin {
        let input = running.input();
        // The input is written by another thread: a command that prints before it has read all of it
        // would otherwise wait for its output to be read, without an end.
        std::thread::spawn(move || {
            // A command that does not want its input closes its end.
            let _ = input.write(text.as_bytes()).and_then(|()| input.end());
        });
    }
    let mut output = Output::default();
    loop {
        match running.next_event()? {
            Event::Output(stream, data) => output.add(stream, &data),
            Event::Lost(_, count) => output.omitted += count,
            Event::Exited(exited) => {
                let (stdout, lossy_out) = text(output.stdout);
                let (stderr, lossy_err) = text(output.stderr);
                let ended = guest::exit_status(exited);
                return Ok(ExecResult {
                    exit_code: ended.exit_code,
                    signal: ended.signal,
                    timed_out: ended.timed_out,
                    stdout,
                    stderr,
                    lossy: lossy_out || lossy_err,
                    omitted_bytes: output.omitted,
                    took_us: 0,
                });
            }
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
