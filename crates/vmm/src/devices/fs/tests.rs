//! The device between a driver of plain memory and the real server, or one that misbehaves.

use std::fs;
use std::os::fd::OwnedFd;
use std::thread;

use clone_fuse::link;
use clone_fuse::wire::{IN_HEADER, Output, ROOT_ID, op};
use clone_share::{Owner, Server, Settings};
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::driver::Rig;
use crate::virtio::testing::ram;

const REQUEST: u64 = 0x10000;
const ANSWER: u64 = 0x20000;

struct Guest {
    rig: Rig<Fs>,
    dir: TempDir,
}

fn device(dir: &TempDir) -> Fs {
    let (ours, theirs) = link::pair().unwrap();
    serve(dir, theirs);
    Fs::new("src", ours).unwrap()
}

/// Serves the directory by a thread, which ends with the connection.
fn serve(dir: &TempDir, socket: OwnedFd) {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let root = rustix::fs::open(dir.path(), flags, rustix::fs::Mode::empty()).unwrap();
    thread::spawn(move || {
        let owner = Owner::of_this_process((0, 0));
        let mut server = Server::new(root, Settings { owner }).unwrap();
        let _ = server.serve(&socket);
    });
}

fn rig(device: Fs) -> Rig<Fs> {
    Rig::new(device, ram(1 << 20), 16, 0)
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "0123456789").unwrap();
        let rig = rig(device(&dir));
        Self { rig, dir }
    }

    fn offer(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) {
        let mut message = Output::new();
        message
            .u32((IN_HEADER + body.len()) as u32)
            .u32(opcode)
            .u64(7)
            .u64(node)
            .zeros(16)
            .bytes(body);
        let bytes = message.into_bytes();
        self.rig
            .ram
            .write_slice(&bytes, GuestAddress(REQUEST))
            .unwrap();
        let request = (REQUEST, bytes.len() as u32, false);
        self.rig.queues[1].offer(&[request, (ANSWER, room, true)]);
        self.rig.kick(1);
    }

    /// The answer: the error, and the body.
    fn answer(&mut self) -> (i32, Vec<u8>) {
        for _ in 0..100 {
            assert_eq!(self.rig.error(), None);
            if let Some((_, len)) = self.rig.queues[1].take_used() {
                let mut bytes = vec![0; len as usize];
                let at = GuestAddress(ANSWER);
                self.rig.ram.read_slice(&mut bytes, at).unwrap();
                assert_eq!(bytes[..4], len.to_le_bytes());
                assert_eq!(bytes[8..16], 7_u64.to_le_bytes());
                let error = i32::from_le_bytes(bytes[4..8].try_into().unwrap());
                return (error, bytes[16..].to_vec());
            }
            self.rig.wait();
        }
        panic!("no answer");
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        self.offer(opcode, node, body, 0x8000);
        self.answer()
    }

    fn lookup(&mut self, name: &str) -> u64 {
        let (error, body) = self.ask(op::LOOKUP, ROOT_ID, format!("{name}\0").as_bytes());
        assert_eq!(error, 0);
        u64::from_le_bytes(body[..8].try_into().unwrap())
    }

    fn open(&mut self, node: u64, flags: i32) -> u64 {
        let flags = u64::from(flags as u32).to_le_bytes();
        let (error, body) = self.ask(op::OPEN, node, &flags);
        assert_eq!(error, 0);
        u64::from_le_bytes(body[..8].try_into().unwrap())
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> (i32, Vec<u8>) {
        self.ask(op::READ, 0, &transfer(handle, offset, size, 0))
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8], flags: i32) -> (i32, Vec<u8>) {
        let mut body = transfer(handle, offset, data.len() as u32, flags);
        body.extend_from_slice(data);
        self.ask(op::WRITE, 0, &body)
    }

    fn content(&self) -> String {
        fs::read_to_string(self.dir.path().join("a")).unwrap()
    }
}

fn transfer(handle: u64, offset: u64, size: u32, flags: i32) -> Vec<u8> {
    let mut out = Output::new();
    out.u64(handle).u64(offset).u32(size).u32(0).u64(0);
    out.u32(flags as u32).u32(0);
    out.into_bytes()
}

