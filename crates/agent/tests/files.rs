//! Directories, archives and watches of the agent, on this host over a Unix socket.
#![allow(clippy::unwrap_used)]

mod local;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use agent_client::{ByteLimit, ClientError, Download};
use agent_proto::messages::{
    ChangeKind, ErrorCode, FileKind, GetRange, ListDirectory, MakeDirectory, Pack, RemoveFile,
    RenameFile, StatFile, Unpack, WatchFiles,
};

use local::{Agent, LIMIT, refusal};

const MOST: ByteLimit = ByteLimit::new(64 << 20);

async fn all(mut download: Download) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(data) = download.next().await.unwrap() {
        bytes.extend(data);
    }
    bytes
}

fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

#[tokio::test]
async fn a_directory_is_listed_page_by_page_in_the_order_of_names() {
    let agent = Agent::start();
    for number in 0..25 {
        write(&agent.path(&format!("d/{number:02}")), "");
    }
    symlink("/nowhere", agent.path("d/link")).unwrap();
    let mut names = Vec::new();
    let mut pages = 0;
    loop {
        let request = ListDirectory {
            path: agent.text("d"),
            after: names.last().cloned().unwrap_or_default(),
            limit: 10,
        };
        let page = agent.connect().await.list_directory(request).await.unwrap();
        // A page is full unless it is the last one.
        assert!(page.entries.len() == 10 || !page.more);
        pages += 1;
        let link = page.entries.iter().find(|it| it.name == b"link");
        if let Some(link) = link {
            assert_eq!(
                (link.kind(), &link.target[..]),
                (FileKind::Link, &b"/nowhere"[..])
            );
        }
        names.extend(page.entries.into_iter().map(|it| it.name));
        if !page.more {
            break;
        }
    }
    let mut expected: Vec<Vec<u8>> = (0..25).map(|it| format!("{it:02}").into()).collect();
    expected.push(b"link".to_vec());
    assert_eq!((pages, names), (3, expected));
    let request = ListDirectory {
        path: agent.text("d/00"),
        ..ListDirectory::default()
    };
    refusal(agent.connect().await.list_directory(request).await);
}

#[tokio::test]
async fn directories_are_made_files_described_renamed_and_removed() {
    let agent = Agent::start();
    let make = |path: &str, parents| MakeDirectory {
        path: agent.text(path),
        mode: 0o750,
        user: rustix::process::getuid().as_raw().to_string(),
        parents,
    };
    let (code, _) = refusal(
        agent
            .connect()
            .await
            .make_directory(make("a/b/c", false))
            .await,
    );
    assert_eq!(code, ErrorCode::NotFound);
    for _ in 0..2 {
        agent
            .connect()
            .await
            .make_directory(make("a/b/c", true))
            .await
            .unwrap();
    }
    refusal(
        agent
            .connect()
            .await
            .make_directory(make("a/b/c", false))
            .await,
    );
    write(&agent.path("a/f"), "12345");
    symlink("f", agent.path("a/l")).unwrap();
    let stat = async |name: &str, follow| {
        let path = agent.text(name);
        agent.connect().await.stat(StatFile { path, follow }).await
    };
    let directory = stat("a/b", false).await.unwrap();
    assert_eq!(
        (directory.kind(), directory.mode),
        (FileKind::Directory, 0o750)
    );
    let file = stat("a/l", true).await.unwrap();
    assert_eq!((file.kind(), file.size), (FileKind::Regular, 5));
    assert!(file.modified_ms > 1_700_000_000_000);
    assert_eq!(stat("a/l", false).await.unwrap().kind(), FileKind::Link);
    assert_eq!(refusal(stat("a/none", true).await).0, ErrorCode::NotFound);
    write(&agent.path("a/g"), "other");
    let rename = async |from: &str, to: &str, replace| {
        let request = RenameFile {
            from: agent.text(from),
            to: agent.text(to),
            replace,
        };
        agent.connect().await.rename(request).await
    };
    let (_, message) = refusal(rename("a/f", "a/g", false).await);
    assert!(message.contains("it exists"), "{message}");
    rename("a/f", "a/g", true).await.unwrap();
    assert_eq!(fs::read_to_string(agent.path("a/g")).unwrap(), "12345");
}

async fn remove(agent: &Agent, name: &str, recursive: bool, limit: u64) -> Result<(), ClientError> {
    let request = RemoveFile {
        path: agent.text(name),
        recursive,
        limit,
    };
    agent.connect().await.remove(request).await
}

