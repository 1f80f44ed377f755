//! Test support: records every path that code opens, every name that it makes, and every socket.
//!
//! The code runs on a thread under a seccomp filter (seccomp(2), `SECCOMP_RET_USER_NOTIF`) that
//! stops it at each call that takes a path or makes a socket. The recorder records the call and
//! lets it continue. Unlike with a mock, no access can be missed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;

/// An access to the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// A path was opened for reading.
    Read(PathBuf),
    /// A path was opened for writing, made, renamed, linked or removed.
    Write(PathBuf),
    /// A socket of this address family was made.
    Socket(u64),
    /// A call that the recorder does not know.
    Unknown(i64),
}

/// The accesses that are allowed.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Directories in which everything may be read.
    pub read: Vec<PathBuf>,
    /// Directories in which everything may be written, too.
    pub write: Vec<PathBuf>,
}

/// The files that every process may read about itself.
const OWN: [&str; 3] = [
    "/proc/self/",
    "/proc/thread-self/",
    "/sys/devices/system/cpu/",
];
/// The directory for layers that end with their VM; files there have no names.
const NAMELESS: &str = "/var/tmp";

impl Bounds {
    /// The accesses outside of these bounds.
    pub fn broken_by<'a>(&self, accesses: &'a BTreeSet<Access>) -> Vec<&'a Access> {
        let outside = |access: &&Access| !self.allow(access);
        accesses.iter().filter(outside).collect()
    }

    fn allow(&self, access: &Access) -> bool {
        let within = |path: &Path, dirs: &[PathBuf]| {
            let plain = |part| matches!(part, Component::Normal(_) | Component::RootDir);
            path.components().all(plain) && dirs.iter().any(|dir| path.starts_with(dir))
        };
        let own = |path: &Path| {
            OWN.iter().any(|own| {
                path.as_os_str()
                    .as_encoded_bytes()
                    .starts_with(own.as_bytes())
            })
        };
        match access {
            Access::Read(path) => {
                within(path, &self.read) || within(path, &self.write) || own(path)
            }
            Access::Write(path) => within(path, &self.write) || path == Path::new(NAMELESS),
            Access::Socket(family) => *family == libc::AF_UNIX as u64,
            Access::Unknown(_) => false,
        }
    }
}

/// Runs `work` on a separate thread, and returns its result and all accesses.
///
/// # Errors
/// The kernel has no seccomp notifications.
pub fn record<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<(T, BTreeSet<Access>)> {
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let listener = install();
            let installed = listener.is_ok();
            // The other side waits for it, and hangs up only after this thread has ended.
            let _ = send.send(listener);
            installed.then(work)
        });
        let listener = receive.recv().map_err(io::Error::other)??;
        let touched = listen(&listener)?;
        match worker.join() {
            Ok(Some(value)) => Ok((value, touched)),
            Ok(None) => Err(io::Error::other("there is no filter")),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The calls that are recorded.
const CALLS: [libc::c_long; 26] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_truncate,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_mount,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
];

/// Installs the filter on this thread; returns the descriptor that receives the notifications.
fn install() -> io::Result<OwnedFd> {
    // A filter is a program of classic BPF over the call's number, the first field of its data.
    let step = |code: u32, jt: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf: 0,
        k,
    };
    let mut program = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for (index, call) in CALLS.iter().enumerate() {
        let to_the_end = (CALLS.len() - index) as u8;
        let compare = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(step(compare, to_the_end, *call as u32));
    }
    let answer = libc::BPF_RET | libc::BPF_K;
    program.push(step(answer, 0, libc::SECCOMP_RET_ALLOW));
    program.push(step(answer, 0, libc::SECCOMP_RET_USER_NOTIF));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the call takes numbers alone.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the program outlives the call, which copies it; its length is that of the vector.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    match listener {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
    }
}

const NOTIF_RECV: u64 = 0xc050_2100;
const NOTIF_SEND: u64 = 0xc018_2101;

/// Receives the notifications of all calls until the last thread with the filter has ended.
fn listen(listener: &OwnedFd) -> io::Result<BTreeSet<Access>> {
    let mut touched = BTreeSet::new();
    loop {
        let mut poll = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the pointer is to one `pollfd`, and the call is given the length one.
        if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
            continue;
        }
        if poll.revents & libc::POLLIN == 0 {
            return Ok(touched);
        }
        // SAFETY: all zero is a valid notification, and what the kernel wants to be given.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the request writes a notification, and the pointer is to one.
        if unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &raw mut call) } != 0 {
            continue;
        }
        note(&call.data, &mut touched);
        let mut answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        // SAFETY: the request reads an answer, and the pointer is to one. A call that was
        // interrupted meanwhile comes again.
        unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &raw mut answer) };
    }
}

