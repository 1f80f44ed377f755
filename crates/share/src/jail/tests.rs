//! Attempts to break out of the jail, as somebody would make them who took the server over. Each is
//! made by a process of its own.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat};
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use tempfile::TempDir;

use super::*;
use crate::steps;

/// How an attempt went.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused(i32),
    Killed(i32),
}

/// The child's exit code for a jail that could not be built.
const NO_JAIL: i32 = 255;

#[derive(Clone, Copy, PartialEq)]
enum Filter {
    /// Every layer but the filter of system calls.
    Without,
    With,
}

/// A directory to share, with a file, beside one that is not shared.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["share/sub", "secret", "spot"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("share/sub/file"), "shared").unwrap();
        fs::write(dir.path().join("secret/file"), "secret").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(
        &self,
        (read_only, filter): (bool, Filter),
        attempt: impl FnOnce(OwnedFd) -> io::Result<()>,
    ) -> Pid {
        let (share, spot) = (self.path("share"), self.path("spot"));
        let meta = fs::metadata(&share).unwrap();
        let spec = JailSpec {
            directory: &share,
            identity: (meta.dev(), meta.ino()),
            owner: (meta.uid(), meta.gid()),
            read_only,
            spot: &spot,
            cgroup: None,
        };
        // SAFETY: the child uses nothing that other threads of the test may have locked, but for
        // the allocator, which the C library keeps usable in it.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let jailed = match filter {
                Filter::With => enter(&spec),
                Filter::Without => enter_without_filter(&spec),
            };
            let code = match jailed {
                Ok((_, root)) => {
                    attempt(root).map_or_else(|error| error.raw_os_error().unwrap_or(254), |()| 0)
                }
                Err(error) => {
                    eprintln!("{error}");
                    NO_JAIL
                }
            };
            // SAFETY: ends the child, without the test's own cleaning up.
            unsafe { libc::_exit(code) };
        }
        Pid::from_raw(pid).unwrap()
    }

    fn attempt(
        &self,
        how: (bool, Filter),
        attempt: impl FnOnce(OwnedFd) -> io::Result<()>,
    ) -> Outcome {
        outcome(self.start(how, attempt))
    }
}

fn outcome(pid: Pid) -> Outcome {
    let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    match (status.exit_status(), status.terminating_signal()) {
        (Some(0), _) => Outcome::Done,
        (Some(code), _) => {
            assert_ne!(code, NO_JAIL, "the jail could not be built");
            Outcome::Refused(code)
        }
        (_, Some(signal)) => Outcome::Killed(signal),
        _ => panic!("neither ended nor killed: {status:?}"),
    }
}

const OPEN: (bool, Filter) = (false, Filter::Without);

fn read(path: &str) -> io::Result<()> {
    openat(CWD, path, OFlags::RDONLY, Mode::empty())?;
    Ok(())
}

#[test]
fn the_directory_is_all_that_there_is() {
    let host = Host::new();
    let shared = host.attempt(OPEN, |_| read("/sub/file"));
    assert_eq!(shared, Outcome::Done);
    let secret = host.path("secret/file").display().to_string();
    for path in [
        "/etc/passwd",
        "/proc/self/exe",
        "/../etc/passwd",
        "/../secret/file",
        &secret,
    ] {
        let went = host.attempt(OPEN, |_| read(path));
        assert_eq!(went, Outcome::Refused(libc::ENOENT), "{path}");
    }
}

#[test]
fn a_read_only_share_cannot_be_written_even_without_the_filter() {
    let host = Host::new();
    let write = |path: &'static str| {
        host.attempt((true, Filter::Without), move |_| {
            openat(CWD, path, OFlags::WRONLY | OFlags::CREATE, Mode::RUSR)?;
            Ok(())
        })
    };
    for path in ["/sub/file", "/new"] {
        let went = write(path);
        let refused = [libc::EROFS, libc::EACCES].map(Outcome::Refused);
        assert!(refused.contains(&went), "{path}: {went:?}");
    }
    let remount = host.attempt((true, Filter::Without), |_| {
        Ok(rustix::mount::mount_remount(
            "/",
            rustix::mount::MountFlags::BIND,
            "",
        )?)
    });
    assert_eq!(remount, Outcome::Refused(libc::EPERM));
    let made = host.attempt(OPEN, |_| {
        openat(CWD, "/made", OFlags::WRONLY | OFlags::CREATE, Mode::RUSR)?;
        Ok(())
    });
    assert_eq!(made, Outcome::Done);
    assert!(host.path("share/made").exists());
}

