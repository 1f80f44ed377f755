//! One request on a Unix socket, as other VMMs' APIs want it: JSON in, a status out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Sends `body`, where there is one, to `path`, and waits for an answer that says that it was done.
pub(super) fn send(socket: &Path, method: &str, path: &str, body: Option<Value>) -> Result<()> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(request(method, path, body).as_bytes())?;
    // The head comes in one piece with what there is of a body, which only tells of failures.
    let mut answer = vec![0; 16 << 10];
    let length = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..length]);
    match answer.starts_with("HTTP/1.1 20") {
        true => Ok(()),
        false => bail!("{method} {path}: {}", answer.trim()),
    }
}

fn request(method: &str, path: &str, body: Option<Value>) -> String {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: bench\r\n");
    match body.map(|body| body.to_string()) {
        // Cloud Hypervisor refuses a body, however empty, where it wants none.
        None => format!("{head}\r\n"),
        Some(body) => format!(
            "{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::request;

    #[test]
    fn a_request_has_a_body_only_where_there_is_one() {
        assert_eq!(
            request("PUT", "/pause", None),
            "PUT /pause HTTP/1.1\r\nHost: bench\r\n\r\n"
        );
        let load = request("PUT", "/load", Some(json!({ "resume": true })));
        assert!(load.ends_with("Content-Length: 15\r\n\r\n{\"resume\":true}"));
    }
}
