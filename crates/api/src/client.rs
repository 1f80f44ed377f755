//! A blocking client of a VM's control socket: one request on one connection.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checkpoints::{
    CheckpointList, CheckpointName, CheckpointRequest, CheckpointTaken, NewCheckpoint, Rewound,
};
use crate::control::{
    Adoption, BalloonStatus, BalloonTarget, ConsoleInfo, MigrationDone, MigrationReceived,
    MigrationRequest, MigrationStatus, SnapshotRequest, SnapshotTaken, TouchedPages, VmInfo,
    VmStats,
};
use crate::descriptors;
use crate::error::ApiError;
use crate::jail::RequiredJail;
use crate::routes::{self, Operation};
use crate::units::Bytes;

/// The size limit of an answer in bytes, far above what a VM sends.
const MAX_RESPONSE: usize = 4 << 20;
/// The most headers of an answer.
const MAX_HEADERS: usize = 32;
/// The default time limit for an answer.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// The errors of a request to a VM.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket.
    #[error("cannot connect to {socket}: {source}")]
    Connect {
        /// The control socket.
        socket: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection failed or timed out.
    #[error("no answer from {socket}: {source}")]
    Transfer {
        /// The control socket.
        socket: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The answer does not follow the API.
    #[error("{socket} gave an answer that cannot be read: {reason}")]
    Malformed {
        /// The control socket.
        socket: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The VM refused the request.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

impl From<ClientError> for ApiError {
    /// What the VM's process answered; for a failure of the connection, an internal error.
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(refusal) => refusal,
            other => Self::internal(&other),
        }
    }
}

/// A client of one VM's control socket.
///
/// ```no_run
/// let vm = clone_api::Client::new("/run/clone/vms/web/control.sock");
/// println!("{:?}", vm.info()?.state);
/// # Ok::<(), clone_api::ClientError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// Makes a client of the VM that listens on `socket`. Each call connects anew.
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// The same client with another limit to each read and write.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Returns the VM's description and state.
    pub fn info(&self) -> Result<VmInfo, ClientError> {
        self.ask(Operation::Info)
    }

    /// Returns the VM's use of resources.
    pub fn stats(&self) -> Result<VmStats, ClientError> {
        self.ask(Operation::Stats)
    }

    /// Stops the vCPUs and devices.
    pub fn pause(&self) -> Result<(), ClientError> {
        self.tell(Operation::Pause)
    }

    /// Resumes a paused VM.
    pub fn resume(&self) -> Result<(), ClientError> {
        self.tell(Operation::Resume)
    }

    /// Asks the guest to shut down, and does not wait for it.
    pub fn power_button(&self) -> Result<(), ClientError> {
        self.tell(Operation::PowerButton)
    }

    /// Ends the VM at once.
    pub fn kill(&self) -> Result<(), ClientError> {
        self.tell(Operation::Kill)
    }

    /// Returns the balloon's status.
    pub fn balloon(&self) -> Result<BalloonStatus, ClientError> {
        self.ask(Operation::GetBalloon)
    }

    /// Sets the balloon's target size.
    pub fn set_balloon(&self, size: Bytes) -> Result<BalloonStatus, ClientError> {
        let body = self.encode(&BalloonTarget { size })?;
        let answer = self.exchange(Operation::SetBalloon, &body)?;
        self.decode(&answer)
    }

    /// Returns the paths of the console's socket and log.
    pub fn console(&self) -> Result<ConsoleInfo, ClientError> {
        self.ask(Operation::Console)
    }

    /// Takes a snapshot into `files`, as [`SnapshotRequest`] describes; returns when all of it is
    /// written.
    pub fn snapshot(
        &self,
        request: &SnapshotRequest,
        files: &[BorrowedFd<'_>],
    ) -> Result<SnapshotTaken, ClientError> {
        let body = self.encode(request)?;
        let answer = self.exchange_with(Operation::Snapshot, &body, files)?;
        self.decode(&answer)
    }

    /// Returns the checkpoints.
    pub fn checkpoints(&self) -> Result<CheckpointList, ClientError> {
        self.ask(Operation::Checkpoints)
    }

    /// Takes a checkpoint into `files`, as [`NewCheckpoint`] describes.
    pub fn checkpoint(
        &self,
        new: &NewCheckpoint,
        files: &[BorrowedFd<'_>],
    ) -> Result<CheckpointTaken, ClientError> {
        let body = self.encode(new)?;
        let answer = self.exchange_with(Operation::Checkpoint, &body, files)?;
        self.decode(&answer)
    }

    /// Removes a checkpoint, and returns the others.
    pub fn remove_checkpoint(&self, name: &CheckpointName) -> Result<CheckpointList, ClientError> {
        let body = self.encode(&CheckpointRequest { name: name.clone() })?;
        let answer = self.exchange(Operation::RemoveCheckpoint, &body)?;
        self.decode(&answer)
    }

    /// Sets the VM back to a checkpoint, with `files` as [`CheckpointRequest`] describes.
    pub fn rewind(
        &self,
        name: &CheckpointName,
        files: &[BorrowedFd<'_>],
    ) -> Result<Rewound, ClientError> {
        let body = self.encode(&CheckpointRequest { name: name.clone() })?;
        let answer = self.exchange_with(Operation::Rewind, &body, files)?;
        self.decode(&answer)
    }

    /// Gives a standby its name and lets it run, if its jail has the required layers.
    pub fn adopt(&self, name: &str, required_jail: &RequiredJail) -> Result<(), ClientError> {
        let body = self.encode(&Adoption {
            name: name.to_owned(),
            required_jail: required_jail.clone(),
        })?;
        self.exchange(Operation::Adopt, &body).map(drop)
    }

    /// Returns the pages that a clone has touched since it was forked.
    pub fn touched_pages(&self) -> Result<TouchedPages, ClientError> {
        self.ask(Operation::Touched)
    }

    /// Sends the VM to another host, as [`MigrationRequest`] describes; returns when it runs there.
    pub fn migrate(
        &self,
        request: &MigrationRequest,
        files: &[BorrowedFd<'_>],
    ) -> Result<MigrationDone, ClientError> {
        let body = self.encode(request)?;
        let answer = self.exchange_with(Operation::Migrate, &body, files)?;
        self.decode(&answer)
    }

    /// Has a VM that was started for this become the one that comes over `stream` (what to read from,
    /// and what to write to); returns when it runs.
    pub fn receive(&self, stream: [BorrowedFd<'_>; 2]) -> Result<MigrationReceived, ClientError> {
        let answer = self.exchange_with(Operation::Receive, &[], &stream)?;
        self.decode(&answer)
    }

    /// Returns whether the VM is to run in its process, and how far its migration is.
    pub fn migration(&self) -> Result<MigrationStatus, ClientError> {
        self.ask(Operation::Migration)
    }

    /// Says that the VM is where it was moved to.
    pub fn confirm_migration(&self) -> Result<(), ClientError> {
        self.tell(Operation::ConfirmMigration)
    }

    /// Says that the VM is where it was before its migration.
    pub fn cancel_migration(&self) -> Result<(), ClientError> {
        self.tell(Operation::CancelMigration)
    }

    fn tell(&self, operation: Operation) -> Result<(), ClientError> {
        self.exchange(operation, &[]).map(drop)
    }

    fn ask<T: DeserializeOwned>(&self, operation: Operation) -> Result<T, ClientError> {
        let body = self.exchange(operation, &[])?;
        self.decode(&body)
    }

    fn encode(&self, body: &impl Serialize) -> Result<Vec<u8>, ClientError> {
        serde_json::to_vec(body).map_err(|error| self.malformed(error))
    }

    fn decode<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.malformed(error))
    }

    fn malformed(&self, reason: impl ToString) -> ClientError {
        ClientError::Malformed {
            socket: self.socket.clone(),
            reason: reason.to_string(),
        }
    }

    /// Sends one request and returns the body of the answer.
    fn exchange(&self, operation: Operation, body: &[u8]) -> Result<Vec<u8>, ClientError> {
        self.exchange_with(operation, body, &[])
    }

    fn exchange_with(
        &self,
        operation: Operation,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, ClientError> {
        let stream = UnixStream::connect(&self.socket).map_err(|source| ClientError::Connect {
            socket: self.socket.clone(),
            source,
        })?;
        let response = self
            .transfer(stream, operation, body, files)
            .map_err(|source| ClientError::Transfer {
                socket: self.socket.clone(),
                source,
            })?;
        let (status, body) = parse_response(&response).map_err(|error| self.malformed(error))?;
        if (200..300).contains(&status) {
            return Ok(body.to_vec());
        }
        Err(match serde_json::from_slice::<ApiError>(body) {
            Ok(error) => ClientError::Refused(error),
            Err(error) => self.malformed(format!("status {status}: {error}")),
        })
    }

    fn transfer(
        &self,
        mut stream: UnixStream,
        operation: Operation,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> io::Result<Vec<u8>> {
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        let route = routes::of(operation);
        let mut request = format!(
            "{} {} HTTP/1.1\r\nHost: clone\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            route.method.as_str(),
            route.path,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        let sent = descriptors::send(&stream, &request, files)?;
        stream.write_all(&request[sent..])?;
        let mut response = Vec::new();
        stream
            .take(MAX_RESPONSE as u64)
            .read_to_end(&mut response)?;
        Ok(response)
    }
}

/// Splits an answer, which ends with the connection, into status and body.
fn parse_response(response: &[u8]) -> Result<(u16, &[u8]), String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let body_at = match head.parse(response) {
        Ok(httparse::Status::Complete(at)) => at,
        Ok(httparse::Status::Partial) => return Err("it ends within the headers".into()),
        Err(error) => return Err(error.to_string()),
    };
    let status = head.code.ok_or("no status")?;
    let body = &response[body_at..];
    let length = head
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let Some(length) = length else {
        return Ok((status, body));
    };
    let length: usize = std::str::from_utf8(length.value)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or("its content-length is no number")?;
    let body = body
        .get(..length)
        .ok_or_else(|| format!("{} bytes of {length} came", body.len()))?;
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Answers one connection with `response`, whatever is asked; gives what was asked.
    fn serve_once(
        response: &'static str,
    ) -> (tempfile::TempDir, Client, thread::JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let count = stream.read(&mut request).unwrap();
            stream.write_all(response.as_bytes()).unwrap();
            String::from_utf8(request[..count].to_vec()).unwrap()
        });
        (dir, Client::new(path), server)
    }

    #[test]
    fn a_call_sends_its_route_and_reads_the_answer() {
        let (_dir, client, server) = serve_once(
            "HTTP/1.1 200 OK\r\nContent-Length: 38\r\n\r\n{\"target_bytes\":4096,\"actual_bytes\":0}",
        );
        let status = client.set_balloon(Bytes(4096)).unwrap();
        assert_eq!(status.target_bytes, 4096);
        let request = server.join().unwrap();
        assert!(
            request.starts_with("PUT /v1/vm/balloon HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(request.ends_with("{\"size\":4096}"), "{request}");
    }

    #[test]
    fn a_refusal_carries_its_code_and_advice() {
        let (_dir, client, _server) = serve_once(
            "HTTP/1.1 409 Conflict\r\n\r\n{\"code\":\"conflict\",\"message\":\"no\",\"advice\":\"yes\"}",
        );
        match client.pause() {
            Err(ClientError::Refused(error)) => {
                assert_eq!(error.code, ErrorCode::Conflict);
                assert_eq!(error.advice.as_deref(), Some("yes"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_that_are_cut_or_no_http_are_told_as_such() {
        for response in [
            "",
            "HTTP/1.1 200",
            "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 500 No\r\n\r\nnot json",
        ] {
            let (_dir, client, _server) = serve_once(response);
            let error = client.info().unwrap_err();
            assert!(
                matches!(error, ClientError::Malformed { .. }),
                "{response:?}: {error}"
            );
        }
    }

    #[test]
    fn a_server_that_never_answers_is_left_after_the_time_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let client = Client::new(&path).with_timeout(Duration::from_millis(20));
        assert!(matches!(client.info(), Err(ClientError::Transfer { .. })));
        drop(dir);
        assert!(matches!(client.info(), Err(ClientError::Connect { .. })));
    }
}
