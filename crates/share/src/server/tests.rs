//! The server as a guest meets it: requests as bytes, well-made and hostile, over a real directory.

mod hostile;
mod saved;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use clone_fuse::link::{Kind, Request};
use clone_fuse::wire::{IN_HEADER, Input, Output, ROOT_ID, op};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempDir;

use super::*;

/// A share and its guest.
struct Guest {
    dir: TempDir,
    server: Server,
}

fn server(path: &Path) -> Server {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap();
    let owner = Owner::of_this_process((0, 0));
    Server::new(root, Settings { owner }).unwrap()
}

fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut out = Output::new();
    out.u32((IN_HEADER + body.len()) as u32)
        .u32(opcode)
        .u64(1)
        .u64(node)
        .zeros(16)
        .bytes(body);
    out.into_bytes()
}

fn text(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = server(dir.path());
        Self { dir, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    fn control(&mut self, kind: Kind, content: &[u8]) -> Option<Result> {
        let tag = 0;
        self.server.request(Request { tag, kind, content })
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result {
        let message = message(opcode, node, body);
        self.control(Kind::Guest, &message).expect("an answer")
    }

    /// Looks a name up, and returns the node.
    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64> {
        let answer = self.ask(op::LOOKUP, parent, &text(name.as_bytes()))?;
        assert_eq!(answer.content.len(), clone_fuse::wire::ENTRY_BYTES);
        Ok(Input::new(&answer.content).u64().unwrap())
    }

    /// Opens a file, and returns the handle and the descriptor.
    fn open(&mut self, node: u64, flags: i32) -> Result<(u64, Rc<OwnedFd>)> {
        let mut body = Output::new();
        body.u32(flags as u32).u32(0);
        let answer = self.ask(op::OPEN, node, &body.into_bytes())?;
        let handle = Input::new(&answer.content).u64().unwrap();
        Ok((handle, answer.file.expect("a descriptor")))
    }

    fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<(u64, u64, Rc<OwnedFd>)> {
        let mut body = Output::new();
        body.u32(flags as u32).u32(0o100_644).u32(0).u32(0);
        body.bytes(&text(name.as_bytes()));
        let answer = self.ask(op::CREATE, parent, &body.into_bytes())?;
        let mut input = Input::new(&answer.content);
        let node = input.u64().unwrap();
        input.bytes(clone_fuse::wire::ENTRY_BYTES - 8).unwrap();
        let handle = input.u64().unwrap();
        Ok((node, handle, answer.file.expect("a descriptor")))
    }

    fn open_directory(&mut self, node: u64) -> Result<u64> {
        let answer = self.ask(op::OPENDIR, node, &[0; 8])?;
        Ok(Input::new(&answer.content).u64().unwrap())
    }

    /// All names of a directory, read in steps of `size` bytes.
    fn names(&mut self, node: u64, opcode: u32, size: u32) -> Vec<String> {
        let handle = self.open_directory(node).unwrap();
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let mut body = Output::new();
            body.u64(handle).u64(offset).u32(size).zeros(20);
            let content = self.ask(opcode, node, &body.into_bytes()).unwrap().content;
            assert!(content.len() <= size as usize);
            if content.is_empty() {
                return names;
            }
            let mut input = Input::new(&content);
            while !input.rest().is_empty() {
                if opcode == op::READDIRPLUS {
                    input.bytes(clone_fuse::wire::ENTRY_BYTES).unwrap();
                }
                let _inode = input.u64().unwrap();
                offset = input.u64().unwrap();
                let (len, _kind) = (input.u32().unwrap() as usize, input.u32().unwrap());
                let name = input.bytes(len.next_multiple_of(8)).unwrap();
                names.push(String::from_utf8(name[..len].to_vec()).unwrap());
            }
        }
    }
}

fn content(file: &OwnedFd) -> String {
    let mut text = String::new();
    let mut file = File::from(file.try_clone().unwrap());
    file.read_to_string(&mut text).unwrap();
    text
}

fn refused<T>(result: Result<T>) -> Errno {
    result.err().expect("a refusal")
}

#[test]
fn a_file_is_found_opened_and_its_descriptor_handed_over() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("src")).unwrap();
    guest.put("src/main.rs", "fn main() {}");
    let src = guest.lookup(ROOT_ID, "src").unwrap();
    let file = guest.lookup(src, "main.rs").unwrap();
    let (handle, descriptor) = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(content(&descriptor), "fn main() {}");
    rustix::io::write(&descriptor, b"x").unwrap_err();
    let again = guest.control(Kind::Descriptor, &handle.to_le_bytes());
    assert!(again.unwrap().unwrap().file.is_some());
    guest
        .ask(op::RELEASE, file, &text(&handle.to_le_bytes()[..]))
        .unwrap();
    let gone = guest.control(Kind::Descriptor, &handle.to_le_bytes());
    assert_eq!(refused(gone.unwrap()), Errno::BADF);
    assert_eq!(refused(guest.lookup(src, "lib.rs")), Errno::NOENT);
}

