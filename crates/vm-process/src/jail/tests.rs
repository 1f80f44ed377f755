//! Attempts to break out of the jail that VMs get. Each is made by a separate process.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::process::{Pid, Signal, WaitOptions, waitpid};

use super::*;

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
    /// Every layer but the filter.
    Without,
    With,
}

fn jail(dir: &Path, filter: Filter) -> io::Result<()> {
    let spec = JailSpec {
        runtime_dir: dir.to_owned(),
        guest_memory_bytes: 64 << 20,
        vcpus: 1,
    };
    enter(&spec).map_err(io::Error::other)?;
    match filter {
        Filter::With => confine_event_loop(),
        Filter::Without => Ok(()),
    }
}

/// Starts a jailed process that makes an attempt; its exit code is the error's number.
fn start(dir: &Path, filter: Filter, attempt: impl FnOnce() -> io::Result<()>) -> Pid {
    // SAFETY: the child uses nothing that other threads of the test may have locked, but for the
    // allocator, which the C library keeps usable in it.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = match jail(dir, filter) {
            Ok(()) => attempt().map_or_else(|error| error.raw_os_error().unwrap_or(254), |()| 0),
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

fn attempt(filter: Filter, attempt: impl FnOnce() -> io::Result<()>) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let outcome = outcome(start(dir.path(), filter, attempt));
    cgroup::remove(dir.path()).unwrap();
    outcome
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

const PASSWD: &std::ffi::CStr = c"/etc/passwd";

fn open_passwd() -> io::Result<()> {
    let path = PASSWD.as_ptr() as usize;
    call(libc::SYS_openat, [libc::AT_FDCWD as usize, path, 0])
}

/// What somebody tries who got hold of the process, with the calls that are fatal.
fn forbidden() -> Vec<(&'static str, libc::c_long, [usize; 3])> {
    let path = PASSWD.as_ptr() as usize;
    let stream = libc::SOCK_STREAM as usize;
    let exec = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    vec![
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_INET as usize, stream, 0],
        ),
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_UNIX as usize, stream, 0],
        ),
        ("connect", libc::SYS_connect, [0, path, 0]),
        ("execve", libc::SYS_execve, [path, 0, 0]),
        (
            "ptrace",
            libc::SYS_ptrace,
            [libc::PTRACE_TRACEME as usize, 0, 0],
        ),
        ("mount", libc::SYS_mount, [path, path, 0]),
        ("setuid", libc::SYS_setuid, [0, 0, 0]),
        ("capset", libc::SYS_capset, [0, 0, 0]),
        (
            "unshare",
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER as usize, 0, 0],
        ),
        ("fork", libc::SYS_fork, [0, 0, 0]),
        ("clone", libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0]),
        ("kill", libc::SYS_kill, [1, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [1, 1, 0]),
        ("unlink", libc::SYS_unlink, [path, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0, 0, 0]),
        ("mmap", libc::SYS_mmap, [0, 4096, exec]),
        ("mprotect", libc::SYS_mprotect, [0, 4096, exec]),
        // TUNSETIFF: another interface for the tap. KVM_CREATE_VM.
        ("ioctl", libc::SYS_ioctl, [0, 0x4004_54CA, 0]),
        ("ioctl", libc::SYS_ioctl, [0, 0xAE01, 0]),
    ]
}

#[test]
fn a_call_that_a_vm_does_not_need_ends_its_process() {
    for (name, number, arguments) in forbidden() {
        let went = attempt(Filter::With, || call(number, arguments));
        assert_eq!(went, Outcome::Killed(libc::SIGSYS), "{name} {arguments:x?}");
    }
}

#[test]
fn vcpus_may_not_even_do_what_the_event_loop_does() {
    let in_vcpu = |call: fn() -> io::Result<()>| {
        attempt(Filter::Without, move || {
            confine_vcpu()?;
            call()
        })
    };
    assert_eq!(in_vcpu(|| call(libc::SYS_getpid, [0; 3])), Outcome::Done);
    let accept = in_vcpu(|| call(libc::SYS_accept4, [0; 3]));
    assert_eq!(accept, Outcome::Killed(libc::SIGSYS));
    let ftruncate = in_vcpu(|| call(libc::SYS_ftruncate, [9, 0, 0]));
    assert_eq!(ftruncate, Outcome::Killed(libc::SIGSYS));
}

#[test]
fn opening_a_path_is_refused() {
    let refused = Outcome::Refused(libc::ENOSYS);
    assert_eq!(attempt(Filter::With, open_passwd), refused);
}