#[tokio::test]
async fn a_tree_is_removed_and_nothing_that_its_links_lead_to() {
    let agent = Agent::start();
    write(&agent.path("kept/file"), "x");
    for number in 0..10 {
        write(&agent.path(&format!("tree/{number}/deep/file")), "x");
    }
    symlink(agent.path("kept"), agent.path("tree/link")).unwrap();
    let (_, message) = refusal(remove(&agent, "tree", false, 100).await);
    assert!(message.contains("not empty"), "{message}");
    let (code, message) = refusal(remove(&agent, "tree", true, 5).await);
    assert_eq!(code, ErrorCode::Exhausted, "{message}");
    remove(&agent, "tree", true, 100).await.unwrap();
    assert!(!agent.path("tree").exists() && agent.path("kept/file").exists());
    assert_eq!(
        refusal(remove(&agent, "tree", true, 100).await).0,
        ErrorCode::NotFound
    );
    symlink(agent.path("kept"), agent.path("link")).unwrap();
    remove(&agent, "link", true, 100).await.unwrap();
    assert!(agent.path("kept/file").exists());
    let request = RemoveFile {
        path: "/".to_owned(),
        recursive: true,
        limit: 1,
    };
    refusal(agent.connect().await.remove(request).await);
}

#[tokio::test]
async fn a_part_of_a_file_is_read_with_the_size_of_the_whole() {
    let agent = Agent::start();
    let content: Vec<u8> = (0..200_000u32).map(|it| it as u8).collect();
    fs::write(agent.path("f"), &content).unwrap();
    for (offset, length) in [(0, 10), (100_000, 90_000), (199_990, 100), (300_000, 5)] {
        let request = GetRange {
            path: agent.text("f"),
            offset,
            length,
        };
        let download = agent.connect().await.get_range(request).await.unwrap();
        assert_eq!(download.info().size, 200_000);
        let end = content.len().min((offset + length) as usize);
        let expected = content.get(offset as usize..end).unwrap_or_default();
        assert!(all(download).await == expected, "{offset}");
    }
}

