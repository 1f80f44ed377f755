use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clone_api::control::VmState;
use clone_api::routes::ROUTES;
use clone_api::{Client, ClientError, ErrorCode, VmConfig};
use clone_vmm::event_loop::EventLoop;
use serde_json::Value;

use super::*;
use clone_api::jail::JailStatus;

/// A VM without a machine, that notes what was asked.
struct Fake {
    asked: Arc<Mutex<Vec<&'static str>>>,
    target: u64,
}

impl Fake {
    fn note(&self, what: &'static str) {
        self.asked.lock().unwrap().push(what);
    }
}

impl VmControl for Fake {
    fn info(&self) -> VmInfo {
        VmInfo {
            name: "fake".into(),
            state: VmState::Running,
            pid: 1,
            started_unix_ms: 0,
            share_failures: Default::default(),
            version: "0".into(),
            config: VmConfig::default(),
            jail: JailStatus::default(),
            rewound: None,
            timeline: Vec::new(),
        }
    }

    fn stats(&mut self) -> Result<VmStats, ApiError> {
        Ok(VmStats::default())
    }

    fn pause(&mut self) -> Result<(), ApiError> {
        self.note("pause");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ApiError> {
        self.note("resume");
        Ok(())
    }

    fn power_button(&mut self) -> Result<(), ApiError> {
        Err(ApiError::new(ErrorCode::Conflict, "it is paused").advise("resume it first"))
    }

    fn kill(&mut self) {
        self.note("kill");
    }

    fn balloon(&mut self) -> Result<BalloonStatus, ApiError> {
        Ok(BalloonStatus {
            target_bytes: self.target,
            ..BalloonStatus::default()
        })
    }

    fn set_balloon(&mut self, size: Bytes) -> Result<BalloonStatus, ApiError> {
        self.target = size.0;
        self.balloon()
    }

    /// Answers from another thread with the number of files that came.
    fn snapshot(&mut self, _request: SnapshotRequest, files: Vec<OwnedFd>, responder: Responder) {
        self.note("snapshot");
        thread::spawn(move || {
            assert!(!files.iter().any(|file| file.as_raw_fd() < 3));
            responder.answer(Ok(clone_api::control::SnapshotTaken {
                memory_bytes: files.len() as u64,
                ..Default::default()
            }));
        });
    }

    fn checkpoints(&self) -> Result<CheckpointList, ApiError> {
        Ok(CheckpointList::default())
    }

    fn checkpoint(&mut self, _new: NewCheckpoint, _files: Vec<OwnedFd>, responder: Responder) {
        self.note("checkpoint");
        responder.answer(Ok(CheckpointList::default()));
    }

    fn remove_checkpoint(&mut self, _name: &CheckpointName) -> Result<CheckpointList, ApiError> {
        self.note("remove");
        Ok(CheckpointList::default())
    }

    fn rewind(&mut self, name: CheckpointName, files: Vec<OwnedFd>, responder: Responder) {
        self.note("rewind");
        let present = files.is_empty().then_some(name);
        responder.answer(Ok(CheckpointList {
            present,
            ..CheckpointList::default()
        }));
    }

    /// Answers from another thread with the number of files that came, and notes that it is over.
    fn migrate(&mut self, _: MigrationRequest, files: Vec<OwnedFd>, responder: Responder) {
        let asked = Arc::clone(&self.asked);
        thread::spawn(move || {
            let done = clone_api::control::MigrationDone {
                bytes: files.len() as u64,
                ..Default::default()
            };
            responder.answer_last(Ok(done), move || asked.lock().unwrap().push("over"));
        });
    }

    fn receive(&mut self, _files: Vec<OwnedFd>, responder: Responder) {
        self.note("receive");
        responder.answer(Ok(clone_api::control::MigrationReceived::default()));
    }

    fn migration(&self) -> MigrationStatus {
        MigrationStatus::default()
    }

    fn confirm_migration(&mut self) -> Result<(), ApiError> {
        self.note("confirm");
        Ok(())
    }

    fn cancel_migration(&mut self) -> Result<(), ApiError> {
        self.note("cancel");
        Ok(())
    }

    fn touched_pages(&self) -> Result<TouchedPages, ApiError> {
        Ok(TouchedPages::default())
    }

    fn adopt(&mut self, _adoption: &Adoption) -> Result<(), ApiError> {
        self.note("adopt");
        Ok(())
    }

    fn console(&self) -> ConsoleInfo {
        ConsoleInfo {
            socket: "s".into(),
            log: "l".into(),
            log_limit_bytes: 0,
            attached: 0,
        }
    }
}

/// A server in a thread of its own, ended with the test.
struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    asked: Arc<Mutex<Vec<&'static str>>>,
    over: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let asked = Arc::default();
        let fake = Fake {
            asked: Arc::clone(&asked),
            target: 0,
        };
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let server = thread::spawn(move || {
            let mut events = EventLoop::new().unwrap();
            let registrar = events.reserve();
            let server = ControlServer::new(registrar.clone(), listener, Box::new(fake)).unwrap();
            events.attach(&registrar, Arc::new(Mutex::new(server)));
            while !stop.load(Ordering::Relaxed) {
                events.run_once(10).unwrap();
            }
        });
        Self {
            _dir: dir,
            path,
            asked,
            over,
            server: Some(server),
        }
    }

    fn client(&self) -> Client {
        Client::new(&self.path).with_timeout(Duration::from_secs(5))
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }

    /// Sends `request` and gives all that comes until the server closes.
    fn exchange(&self, request: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that has refused may close before it has read all.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let ended = self.server.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking(), "the server panicked");
    }
}

