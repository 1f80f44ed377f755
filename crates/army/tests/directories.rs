//! Files and directories in guests through the API: pages, ranges, archives, and changes.
#![allow(clippy::unwrap_used)]

mod agents;
mod served;

use std::future::Future;

use agent_proto::messages::{
    ChangeKind, Directory, Empty, Error, ErrorCode, FileChange, FileEntry, FileInfo, FileKind,
    from_agent::Kind, from_host, request::Operation,
};
use army_api::client::ClientError;
use army_api::files::{FilePage, ListFiles};
use army_api::{Problem, ProblemKind, files};
use futures_util::StreamExt;
use reqwest::Response;
use serde_json::json;

use agents::{Agent, LIMIT, next_agent, with_vm};
use served::Server;

const PATH: &str = "/v1/vms/a/files";

fn problem<T>(result: Result<T, ClientError>) -> Problem {
    match result {
        Err(ClientError::Refused(problem)) => problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// A request, and meanwhile what the agent does.
async fn while_agent<T, A>(
    request: impl Future<Output = T>,
    agent: impl Future<Output = A>,
) -> (T, A) {
    let both = futures_util::future::join(request, agent);
    tokio::time::timeout(LIMIT, both).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_comes_in_pages_and_an_old_agent_says_that_it_cannot() {
    let (server, node) = with_vm().await;
    let mut agent = next_agent(&node, &[]).await;
    let query = |after: Option<String>| ListFiles {
        path: "/d".into(),
        limit: Some(1),
        after,
    };
    let url = format!("{PATH}/list");
    let answer = async {
        let Operation::ListDirectory(request) = agent.request().await else {
            panic!("no list")
        };
        assert_eq!((&*request.path, request.limit), ("/d", 1));
        let entry = FileEntry {
            name: b"a\xff".to_vec(),
            kind: FileKind::Link.into(),
            mode: 0o777,
            target: b"/x".to_vec(),
            ..FileEntry::default()
        };
        let page = Directory {
            entries: vec![entry],
            more: true,
        };
        agent.send(Kind::Directory(page)).await;
    };
    let (page, ()) = while_agent(server.admin.get(&url, &query(None)), answer).await;
    let page: FilePage = page.unwrap();
    assert_eq!(page.entries[0].name, "a\u{fffd}");
    assert_eq!(page.entries[0].target.as_deref(), Some("/x"));
    assert!(page.entries[0].lossy);
    let mut agent = next_agent(&node, &[]).await;
    let answer = async {
        let Operation::ListDirectory(request) = agent.request().await else {
            panic!("no list")
        };
        assert_eq!(request.after, b"a\xff");
        let refused = Error {
            code: ErrorCode::Unsupported.into(),
            message: "this guest's agent (0.0.1) does not know this operation".into(),
        };
        agent.send(Kind::Error(refused)).await;
    };
    let next = query(page.next);
    let (refused, ()) = while_agent(server.admin.get::<FilePage>(&url, &next), answer).await;
    let refused = problem(refused);
    assert_eq!(refused.kind, ProblemKind::InvalidRequest);
    assert!(refused.detail.contains("does not know"), "{refused}");
    for wrong in [json!({"path": "d"}), json!({"path": "/d", "limit": 1001})] {
        let refused = problem(server.admin.get::<FilePage>(&url, &wrong).await);
        assert_eq!(refused.kind, ProblemKind::InvalidRequest, "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_made_renamed_and_removed() {
    let (server, node) = with_vm().await;
    let admin = &server.admin;
    let mut agent = next_agent(&node, &[]).await;
    let body = json!({"path": "/d", "mode": "700", "parents": true});
    let url = format!("{PATH}/mkdir");
    let (made, request) = while_agent(admin.post(&url, &body), answered(&mut agent)).await;
    made.unwrap();
    assert!(matches!(request, Operation::MakeDirectory(it) if it.mode == 0o700 && it.parents));
    let mut agent = next_agent(&node, &[]).await;
    let body = json!({"from": "/d", "to": "/e"});
    let url = format!("{PATH}/rename");
    let (renamed, request) = while_agent(admin.post(&url, &body), answered(&mut agent)).await;
    renamed.unwrap();
    assert!(matches!(request, Operation::RenameFile(it) if it.to == "/e" && !it.replace));
    let mut agent = next_agent(&node, &[]).await;
    let query = files::RemoveFile {
        path: "/e".into(),
        recursive: true,
    };
    let (removed, request) = while_agent(admin.delete(PATH, &query), answered(&mut agent)).await;
    removed.unwrap();
    assert!(matches!(request, Operation::RemoveFile(it) if it.recursive && it.limit == 100_000));
    let viewer = server.client("root", army_api::keys::Role::Viewer).await;
    let refused = problem(viewer.delete(PATH, &query).await);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
}

/// Answers a request with success, and returns it.
async fn answered(agent: &mut Agent) -> Operation {
    let request = agent.request().await;
    agent.done().await;
    request
}

async fn read(server: &Server, range: &str) -> Response {
    let request = reqwest::Client::new()
        .get(format!("{}{PATH}?path=/f", server.url))
        .bearer_auth(server.admin.key())
        .header("range", range);
    request.send().await.unwrap()
}

/// Sends the part of a file of 10 bytes that is requested.
async fn send_part(agent: &mut Agent) {
    let (offset, length) = match agent.request().await {
        Operation::GetRange(request) => (request.offset, request.length),
        Operation::Get(_) => (0, u64::MAX),
        other => panic!("{other:?}"),
    };
    agent.send(Kind::File(FileInfo { size: 10, mode: 0 })).await;
    let content = b"0123456789";
    let from = offset.min(10) as usize;
    let to = offset.saturating_add(length).min(10) as usize;
    agent.send(Kind::Data(content[from..to].to_vec())).await;
    agent.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_a_file_is_read_and_an_old_agent_sends_all() {
    let (server, node) = with_vm().await;
    for (range, status, place, content) in [
        ("bytes=2-4", 206, "bytes 2-4/10", "234"),
        ("bytes=7-100", 206, "bytes 7-9/10", "789"),
        ("bytes=8-", 206, "bytes 8-9/10", "89"),
    ] {
        let mut agent = next_agent(&node, &[5, 17]).await;
        let (answer, ()) = while_agent(read(&server, range), send_part(&mut agent)).await;
        assert_eq!(answer.status(), status, "{range}");
        assert_eq!(answer.headers()["content-range"], place);
        assert_eq!(answer.text().await.unwrap(), content);
    }
    // The last bytes: the size is asked for first.
    let mut first = next_agent(&node, &[5, 17]).await;
    let mut second = next_agent(&node, &[5, 17]).await;
    let agent = async {
        assert!(matches!(first.request().await, Operation::StatFile(_)));
        let entry = FileEntry {
            size: 10,
            ..FileEntry::default()
        };
        first.send(Kind::Entry(entry)).await;
        send_part(&mut second).await;
    };
    let (answer, ()) = while_agent(read(&server, "bytes=-3"), agent).await;
    assert_eq!(answer.headers()["content-range"], "bytes 7-9/10");
    assert_eq!(answer.text().await.unwrap(), "789");
    let mut agent = next_agent(&node, &[5, 17]).await;
    let (answer, ()) = while_agent(read(&server, "bytes=10-"), send_part(&mut agent)).await;
    assert_eq!(answer.status(), 416);
    assert_eq!(answer.headers()["content-range"], "bytes */10");
    let mut agent = next_agent(&node, &[5]).await;
    let (answer, ()) = while_agent(read(&server, "bytes=2-4"), send_part(&mut agent)).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.text().await.unwrap(), "0123456789");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_sent_as_it_comes_and_a_refusal_says_why() {
    let (server, node) = with_vm().await;
    let query = files::ArchivePath {
        path: "/d".into(),
        user: None,
    };
    let url = format!("{PATH}/archive");
    let mut agent = next_agent(&node, &[]).await;
    let content = vec![7; 100_000];
    let answer = async {
        assert!(matches!(agent.request().await, Operation::Unpack(it) if it.path == "/d"));
        let mut received = Vec::new();
        loop {
            match agent.receive().await {
                Some(from_host::Kind::Data(data)) => received.extend(data),
                Some(from_host::Kind::DataEnd(_)) => break,
                other => panic!("{other:?}"),
            }
        }
        let refused = Error {
            code: ErrorCode::Denied.into(),
            message: "it leads out of the directory".into(),
        };
        agent.send(Kind::Error(refused)).await;
        received
    };
    let sent = server.admin.put_bytes(&url, &query, content.clone());
    let (refused, received) = while_agent(sent, answer).await;
    assert!(received == content);
    let refused = problem(refused);
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    assert!(refused.detail.contains("leads out"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_sent_until_the_client_goes_away() {
    let (server, node) = with_vm().await;
    let mut agent = next_agent(&node, &[]).await;
    let url = format!("{PATH}/watch");
    let query = files::WatchFiles {
        path: "/d".into(),
        recursive: true,
    };
    let begin = async {
        assert!(matches!(agent.request().await, Operation::WatchFiles(it) if it.recursive));
        agent.send(Kind::Watching(Empty {})).await;
        let change = FileChange {
            kind: ChangeKind::Written.into(),
            path: b"x/y".to_vec(),
            is_directory: false,
        };
        agent.send(Kind::Change(change)).await;
    };
    let (changes, ()) = while_agent(server.admin.stream(&url, &query), begin).await;
    let mut changes = Box::pin(changes.unwrap());
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let change = tokio::time::timeout(LIMIT, changes.next()).await.unwrap();
        let change: files::FileChange = change.unwrap().unwrap();
        kinds.push((change.kind, change.path));
    }
    let expected = [
        (files::FileChangeKind::Watching, String::new()),
        (files::FileChangeKind::Written, "x/y".to_owned()),
    ];
    assert_eq!(kinds, expected);
    drop(changes);
    assert_eq!(agent.receive().await, None);
}