#[test]
fn without_the_filter_the_other_layers_refuse_as_well() {
    let path = PASSWD.as_ptr() as usize;
    let attempts: [(&str, libc::c_long, [usize; 3]); 5] = [
        ("open", libc::SYS_openat, [libc::AT_FDCWD as usize, path, 0]),
        ("mount", libc::SYS_mount, [path, path, 0]),
        ("execve", libc::SYS_execve, [path, 0, 0]),
        ("chroot", libc::SYS_chroot, [path, 0, 0]),
        ("setuid", libc::SYS_setuid, [0, 0, 0]),
    ];
    for (name, number, arguments) in attempts {
        let went = attempt(Filter::Without, || call(number, arguments));
        assert!(matches!(went, Outcome::Refused(_)), "{name}: {went:?}");
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let went = attempt(Filter::Without, || {
        std::net::TcpStream::connect(address).map(drop)
    });
    assert!(matches!(went, Outcome::Refused(_)), "connect: {went:?}");
}

#[test]
fn a_dropped_capability_cannot_be_raised_again() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let went = attempt(Filter::Without, || {
        let one = CapabilitySet::SYS_ADMIN;
        let sets = CapabilitySets {
            effective: one,
            permitted: one,
            inheritable: one,
        };
        Ok(set_capabilities(None, sets)?)
    });
    assert_eq!(went, Outcome::Refused(libc::EPERM));
}

#[test]
fn the_daily_work_of_a_vm_goes_on() {
    let mut file = tempfile::tempfile().unwrap();
    let went = attempt(Filter::With, || {
        file.write_all(b"disk")?;
        file.sync_data()?;
        let length = file.metadata()?.len();
        let worker = std::thread::Builder::new().name("disk".to_owned());
        let worker = worker.spawn(move || vec![length; 1 << 20].len())?;
        let done = worker.join().is_ok_and(|count| count == 1 << 20);
        // A worker inherits the filter, and panics of it do not take the process along.
        let panicked = std::thread::spawn(|| panic!("on purpose")).join().is_err();
        if done && panicked {
            Ok(())
        } else {
            Err(io::ErrorKind::Other.into())
        }
    });
    assert_eq!(went, Outcome::Done);
}

/// Makes a socket by way of a ring that was made before the filter, as disks' rings are.
fn socket_by_ring(make: impl FnOnce(u32) -> io::Result<io_uring::IoUring>) -> Outcome {
    attempt(Filter::Without, || {
        let mut ring = make(4)?;
        confine_event_loop()?;
        let socket = io_uring::opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        // SAFETY: the entry points to nothing.
        unsafe { ring.submission().push(&socket) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let result = ring
            .completion()
            .next()
            .map_or(-libc::EIO, |done| done.result());
        match result {
            0.. => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    })
}

#[test]
fn a_disks_ring_is_no_way_around_the_filter() {
    // The filter does not see what a ring does: any ring would be such a way.
    assert_eq!(socket_by_ring(io_uring::IoUring::new), Outcome::Done);
    assert_eq!(
        socket_by_ring(clone_disk::restricted_ring),
        Outcome::Refused(libc::EACCES)
    );
}

#[test]
fn a_jailed_process_is_seen_without_privileges_and_with_an_empty_root() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let pid = start(dir.path(), Filter::With, move || {
        theirs.write_all(b"!")?;
        // Until it is killed.
        theirs.read_exact(&mut [0])
    });
    ours.read_exact(&mut [0]).unwrap();
    let proc = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        let is_empty = field(set).bytes().all(|digit| digit == b'0');
        assert!(is_empty, "{set} {}", field(set));
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("Seccomp_filters:"), "2");
    if rustix::process::geteuid().is_root() {
        let uid: u32 = field("Uid:").split('\t').next().unwrap().parse().unwrap();
        assert!(uid > 2_000_000_000, "user {uid}");
        assert_eq!(field("Groups:"), "");
        assert_eq!(fs::read_dir(proc.join("root")).unwrap().count(), 0);
        let mounts = fs::read_to_string(proc.join("mounts")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        let links = fs::read_to_string(proc.join("net/dev")).unwrap();
        let links: Vec<_> = links.lines().skip(2).map(str::trim_start).collect();
        assert!(links.len() == 1 && links[0].starts_with("lo:"), "{links:?}");
    }
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(outcome(pid), Outcome::Killed(libc::SIGKILL));
    cgroup::remove(dir.path()).unwrap();
    assert!(!cgroup::leaf(dir.path()).exists());
}
