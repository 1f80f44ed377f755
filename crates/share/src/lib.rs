//! The server of one share: a directory of the host that a guest mounts by virtio-fs.
//!
//! Each share has a process of its own, the program `clone-share`. Its launcher connects it to the
//! VM's process by one socket ([`clone_fuse::link`]) and tells it the directory. The server makes
//! that directory its root, gives up everything else ([`jail`]) and answers the guest's FUSE
//! requests ([`server`]) until the socket closes. It has no memory of the guest: contents of regular
//! files are read and written by the VM's process, with descriptors that the server opened.
//!
//! What the server knows of the guest is in two tables of bounded size: nodes ([`nodes`]), which are
//! files and directories that the guest knows, and handles ([`handles`]), which are those that it has
//! open. Every step into the tree is one name below an open directory; names are never joined.
//! [`tables`] is their saved form, with which the server of a fork or of a resumed VM goes on.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod attributes;
mod handles;
mod jail;
mod nodes;
mod owner;
mod server;
mod steps;
mod tables;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use clone_fuse::link::{self, MAX_MESSAGE, Report, VERSION, Wait, Welcome};

use jail::JailSpec;
pub use owner::Owner;
pub use server::{Answer, Server, Settings};

/// The exit code if the share could not be served. The launcher has received the reason.
const EXIT_FAILED: u8 = 1;

/// Serves the share that the launcher describes on standard input, until the VM's process ends.
pub fn main() -> ExitCode {
    if close_inherited().is_err() {
        return ExitCode::from(EXIT_FAILED);
    }
    let _ = rustix::thread::set_name(c"clone-share");
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    let (report, server) = match start(socket) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some((missing, server))) => (Report::Ready { missing }, Some(server)),
        Err(reason) => (Report::Failed { reason }, None),
    };
    let Ok(text) = serde_json::to_vec(&report) else {
        return ExitCode::from(EXIT_FAILED);
    };
    let sent = link::send(socket, &[0; link::HEADER], &text, None, Wait::Yes);
    match (sent, server) {
        (Ok(()), Some(mut server)) => {
            // The other side's end is the only end of a share's life.
            let _ = server.serve(socket);
            ExitCode::SUCCESS
        }
        _ => ExitCode::from(EXIT_FAILED),
    }
}

/// Receives the launcher's words and enters the jail; `None` if the launcher has gone.
fn start(socket: impl AsFd) -> Result<Option<(Vec<String>, Server)>, String> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (len, _) = link::receive(socket, &mut buffer, Wait::Yes)
        .map_err(|error| format!("it cannot receive its task: {error}"))?;
    if len == 0 {
        return Ok(None);
    }
    let text = buffer[..len].get(link::HEADER..).unwrap_or_default();
    let welcome: Welcome = serde_json::from_slice(text)
        .map_err(|error| format!("it cannot read its task: {error}"))?;
    if welcome.version != VERSION {
        return Err("the program clone-share is of another version than its launcher".to_owned());
    }
    let directory = Path::new(&welcome.directory);
    let failed = |error: io::Error| format!("cannot share {}: {error}", directory.display());
    let meta = fs::metadata(directory).map_err(failed)?;
    if (meta.dev(), meta.ino()) != welcome.identity || !meta.is_dir() {
        return Err(failed(io::Error::other("it was replaced meanwhile")));
    }
    let (missing, root) = jail::enter(&JailSpec {
        directory,
        identity: welcome.identity,
        owner: (meta.uid(), meta.gid()),
        read_only: welcome.read_only,
        spot: Path::new(&welcome.spot),
        cgroup: welcome.cgroup.as_deref().map(Path::new),
    })
    .map_err(|error| format!("cannot share {}: {error}", directory.display()))?;
    let settings = Settings {
        owner: Owner::of_this_process(welcome.guest_owner),
    };
    let server = Server::new(root, settings)
        .map_err(|error| format!("cannot share {}: {error}", directory.display()))?;
    Ok(Some((missing, server)))
}

/// Closes every descriptor but the three standard ones.
fn close_inherited() -> io::Result<()> {
    // SAFETY: the process has just begun, has one thread, and has opened nothing: no owner of one
    // of these descriptors exists that could use it afterwards.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
