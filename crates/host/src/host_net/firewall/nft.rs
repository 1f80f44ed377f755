//! Runs the program `nft`.

use std::io::{self, ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};

use super::HostNetError;

/// Runs a script as one transaction.
pub(super) fn run(script: &str, action: &'static str) -> Result<(), HostNetError> {
    let failed = |stderr: String| HostNetError::Nft { action, stderr };
    let mut child = spawn(&["-f", "-"]).map_err(|error| not_started(&error, action))?;
    if let Some(mut stdin) = child.stdin.take()
        && let Err(error) = stdin.write_all(script.as_bytes())
        // At a syntax error, nft ends early and reports it itself.
        && error.kind() != ErrorKind::BrokenPipe
    {
        return Err(failed(format!("it takes no script: {error}")));
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(format!("it does not end: {error}")))?;
    success(output, action).map(|_| ())
}

/// Returns nft's listing, without the elements that packets add to sets; `None` if there is no such
/// table.
pub(super) fn list(command: &str) -> Result<Option<String>, HostNetError> {
    query(&[&["-s", "-t"], words(command).as_slice()].concat())
}

/// Returns nft's listing as JSON.
pub(super) fn list_json(command: &str) -> Result<Option<serde_json::Value>, HostNetError> {
    let text = query(&[&["-j", "-t"], words(command).as_slice()].concat())?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

fn words(command: &str) -> Vec<&str> {
    command.split_whitespace().collect()
}

fn query(arguments: &[&str]) -> Result<Option<String>, HostNetError> {
    const ACTION: &str = "list its rules";
    let output = spawn(arguments)
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| not_started(&error, ACTION))?;
    match success(output, ACTION) {
        Ok(text) => Ok(Some(text)),
        Err(HostNetError::Nft { stderr, .. }) if stderr.contains("No such file") => Ok(None),
        Err(error) => Err(error),
    }
}

fn success(output: Output, action: &'static str) -> Result<String, HostNetError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("Operation not permitted") {
        return Err(HostNetError::NotAllowed {
            action: "setting up the packet filter's",
            object: "table clone".to_owned(),
        });
    }
    Err(HostNetError::Nft {
        action,
        stderr: stderr.trim().to_owned(),
    })
}

fn not_started(error: &io::Error, action: &'static str) -> HostNetError {
    match error.kind() {
        ErrorKind::NotFound => HostNetError::NftMissing,
        _ => HostNetError::Nft {
            action,
            stderr: format!("it does not start: {error}"),
        },
    }
}

fn spawn(arguments: &[&str]) -> io::Result<std::process::Child> {
    let mut last = io::Error::from(ErrorKind::NotFound);
    // The usual directory is not in every user's PATH.
    for program in ["nft", "/usr/sbin/nft", "/sbin/nft"] {
        let spawned = Command::new(program)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        match spawned {
            Err(error) if error.kind() == ErrorKind::NotFound => last = error,
            result => return result,
        }
    }
    Err(last)
}
