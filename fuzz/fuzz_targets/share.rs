//! The server of a share: a guest's requests, and saved tables, over a directory in memory.
#![no_main]

use clone_fuse::link::{Kind, Request};
use clone_share::{Owner, Server, Settings};

libfuzzer_sys::fuzz_target!(|messages: Vec<(u8, Vec<u8>)>| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    std::fs::write(dir.path().join("a"), "content").expect("a file");
    let root = std::fs::File::open(dir.path()).expect("the directory");
    let owner = Owner::of_this_process((0, 0));
    let mut server = Server::new(root.into(), Settings { owner }).expect("a server");
    for (kind, content) in messages.into_iter().take(32) {
        let kind = match kind % 8 {
            0 => Kind::Descriptor,
            1 => Kind::Save,
            2 => Kind::Restore,
            3 => Kind::RestoreEnd,
            4 => Kind::Reset,
            _ => Kind::Guest,
        };
        let content = &content;
        server.request(Request {
            tag: 0,
            kind,
            content,
        });
    }
});