/// Has a jailed process look at `sub`, moves that out of the share, and lets the process go on.
fn moved_out<T: 'static>(
    look: impl FnOnce(OwnedFd) -> io::Result<T>,
    go_on: impl FnOnce(T) -> io::Result<()>,
) -> Outcome {
    let host = Host::new();
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let pid = host.start(OPEN, move |root| {
        let seen = look(root)?;
        theirs.write_all(b"!")?;
        theirs.read_exact(&mut [0])?;
        go_on(seen)
    });
    ours.read_exact(&mut [0]).unwrap();
    fs::rename(host.path("share/sub"), host.path("secret/sub")).unwrap();
    ours.write_all(b"!").unwrap();
    outcome(pid)
}

#[test]
fn a_directory_that_is_moved_out_leads_nowhere() {
    for path in ["..", "../file", "../../secret/file"] {
        let went = moved_out(
            |root| Ok(steps::find(&root, b"sub")?),
            |held| {
                openat(&held, path, OFlags::RDONLY, Mode::empty())?;
                Ok(())
            },
        );
        assert!(matches!(went, Outcome::Refused(_)), "{path}: {went:?}");
    }
    // Its own content is not shared any more, either.
    let root_id = clone_fuse::wire::ROOT_ID;
    let went = moved_out(
        |root| {
            let mut nodes = crate::nodes::Nodes::new(std::rc::Rc::new(root))?;
            let object = steps::find(nodes.root(), b"sub")?;
            let found = steps::attributes_of(&object)?;
            let sub = nodes.tell(root_id, b"sub", object, &found)?;
            nodes.directory(sub)?;
            Ok((nodes, sub))
        },
        |(mut nodes, sub)| Ok(nodes.directory(sub).map(drop)?),
    );
    assert_eq!(went, Outcome::Refused(libc::ESTALE));
}

/// A system call with up to three arguments, as an attacker would make it.
fn call(number: libc::c_long, arguments: [usize; 3]) -> io::Result<()> {
    let [a, b, c] = arguments;
    // SAFETY: the calls of these tests read strings that live, or nothing, and write nothing.
    let result = unsafe { libc::syscall(number, a, b, c, 0, 0, 0) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[test]
fn calls_that_a_file_server_does_not_need_end_it() {
    let host = Host::new();
    let path = c"/sub/file".as_ptr() as usize;
    let (unix, stream) = (libc::AF_UNIX as usize, libc::SOCK_STREAM as usize);
    let exec = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    for (number, arguments) in [
        (libc::SYS_socket, [unix, stream, 0]),
        (libc::SYS_connect, [0, path, 0]),
        (libc::SYS_execve, [path, 0, 0]),
        (libc::SYS_mount, [path, path, 0]),
        (libc::SYS_setuid, [0, 0, 0]),
        (libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0]),
        (libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0]),
        (libc::SYS_kill, [1, 0, 0]),
        (libc::SYS_ptrace, [libc::PTRACE_TRACEME as usize, 0, 0]),
        (libc::SYS_open_by_handle_at, [0, 0, 0]),
        (libc::SYS_chroot, [path, 0, 0]),
        (libc::SYS_ioctl, [0, 0x5412, 0]),
        (libc::SYS_io_uring_setup, [1, 0, 0]),
        (libc::SYS_mmap, [0, 4096, exec]),
        (libc::SYS_fchownat, [0, path, 0]),
    ] {
        let went = host.attempt((false, Filter::With), |_| call(number, arguments));
        assert_eq!(went, Outcome::Killed(libc::SIGSYS), "{number}");
    }
}

#[test]
fn without_the_filter_the_other_layers_refuse_as_well() {
    let host = Host::new();
    let path = CString::new("/sub").unwrap();
    let path = path.as_ptr() as usize;
    for (number, arguments) in [
        (libc::SYS_mount, [path, path, 0]),
        (libc::SYS_chroot, [path, 0, 0]),
        (libc::SYS_setuid, [12_345, 0, 0]),
        (libc::SYS_setns, [0, 0, 0]),
    ] {
        let went = host.attempt(OPEN, |_| call(number, arguments));
        assert!(matches!(went, Outcome::Refused(_)), "{number}: {went:?}");
    }
    let device = host.attempt(OPEN, |root| {
        let kind = rustix::fs::FileType::CharacterDevice;
        Ok(rustix::fs::mknodat(
            &root,
            "null",
            kind,
            Mode::RUSR,
            0x0103,
        )?)
    });
    assert!(matches!(device, Outcome::Refused(_)), "{device:?}");
    let other_owner = host.attempt(OPEN, |root| {
        let user = rustix::process::Uid::from_raw(12_345);
        Ok(rustix::fs::chownat(
            &root,
            "sub",
            Some(user),
            None,
            AtFlags::empty(),
        )?)
    });
    assert!(
        matches!(other_owner, Outcome::Refused(_)),
        "{other_owner:?}"
    );
}