#[test]
fn the_tag_is_in_the_configuration_space_with_one_request_queue() {
    let guest = Guest::new();
    let mut space = [0xFF; 44];
    guest
        .rig
        .device(|shell| shell.device.read_config(0, &mut space));
    assert_eq!(&space[..5], b"src\0\0");
    assert_eq!(space[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn files_are_read_and_written_between_the_file_and_ram() {
    let mut guest = Guest::new();
    let node = guest.lookup("a");
    let handle = guest.open(node, libc::O_RDWR);
    assert_eq!(guest.read(handle, 2, 3), (0, b"234".to_vec()));
    assert_eq!(guest.read(handle, 9, 100), (0, b"9".to_vec()));
    assert_eq!(guest.read(handle, 10, 100), (0, Vec::new()));
    assert_eq!(guest.write(handle, 1, b"xy", 0).1[..4], [2, 0, 0, 0]);
    guest.write(handle, 0, b"end", libc::O_APPEND);
    assert_eq!(guest.content(), "0xy3456789end");
    let seek = |whence: i32| {
        let mut body = Output::new();
        body.u64(handle).u64(0).u32(whence as u32).u32(0);
        body.into_bytes()
    };
    let hole = guest.ask(op::LSEEK, node, &seek(libc::SEEK_HOLE));
    assert_eq!(hole, (0, 13_u64.to_le_bytes().to_vec()));
    assert_eq!(
        guest.ask(op::LSEEK, node, &seek(libc::SEEK_SET)).0,
        -libc::EINVAL
    );
    let mut copy = Output::new();
    copy.u64(handle)
        .u64(0)
        .u64(node)
        .u64(handle)
        .u64(13)
        .u64(3)
        .u64(0);
    assert_eq!(
        guest.ask(op::COPY_FILE_RANGE, node, &copy.into_bytes()).0,
        0
    );
    assert_eq!(guest.content(), "0xy3456789end0xy");
    let mut sync = Output::new();
    sync.u64(handle).u32(1).u32(0);
    assert_eq!(
        guest.ask(op::FSYNC, node, &sync.into_bytes()),
        (0, Vec::new())
    );
    // The guest's own handles alone, and only what they were opened for.
    assert_eq!(guest.read(99, 0, 1).0, -libc::EBADF);
    let handle = guest.open(node, libc::O_RDONLY);
    assert_eq!(guest.write(handle, 0, b"x", 0).0, -libc::EBADF);
    assert_eq!(guest.read(handle, u64::MAX, 1).0, -libc::EINVAL);
    let (error, _) = guest.ask(
        op::RELEASE,
        node,
        &[&handle.to_le_bytes()[..], &[0; 16]].concat(),
    );
    assert_eq!(error, 0);
    assert_eq!(guest.read(handle, 0, 1).0, -libc::EBADF);
}

#[test]
fn a_restored_device_goes_on_with_its_handles() {
    let mut guest = Guest::new();
    let node = guest.lookup("a");
    let handle = guest.open(node, libc::O_RDONLY);
    guest.read(handle, 0, 4);
    let (state, queues) = guest.rig.save();
    let mut other = device(&guest.dir);
    other.check_state(&state).unwrap();
    other.restore(&state).unwrap();
    guest.rig = Rig::restored(other, &guest.rig, &queues);
    assert_eq!(guest.read(handle, 0, 4), (0, b"0123".to_vec()));
    // In a directory that is another one, the file is stale.
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("a"), "another").unwrap();
    let (state, queues) = guest.rig.save();
    let mut other = device(&elsewhere);
    other.restore(&state).unwrap();
    guest.rig = Rig::restored(other, &guest.rig, &queues);
    assert_eq!(guest.read(handle, 0, 4).0, -libc::ESTALE);
    // Another share's state is refused.
    let (ours, _theirs) = link::pair().unwrap();
    let other = Fs::new("other", ours).unwrap();
    assert!(other.check_state(&state).is_err());
}

#[test]
fn a_dead_server_gives_errors_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = link::pair().unwrap();
    let handle = Fs::new("src", ours).map(|device| (device.handle(), device));
    let (handle, device) = handle.unwrap();
    let mut guest = Guest {
        rig: rig(device),
        dir,
    };
    guest.offer(op::LOOKUP, ROOT_ID, b"a\0", 0x100);
    assert_eq!(handle.failure(), None);
    drop(theirs);
    assert_eq!(guest.answer().0, -libc::EIO);
    assert!(handle.failure().is_some());
    assert_eq!(guest.ask(op::GETATTR, ROOT_ID, &[0; 16]).0, -libc::EIO);
    assert_eq!(guest.read(0, 0, 1).0, -libc::EIO);
    let (state, _) = guest.rig.save();
    assert_eq!(FsState::decode(&state).unwrap().tables, None);
}

#[test]
fn a_server_that_hangs_holds_up_a_pause_for_a_while_only() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, _theirs) = link::pair().unwrap();
    let device = Fs::new("src", ours).unwrap();
    let mut guest = Guest {
        rig: rig(device),
        dir,
    };
    guest.offer(op::LOOKUP, ROOT_ID, b"a\0", 0x100);
    let start = Instant::now();
    guest.rig.pause();
    assert!(start.elapsed() < PAUSE_LIMIT + Duration::from_secs(2));
    guest.rig.resume();
    assert_eq!(guest.answer().0, -libc::EIO);
}