fn note(call: &libc::seccomp_data, touched: &mut BTreeSet<Access>) {
    let args = call.args;
    let here = libc::AT_FDCWD as u64;
    let mut write = |dir: u64, path: u64| touched.insert(Access::Write(resolve(dir, path)));
    match libc::c_long::from(call.nr) {
        libc::SYS_open => drop(touched.insert(opened(here, args[0], args[1]))),
        libc::SYS_openat => drop(touched.insert(opened(args[0], args[1], args[2]))),
        libc::SYS_openat2 => {
            // The flags are the first field of `open_how`.
            let flags = read_own(args[2], size_of::<u64>());
            let flags = flags.first_chunk().copied().map_or(0, u64::from_le_bytes);
            touched.insert(opened(args[0], args[1], flags));
        }
        libc::SYS_creat
        | libc::SYS_mkdir
        | libc::SYS_mknod
        | libc::SYS_unlink
        | libc::SYS_truncate
        | libc::SYS_chmod
        | libc::SYS_chown => drop(write(here, args[0])),
        libc::SYS_mkdirat
        | libc::SYS_mknodat
        | libc::SYS_unlinkat
        | libc::SYS_fchmodat
        | libc::SYS_fchownat => drop(write(args[0], args[1])),
        libc::SYS_link | libc::SYS_rename => {
            write(here, args[0]);
            write(here, args[1]);
        }
        libc::SYS_linkat | libc::SYS_renameat | libc::SYS_renameat2 => {
            write(args[0], args[1]);
            write(args[2], args[3]);
        }
        libc::SYS_symlink => drop(write(here, args[1])),
        libc::SYS_symlinkat => drop(write(args[1], args[2])),
        libc::SYS_socket => drop(touched.insert(Access::Socket(args[0]))),
        // After the family of an address comes, for a Unix socket, the path.
        libc::SYS_bind | libc::SYS_connect => drop(write(here, args[1] + 2)),
        other => drop(touched.insert(Access::Unknown(other))),
    }
}

fn opened(dir: u64, path: u64, flags: u64) -> Access {
    let flags = flags as i32;
    let path = resolve(dir, path);
    match flags & (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) {
        0 => Access::Read(path),
        _ => Access::Write(path),
    }
}

/// The path at this address, below the directory `dir` where it is relative.
fn resolve(dir: u64, path: u64) -> PathBuf {
    let mut bytes = read_own(path, libc::PATH_MAX as usize);
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    let path = PathBuf::from(OsString::from_vec(bytes));
    let base = match dir as i32 {
        libc::AT_FDCWD => std::env::current_dir(),
        fd => std::fs::read_link(format!("/proc/self/fd/{fd}")),
    };
    base.map_or(path.clone(), |base| base.join(path))
}

/// Reads up to `len` bytes at an address of this process, as far as the memory is mapped. The
/// thread that owns the memory waits in a call.
fn read_own(address: u64, len: usize) -> Vec<u8> {
    let own = std::process::id() as libc::pid_t;
    let mut bytes = vec![0; len];
    let mut read = 0;
    // Page by page: the string may end just before memory that is not there.
    while read < len {
        let at = address as usize + read;
        let step = (4096 - at % 4096).min(len - read);
        let local = libc::iovec {
            iov_base: bytes[read..].as_mut_ptr().cast(),
            iov_len: step,
        };
        let remote = libc::iovec {
            iov_base: at as *mut libc::c_void,
            iov_len: step,
        };
        // SAFETY: `local` lies within the vector. The other is only read, and by the kernel, which
        // answers with an error where there is no memory.
        let count =
            unsafe { libc::process_vm_readv(own, &raw const local, 1, &raw const remote, 1, 0) };
        if count <= 0 || bytes[read..read + step].contains(&0) {
            read += count.max(0) as usize;
            break;
        }
        read += count as usize;
    }
    bytes.truncate(read);
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn what_code_touches_is_recorded_whichever_call_it_makes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("read"), "x").unwrap();
        let folder = fs::File::open(dir.path()).unwrap();
        let ((), touched) = record(|| {
            fs::read(at("read")).unwrap();
            fs::write(at("write"), "x").unwrap();
            fs::create_dir(at("dir")).unwrap();
            fs::rename(at("write"), at("renamed")).unwrap();
            fs::hard_link(at("renamed"), at("linked")).unwrap();
            let flags = rustix::fs::OFlags::RDONLY;
            let none = rustix::fs::ResolveFlags::empty();
            rustix::fs::openat2(&folder, "linked", flags, 0.into(), none).unwrap();
            let _listener = UnixListener::bind(at("socket")).unwrap();
            let _ = UnixStream::connect("/nowhere");
            std::thread::scope(|scope| {
                scope.spawn(|| fs::read("/etc/hostname").ok());
            });
            let _ = std::net::UdpSocket::bind("127.0.0.1:0");
        })
        .unwrap();
        let written =
            ["write", "dir", "renamed", "linked", "socket"].map(|it| Access::Write(at(it)));
        let read = ["read", "linked"].map(|it| Access::Read(at(it)));
        let others = [
            Access::Write("/nowhere".into()),
            Access::Read("/etc/hostname".into()),
            Access::Socket(libc::AF_INET as u64),
        ];
        for access in written.iter().chain(&read).chain(&others) {
            assert!(touched.contains(access), "{access:?}: {touched:?}");
        }
        let bounds = Bounds {
            read: Vec::new(),
            write: vec![dir.path().to_owned()],
        };
        let broken = bounds.broken_by(&touched);
        assert!(others.iter().all(|it| broken.contains(&it)), "{broken:?}");
        assert!(!broken.contains(&&written[0]) && !broken.contains(&&read[1]));
    }
}