#[test]
fn the_daily_work_of_a_server_goes_on() {
    let host = Host::new();
    let (ours, theirs) = clone_fuse::link::pair().unwrap();
    let pid = host.start((false, Filter::With), move |root| {
        let owner = crate::Owner::of_this_process((0, 0));
        crate::Server::new(root, crate::Settings { owner })?.serve(&theirs)
    });
    let ask = |request: clone_fuse::link::Request<'_>| {
        use clone_fuse::link::{MAX_MESSAGE, Reply, Wait, receive, send};
        send(&ours, &request.header(), request.content, None, Wait::Yes).unwrap();
        let mut buffer = vec![0; MAX_MESSAGE];
        let (len, file) = receive(&ours, &mut buffer, Wait::Yes).unwrap();
        let reply = Reply::decode(&buffer[..len]).expect("a reply");
        (reply.error, reply.content.to_vec(), file)
    };
    use clone_fuse::wire::{Output, op};
    let guest = |opcode: u32, node: u64, body: &[u8]| {
        let mut message = Output::new();
        message
            .u32(0)
            .u32(opcode)
            .u64(1)
            .u64(node)
            .zeros(16)
            .bytes(body);
        ask(clone_fuse::link::Request {
            tag: 1,
            kind: clone_fuse::link::Kind::Guest,
            content: &message.into_bytes(),
        })
    };
    let no_error = |(error, content, file): (Option<_>, Vec<u8>, Option<OwnedFd>)| {
        assert_eq!(error, None);
        (content, file)
    };
    let flags = (libc::O_RDWR as u32).to_le_bytes();
    let mode = 0o100_600_u32.to_le_bytes();
    let body = [&flags[..], &mode, &[0; 8], b"new\0"].concat();
    let (content, file) = no_error(guest(op::CREATE, 1, &body));
    rustix::io::write(file.expect("a descriptor"), b"content").unwrap();
    let node = u64::from_le_bytes(content[..8].try_into().unwrap());
    let handle = &content[128..136];
    let mut change = vec![0; 88];
    change[0] = 1 | 1 << 3 | 1 << 7;
    change[16] = 3;
    change[68..72].copy_from_slice(&0o640_u32.to_le_bytes());
    no_error(guest(op::SETATTR, node, &change));
    no_error(guest(op::RELEASE, node, handle));
    no_error(guest(op::SYMLINK, 1, b"link\0new\0"));
    no_error(guest(op::MKDIR, 1, &[&mode[..], &[0; 4], b"d\0"].concat()));
    no_error(guest(
        op::RENAME,
        1,
        &[&1_u64.to_le_bytes()[..], b"new\0newer\0"].concat(),
    ));
    no_error(guest(
        op::SETXATTR,
        node,
        &[&[1, 0, 0, 0, 0, 0, 0, 0][..], b"user.k\0v"].concat(),
    ));
    no_error(guest(op::LISTXATTR, node, &[0; 8]));
    no_error(guest(op::REMOVEXATTR, node, b"user.k\0"));
    no_error(guest(op::STATFS, 1, b""));
    no_error(guest(op::SYNCFS, 1, &[0; 8]));
    let (content, _) = no_error(guest(op::OPENDIR, 1, &[0; 8]));
    let listed = [&content[..8], &[0; 8], &[0, 16, 0, 0], &[0; 20]].concat();
    let (content, _) = no_error(guest(op::READDIRPLUS, 1, &listed));
    assert!(content.len() > 4 * 152);
    no_error(guest(
        op::LINK,
        1,
        &[&node.to_le_bytes()[..], b"hard\0"].concat(),
    ));
    no_error(guest(op::UNLINK, 1, b"hard\0"));
    no_error(guest(op::RMDIR, 1, b"d\0"));
    assert_eq!(fs::read_to_string(host.path("share/newer")).unwrap(), "con");
    // The server has a copy of this end, since it was forked from this process.
    rustix::net::shutdown(&ours, rustix::net::Shutdown::Both).unwrap();
    assert_eq!(outcome(pid), Outcome::Done);
}

#[test]
fn a_jailed_server_is_seen_without_privileges() {
    let host = Host::new();
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let pid = host.start((false, Filter::With), move |_| {
        rustix::io::write(theirs.as_fd(), b"!")?;
        // Until it is killed.
        let mut byte = [0; 1];
        while rustix::io::read(theirs.as_fd(), &mut byte)? > 0 {}
        let _ = theirs.flush();
        Ok(())
    });
    assert!(ours.as_raw_fd() > 2);
    ours.read_exact(&mut [0]).unwrap();
    let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert!(
            field(set).bytes().all(|digit| digit == b'0'),
            "{set} {}",
            field(set)
        );
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );
    if rustix::process::geteuid().is_root() {
        let mounts = fs::read_to_string(proc.join("mounts")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert!(
            mounts.contains("nosuid") && mounts.contains("nodev"),
            "{mounts}"
        );
        let links = fs::read_to_string(proc.join("net/dev")).unwrap();
        assert_eq!(links.lines().count(), 3, "{links}");
    }
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(outcome(pid), Outcome::Killed(libc::SIGKILL));
}