/// A server that answers the first request with these bytes and this file.
fn lying_server(reply: Vec<u8>, file: Option<OwnedFd>) -> i32 {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = link::pair().unwrap();
    let device = Fs::new("src", ours).unwrap();
    let mut guest = Guest {
        rig: rig(device),
        dir,
    };
    guest.offer(op::OPEN, ROOT_ID, &[0; 8], 0x100);
    // A socket that is closed with a message in it forgets what was sent.
    link::receive(&theirs, &mut vec![0; link::MAX_MESSAGE], link::Wait::Yes).unwrap();
    let (header, content) = reply.split_first_chunk().unwrap();
    let file = file.as_ref().map(std::os::fd::AsFd::as_fd);
    link::send(&theirs, header, content, file, link::Wait::Yes).unwrap();
    drop(theirs);
    guest.answer().0
}

#[test]
fn a_server_that_lies_is_given_up() {
    let reply = |tag: u64, error: u32, flags: u32| {
        let mut out = Output::new();
        out.u64(tag).u32(error).u32(flags).zeros(16);
        out.into_bytes()
    };
    assert_eq!(lying_server(reply(1, 0, 0), None), 0);
    for bad in [
        reply(1, 0, 1),
        reply(1, 0, 7),
        reply(1, 5000, 0),
        reply(9, 0, 0),
    ] {
        assert_eq!(lying_server(bad, None), -libc::EIO);
    }
    // A pipe could be waited for without an end.
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert_eq!(lying_server(reply(1, 0, 0), Some(pipe)), -libc::EIO);
    // More than the guest has room for.
    let mut long = reply(1, 0, 0);
    long.resize(0x4000, 1);
    assert_eq!(lying_server(long, None), -libc::EIO);
}

#[test]
fn requests_that_are_none_break_the_device_and_others_are_refused() {
    let mut guest = Guest::new();
    let short = (REQUEST, 39, false);
    guest.rig.queues[1].offer(&[short, (ANSWER, 64, true)]);
    guest.rig.kick(1);
    assert!(guest.rig.error().is_some());
    let mut guest = Guest::new();
    // A write that says more than it brings, and one that brings nothing of its fields.
    let body = transfer(0, 0, 5000, 0);
    assert_eq!(guest.ask(op::WRITE, 0, &body).0, -libc::EINVAL);
    assert_eq!(guest.ask(op::READ, 0, &[0; 8]).0, -libc::EINVAL);
    assert_eq!(
        guest.ask(op::SETXATTR, ROOT_ID, &vec![0; 0x8000]).0,
        -libc::EOPNOTSUPP
    );
    assert_eq!(guest.ask(op::FLUSH, ROOT_ID, &[]).0, -libc::ENOSYS);
    guest.offer(op::GETATTR, ROOT_ID, &[0; 16], 20);
    assert_eq!(guest.answer().0, -libc::EIO);
    guest.offer(op::GETATTR, ROOT_ID, &[0; 16], 8);
    assert!(guest.rig.error().is_some());
}

#[test]
fn a_reset_forgets_what_is_in_progress_and_the_device_serves_again() {
    let mut guest = Guest::new();
    let node = guest.lookup("a");
    guest.offer(op::LOOKUP, ROOT_ID, b"a\0", 0x100);
    guest.rig.device(|shell| shell.device.reset());
    guest.rig.activate_again();
    let again = guest.lookup("a");
    assert_ne!(again, node);
    let handle = guest.open(again, libc::O_RDONLY);
    assert_eq!(guest.read(handle, 0, 2), (0, b"01".to_vec()));
}