#[test]
fn files_are_made_without_the_right_to_run_as_their_owner() {
    let mut guest = Guest::new();
    let (_, _, file) = guest.create(ROOT_ID, "made", libc::O_RDWR).unwrap();
    rustix::io::write(&file, b"content").unwrap();
    assert_eq!(fs::read_to_string(guest.path("made")).unwrap(), "content");
    let mut body = Output::new();
    body.u32(0o104_755).zeros(12).bytes(b"suid\0");
    guest.ask(op::MKNOD, ROOT_ID, &body.into_bytes()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&guest.path("suid")), 0o755 & !umask());
    let node = guest.lookup(ROOT_ID, "suid").unwrap();
    let mut body = Output::new();
    body.u32(1).zeros(64).u32(0o6711).zeros(16);
    guest.ask(op::SETATTR, node, &body.into_bytes()).unwrap();
    assert_eq!(mode(&guest.path("suid")), 0o711);
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        let mut body = Output::new();
        body.u32(kind | 0o666).u32(0x0103).zeros(8).bytes(b"null\0");
        let made = guest.ask(op::MKNOD, ROOT_ID, &body.into_bytes());
        assert_eq!(refused(made), Errno::PERM);
    }
}

/// The umask of the tests; the program has none.
fn umask() -> u32 {
    let now = rustix::process::umask(Mode::empty());
    rustix::process::umask(now);
    now.as_raw_mode()
}

#[test]
fn directories_are_read_in_pieces_of_any_size() {
    let mut guest = Guest::new();
    for number in 0..300 {
        guest.put(&format!("file-with-a-name-{number}"), "");
    }
    for (opcode, size) in [
        (op::READDIR, 100),
        (op::READDIR, 4096),
        (op::READDIRPLUS, 300),
        (op::READDIRPLUS, 65_536),
    ] {
        let mut names = guest.names(ROOT_ID, opcode, size);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 302, "{opcode} {size}");
    }
    // Those with attributes count as looked up.
    assert_eq!(guest.server.node_count(), 301);
}

#[test]
fn names_are_moved_linked_and_removed() {
    let mut guest = Guest::new();
    guest.put("a", "content");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    let body = [&1_u64.to_le_bytes()[..], b"a\0b\0"].concat();
    guest.ask(op::RENAME, ROOT_ID, &body).unwrap();
    let (_, file) = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(content(&file), "content");
    let body = [&node.to_le_bytes()[..], b"c\0"].concat();
    guest.ask(op::LINK, ROOT_ID, &body).unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "c").unwrap(), node);
    guest.ask(op::UNLINK, ROOT_ID, b"b\0").unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "c").unwrap(), node);
    guest
        .ask(op::SYMLINK, ROOT_ID, b"link\0/etc/passwd\0")
        .unwrap();
    let link = guest.lookup(ROOT_ID, "link").unwrap();
    assert_eq!(
        guest.ask(op::READLINK, link, b"").unwrap().content,
        b"/etc/passwd"
    );
    assert_eq!(refused(guest.ask(op::READLINK, node, b"")), Errno::INVAL);
    guest
        .ask(
            op::MKDIR,
            ROOT_ID,
            &[&[0xED, 1, 0, 0, 0, 0, 0, 0][..], b"d\0"].concat(),
        )
        .unwrap();
    assert_eq!(
        refused(guest.ask(op::UNLINK, ROOT_ID, b"d\0")),
        Errno::ISDIR
    );
    guest.ask(op::RMDIR, ROOT_ID, b"d\0").unwrap();
}

#[test]
fn a_removed_file_that_is_open_keeps_its_attributes_and_content() {
    let mut guest = Guest::new();
    guest.put("gone", "content");
    let node = guest.lookup(ROOT_ID, "gone").unwrap();
    let (_, file) = guest.open(node, libc::O_RDONLY).unwrap();
    guest.ask(op::UNLINK, ROOT_ID, b"gone\0").unwrap();
    guest.ask(op::GETATTR, node, &[0; 16]).unwrap();
    assert_eq!(content(&file), "content");
    assert_eq!(refused(guest.open(node, libc::O_RDONLY)), Errno::STALE);
}