#[test]
fn an_answer_that_comes_later_reaches_its_client_and_files_come_with_the_request() {
    let bench = Bench::new();
    let file = tempfile::tempfile().unwrap();
    let files = [std::os::fd::AsFd::as_fd(&file); 4];
    let request = SnapshotRequest {
        disks: vec![3],
        ..SnapshotRequest::default()
    };
    let client = bench.client();
    let taken = client.snapshot(&request, &files).unwrap();
    assert_eq!(taken.memory_bytes, 4, "as many files as were sent");
    assert_eq!(client.snapshot(&request, &[]).unwrap().memory_bytes, 0);
}

#[test]
fn the_client_reaches_every_operation() {
    let bench = Bench::new();
    let client = bench.client();
    assert_eq!(client.info().unwrap().name, "fake");
    client.stats().unwrap();
    client.pause().unwrap();
    client.resume().unwrap();
    assert_eq!(
        client.set_balloon(Bytes::mib(3)).unwrap().target_bytes,
        3 << 20
    );
    assert_eq!(client.balloon().unwrap().target_bytes, 3 << 20);
    assert_eq!(client.console().unwrap().socket, "s");
    client.kill().unwrap();
    assert_eq!(*bench.asked.lock().unwrap(), ["pause", "resume", "kill"]);
    match client.power_button() {
        Err(ClientError::Refused(error)) => {
            assert_eq!(error.code, ErrorCode::Conflict);
            assert_eq!(error.advice.as_deref(), Some("resume it first"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_route_answers_with_the_status_that_the_document_promises() {
    let bench = Bench::new();
    let document: Value = serde_json::from_str(clone_api::OPENAPI).unwrap();
    let paths = document["paths"].as_object().unwrap();
    let mut served = 0;
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let content = &operation["requestBody"]["content"]["application/json"];
            let body = content
                .get("example")
                .map(Value::to_string)
                .unwrap_or_default();
            let answer = bench.exchange(
                format!(
                    "{} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                    method.to_uppercase(),
                    body.len()
                )
                .as_bytes(),
            );
            let status = answer.split(' ').nth(1).unwrap();
            // The fake refuses the power button; a refusal is in the document as `default`.
            let promised = operation["responses"].get(status).is_some();
            assert!(
                promised || path == "/v1/vm/power-button",
                "{path}: {answer}"
            );
            assert_ne!(status, "404", "{path}");
            served += 1;
        }
    }
    assert_eq!(served, ROUTES.len());
}

#[test]
fn what_follows_a_last_answer_is_done_after_it_and_without_a_client_too() {
    let bench = Bench::new();
    let body = r#"{"base":{"memory":1,"disks":[]},"disks":[]}"#;
    let request = format!(
        "POST /v1/vm/migrate HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = bench.exchange(request.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    // This client does not wait for its answer.
    drop({
        let mut stream = bench.connect();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    });
    let over = || {
        bench
            .asked
            .lock()
            .unwrap()
            .iter()
            .filter(|it| **it == "over")
            .count()
    };
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while over() < 2 {
        assert!(std::time::Instant::now() < end, "{}", over());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn requests_sent_at_once_are_answered_in_order_on_one_connection() {
    let bench = Bench::new();
    let mut request = Vec::new();
    for n in 1..=300 {
        let body = format!("{{\"size\":{}}}", n * 4096);
        let head = format!(
            "PUT /v1/vm/balloon HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        request.extend_from_slice(head.as_bytes());
        request.extend_from_slice(body.as_bytes());
    }
    request.extend_from_slice(b"GET /nothing HTTP/1.1\r\nConnection: close\r\n\r\n");
    let answer = bench.exchange(&request);
    let mut at = 0;
    for n in 1..=300 {
        let wanted = format!("\"target_bytes\":{},", n * 4096);
        at += answer[at..].find(&wanted).unwrap_or_else(|| panic!("{n}"));
    }
    assert!(answer[at..].contains("404 Not Found"));
}

#[test]
fn a_client_that_asks_without_reading_does_not_grow_the_server() {
    let bench = Bench::new();
    let mut greedy = bench.connect();
    greedy.set_nonblocking(true).unwrap();
    let request = b"GET /openapi.json HTTP/1.1\r\n\r\n".repeat(100);
    let mut taken = 0;
    for _ in 0..2000 {
        match greedy.write(&request) {
            Ok(count) => taken += count,
            Err(_) => break,
        }
    }
    // The server stopped reading; others are served.
    assert!(taken < 2000 * request.len());
    bench.client().info().unwrap();
    // And what it did read it answers, once the client reads.
    greedy.set_nonblocking(false).unwrap();
    let mut answers = vec![0; clone_api::OPENAPI.len() * 20];
    greedy.read_exact(&mut answers).unwrap();
}

#[test]
fn slow_clients_do_not_hold_up_others_and_are_served_at_their_pace() {
    let bench = Bench::new();
    let mut slow = bench.connect();
    let request = b"PUT /v1/vm/balloon HTTP/1.1\r\nConnection: close\r\nContent-Length: 13\r\n\r\n{\"size\":4096}";
    for byte in request {
        slow.write_all(&[*byte]).unwrap();
        if byte % 16 == 0 {
            bench.client().info().unwrap();
        }
    }
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[test]
fn hostile_requests_get_one_clear_error_and_the_connection_ends() {
    let bench = Bench::new();
    let huge_head = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let huge_body = "PUT /v1/vm/balloon HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n";
    for (request, status) in [
        (huge_head.as_bytes(), "413"),
        (huge_body.as_bytes(), "413"),
        (&b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"[..], "400"),
        (
            b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "400",
        ),
        (
            b"POST /v1/vm/pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "400",
        ),
    ] {
        let answer = bench.exchange(request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
        assert_eq!(answer.matches("Content-Length:").count(), 1, "{answer}");
        assert!(answer.contains("\"message\""), "{answer}");
    }
    bench.client().info().unwrap();
}

#[test]
fn bodies_that_do_not_fit_are_refused_and_the_connection_goes_on() {
    let bench = Bench::new();
    let mut stream = bench.connect();
    for (body, status) in [
        ("", "400"),
        ("{", "400"),
        ("[]", "422"),
        ("{\"size\":-1}", "422"),
        ("{\"size\":\"huge\"}", "422"),
        ("{\"size\":1,\"more\":2}", "422"),
        ("{\"size\":\"1M\"}", "200"),
    ] {
        let request = format!(
            "PUT /v1/vm/balloon HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 2048];
        let count = stream.read(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer[..count]);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{body}: {answer}"
        );
    }
}

#[test]
fn wrong_methods_are_told_the_right_ones() {
    let bench = Bench::new();
    let answer = bench.exchange(b"DELETE /v1/vm/balloon HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("Allow: GET, PUT\r\n"), "{answer}");
}

#[test]
fn a_client_that_closes_its_sending_side_still_gets_its_answer() {
    let bench = Bench::new();
    let mut stream = bench.connect();
    stream.write_all(b"GET /v1/vm HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[test]
fn idle_connections_are_pushed_out_by_new_ones() {
    let bench = Bench::new();
    let idle: Vec<_> = (0..MAX_CONNECTIONS * 3).map(|_| bench.connect()).collect();
    for _ in 0..MAX_CONNECTIONS {
        bench.client().info().unwrap();
    }
    drop(idle);
    bench.client().info().unwrap();
}
