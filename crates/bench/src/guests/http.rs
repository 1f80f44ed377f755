//! One request on a Unix socket, as Firecracker's API wants it: JSON in, a status out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Sends `body` to `path`, and waits for an answer that says that it was done.
pub(super) fn send(socket: &Path, method: &str, path: &str, body: &Value) -> Result<()> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(LIMIT))?;
    let body = body.to_string();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    // The head comes in one piece with what there is of a body, which only tells of failures.
    let mut answer = vec![0; 16 << 10];
    let length = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..length]);
    match answer.starts_with("HTTP/1.1 20") {
        true => Ok(()),
        false => bail!("{method} {path}: {}", answer.trim()),
    }
}