#[test]
fn a_file_without_a_name_gets_one_by_a_link() {
    let mut guest = Guest::new();
    let mut body = Output::new();
    body.u32(libc::O_RDWR as u32)
        .u32(0o600)
        .zeros(8)
        .bytes(b"ignored\0");
    let answer = guest.ask(op::TMPFILE, ROOT_ID, &body.into_bytes()).unwrap();
    let node = Input::new(&answer.content).u64().unwrap();
    rustix::io::write(&*answer.file.unwrap(), b"late").unwrap();
    assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 0);
    let body = [&node.to_le_bytes()[..], b"named\0"].concat();
    guest.ask(op::LINK, ROOT_ID, &body).unwrap();
    assert_eq!(fs::read_to_string(guest.path("named")).unwrap(), "late");
}

#[test]
fn only_users_own_attributes_are_the_guests() {
    let mut guest = Guest::new();
    guest.put("a", "");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    let set = |name: &str| {
        let mut body = Output::new();
        body.u32(3)
            .u32(0)
            .bytes(&text(name.as_bytes()))
            .bytes(b"\0va");
        body.into_bytes()
    };
    for node in [node, ROOT_ID] {
        guest.ask(op::SETXATTR, node, &set("user.k")).unwrap();
        let get = |size: u32| [&size.to_le_bytes()[..], &[0; 4], b"user.k\0"].concat();
        assert_eq!(
            guest.ask(op::GETXATTR, node, &get(9)).unwrap().content,
            b"\0va"
        );
        assert_eq!(
            guest.ask(op::GETXATTR, node, &get(0)).unwrap().content[..4],
            [3, 0, 0, 0]
        );
        assert_eq!(
            refused(guest.ask(op::GETXATTR, node, &get(2))),
            Errno::RANGE
        );
        let list = guest
            .ask(op::LISTXATTR, node, &[0, 1, 0, 0, 0, 0, 0, 0])
            .unwrap();
        assert_eq!(list.content, b"user.k\0");
    }
    for name in [
        "security.capability",
        "trusted.overlay.opaque",
        "system.posix_acl_access",
    ] {
        let refusal = refused(guest.ask(op::SETXATTR, node, &set(name)));
        assert_eq!(refusal, Errno::OPNOTSUPP, "{name}");
    }
}

#[test]
fn sizes_and_times_are_set_with_and_without_a_handle() {
    let mut guest = Guest::new();
    guest.put("a", "0123456789");
    let node = guest.lookup(ROOT_ID, "a").unwrap();
    let change = |valid: u32, handle: u64, size: u64| {
        let mut body = Output::new();
        body.u32(valid).u32(0).u64(handle).u64(size).u64(0);
        body.u64(7).u64(8).u64(0).u32(1).u32(2).u32(0).zeros(20);
        body.into_bytes()
    };
    guest.ask(op::SETATTR, node, &change(1 << 3, 0, 4)).unwrap();
    assert_eq!(fs::read_to_string(guest.path("a")).unwrap(), "0123");
    let (handle, _) = guest.open(node, libc::O_RDWR).unwrap();
    guest
        .ask(op::SETATTR, node, &change(1 << 3 | 1 << 6, handle, 2))
        .unwrap();
    assert_eq!(fs::read_to_string(guest.path("a")).unwrap(), "01");
    guest
        .ask(op::SETATTR, node, &change(1 << 4 | 1 << 5, 0, 0))
        .unwrap();
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(guest.path("a")).unwrap();
    assert_eq!((meta.atime(), meta.mtime(), meta.mtime_nsec()), (7, 8, 2));
    // To the user that owns it already, and to another one.
    let mut owner = change(1 << 1, 0, 0);
    guest.ask(op::SETATTR, node, &owner).unwrap();
    let at = owner.len() - 12;
    owner[at] = 9;
    assert_eq!(refused(guest.ask(op::SETATTR, node, &owner)), Errno::PERM);
}

#[test]
fn a_session_begins_with_what_both_sides_can() {
    let mut guest = Guest::new();
    guest.put("a", "");
    guest.lookup(ROOT_ID, "a").unwrap();
    let init = |major: u32, minor: u32| {
        let mut body = Output::new();
        body.u32(major)
            .u32(minor)
            .u32(1 << 17)
            .u32(u32::MAX)
            .zeros(48);
        body.into_bytes()
    };
    let answer = guest.ask(op::INIT, 0, &init(7, 41)).unwrap().content;
    assert_eq!(answer.len(), 64);
    assert_eq!(answer[4..8], 38_u32.to_le_bytes());
    // What the former session knew is forgotten.
    assert_eq!(guest.server.node_count(), 1);
    assert_eq!(refused(guest.ask(op::INIT, 0, &init(7, 12))), Errno::PROTO);
    let answer = guest.ask(op::INIT, 0, &init(8, 0)).unwrap().content;
    assert_eq!(answer[..4], 7_u32.to_le_bytes());
}