#[tokio::test]
async fn a_packed_tree_is_the_same_when_it_is_unpacked() {
    let agent = Agent::start();
    let long = "n".repeat(200);
    write(&agent.path(&format!("from/{long}/{long}/file")), "deep");
    write(&agent.path("from/run"), "#!/bin/sh");
    fs::set_permissions(agent.path("from/run"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::write(agent.path("from/big"), vec![7; 300_000]).unwrap();
    symlink("/etc/passwd", agent.path("from/link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        agent.path("from/pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let request = Pack {
        path: agent.text("from"),
    };
    let archive = all(agent.connect().await.pack(request, MOST).await.unwrap()).await;
    fs::create_dir(agent.path("to")).unwrap();
    agent.unpack("to", &archive).await.unwrap();
    let read = |name: &str| fs::read(agent.path(name)).unwrap();
    assert_eq!(read(&format!("to/{long}/{long}/file")), b"deep");
    assert!(read("to/big") == read("from/big"));
    let mode = fs::metadata(agent.path("to/run"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o4755);
    let link = fs::read_link(agent.path("to/link")).unwrap();
    assert_eq!(link, Path::new("/etc/passwd"));
    assert!(!agent.path("to/pipe").exists());
    let modified = |name: &str| {
        let metadata = fs::metadata(agent.path(name)).unwrap();
        let since = metadata
            .modified()
            .unwrap()
            .duration_since(std::time::UNIX_EPOCH);
        since.unwrap().as_secs()
    };
    assert_eq!(modified("to/big"), modified("from/big"));
}

/// An archive with these entries: a path, and the target of a link or the content of a file.
fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, kind, text) in entries {
        let mut header = tar::Header::new_gnu();
        // The library refuses such paths, so they are written by hand.
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        let id = rustix::process::getuid().as_raw();
        header.set_uid(id.into());
        header.set_gid(rustix::process::getgid().as_raw().into());
        header.set_mtime(1);
        let content = match kind {
            tar::EntryType::Regular => text.as_bytes(),
            _ => {
                header.as_gnu_mut().unwrap().linkname[..text.len()]
                    .copy_from_slice(text.as_bytes());
                b""
            }
        };
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[tokio::test]
async fn an_archive_writes_nothing_outside_of_its_directory() {
    use tar::EntryType::{Block, Link, Regular, Symlink};
    let agent = Agent::start();
    write(&agent.path("outside/file"), "kept");
    fs::create_dir(agent.path("in")).unwrap();
    let outside = agent.text("outside");
    let relative = "../outside";
    for hostile in [
        vec![("../outside/file", Regular, "evil")],
        vec![("a/../../outside/file", Regular, "evil")],
        vec![("out", Symlink, &*outside), ("out/file", Regular, "evil")],
        vec![("rel", Symlink, relative), ("rel/file", Regular, "evil")],
        vec![("rel2", Symlink, relative), ("rel2/new/x", Regular, "evil")],
        vec![("hard", Link, "../outside/file")],
        vec![("out3", Symlink, &*outside), ("hard", Link, "out3/file")],
        vec![("device", Block, "")],
    ] {
        refusal(agent.unpack("in", &archive(&hostile)).await);
    }
    assert_eq!(
        fs::read_to_string(agent.path("outside/file")).unwrap(),
        "kept"
    );
    assert_eq!(fs::read_dir(agent.path("outside")).unwrap().count(), 1);
    // A link that is there already is replaced by a file, and not written through. An absolute path
    // is one within the directory.
    symlink(agent.path("outside/file"), agent.path("in/file")).unwrap();
    let harmless = archive(&[
        ("file", Regular, "new"),
        ("/abs/file", Regular, "inner"),
        ("other", Link, "abs/file"),
    ]);
    agent.unpack("in", &harmless).await.unwrap();
    let read = |name: &str| fs::read_to_string(agent.path(name)).unwrap();
    assert_eq!(
        (read("in/file"), read("in/other")),
        ("new".into(), "inner".into())
    );
    assert_eq!(read("outside/file"), "kept");
}

#[tokio::test]
async fn an_archive_that_is_cut_short_leaves_no_part_of_a_file() {
    let agent = Agent::start();
    fs::create_dir(agent.path("in")).unwrap();
    let content = "x".repeat(100_000);
    let whole = archive(&[
        ("first", tar::EntryType::Regular, "1"),
        ("second", tar::EntryType::Regular, &content),
    ]);
    refusal(agent.unpack("in", &whole[..50_000]).await);
    let names = || -> Vec<_> {
        let entries = fs::read_dir(agent.path("in")).unwrap();
        entries.map(|it| it.unwrap().file_name()).collect()
    };
    assert_eq!(names(), ["first"]);
    // A host that goes away leaves nothing, either.
    let request = Unpack {
        path: agent.text("in"),
        user: String::new(),
    };
    let mut upload = agent.connect().await.unpack(request).unwrap();
    upload.write(&whole[..50_000]).await.unwrap();
    drop(upload);
    let end = std::time::Instant::now() + LIMIT;
    while names() != ["first"] {
        assert!(std::time::Instant::now() < end, "{:?}", names());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn changes_of_a_tree_are_told_new_directories_included() {
    let agent = Agent::start();
    write(&agent.path("w/sub/old"), "x");
    let request = WatchFiles {
        path: agent.text("w"),
        recursive: true,
    };
    let mut watch = agent.connect().await.watch(request).await.unwrap();
    let mut told = async || {
        let change = tokio::time::timeout(LIMIT, watch.next()).await.unwrap();
        let change = change.unwrap().unwrap();
        (change.kind(), String::from_utf8(change.path).unwrap())
    };
    let path = |name: &str| name.to_owned();
    write(&agent.path("w/sub/new"), "");
    assert_eq!(told().await, (ChangeKind::Created, path("sub/new")));
    assert_eq!(told().await, (ChangeKind::Written, path("sub/new")));
    fs::rename(agent.path("w/sub/new"), agent.path("w/moved")).unwrap();
    let moved = [told().await, told().await];
    assert!(moved.contains(&(ChangeKind::MovedAway, path("sub/new"))));
    assert!(moved.contains(&(ChangeKind::MovedHere, path("moved"))));
    fs::create_dir(agent.path("w/made")).unwrap();
    assert_eq!(told().await, (ChangeKind::Created, path("made")));
    // A file that is made before the new directory is watched is not told of, so try again.
    let end = std::time::Instant::now() + LIMIT;
    loop {
        write(&agent.path("w/made/file"), "x");
        let change = tokio::time::timeout(Duration::from_millis(200), told()).await;
        match change {
            Ok(change) if change.1 == "made/file" => break,
            _ => assert!(std::time::Instant::now() < end),
        }
    }
    fs::remove_dir_all(agent.path("w")).unwrap();
    while let Some(change) = tokio::time::timeout(LIMIT, watch.next())
        .await
        .unwrap()
        .unwrap()
    {
        assert_ne!(change.kind(), ChangeKind::Lost);
    }
}
