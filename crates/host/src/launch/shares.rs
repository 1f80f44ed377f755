//! Starts the servers of a VM's shared directories.
//!
//! Each is a process of its own ([`programs::share_server`](crate::programs::share_server)), which
//! ends when the VM's process closes its connection, or when this process drops it before that.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::time::Duration;

use clone_api::config::ShareConfig;
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_fuse::link::{self, HEADER, MAX_MESSAGE, Report, VERSION, Wait, Welcome};
use clone_start::error::{Result, failed};
use clone_start::{VmDir, cgroup};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::{open_log, program, reaper};

/// The time limit for a server to say that it is ready.
const LIMIT: Duration = Duration::from_secs(30);

/// The started servers of a VM.
#[derive(Debug, Default)]
pub(super) struct Shares {
    /// The connections to them, in the order of the description.
    pub(super) sockets: Vec<OwnedFd>,
    /// Notices for the owner: what their jails lack.
    pub(super) notices: Vec<String>,
}

/// Starts a server for each share of `config`, whose VM has the runtime directory `dir`.
///
/// # Errors
/// A directory that cannot be shared; those that were started end then.
pub(super) fn start(dir: &VmDir, config: &VmConfig) -> Result<Shares> {
    let mut shares = Shares::default();
    for (index, share) in config.shares.iter().enumerate() {
        let (socket, missing) = start_one(dir, index, share)?;
        shares.sockets.push(socket);
        let notice = |reason| format!("the jail of the share `{}` lacks {reason}", share.tag);
        shares.notices.extend(missing.into_iter().map(notice));
    }
    Ok(shares)
}

fn start_one(dir: &VmDir, index: usize, share: &ShareConfig) -> Result<(OwnedFd, Vec<String>)> {
    let welcome = welcome(dir, index, share)?;
    let internal = |error: std::io::Error| ApiError::internal(&error);
    let (ours, theirs) = link::pair().map_err(internal)?;
    let log = open_log(dir)?;
    let mut command = program::share_server()?;
    let mut child = command
        .current_dir("/")
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(failed("start", std::path::Path::new("clone-share")))?;
    // The command holds the other end, too; without that, its end is seen here.
    drop(command);
    let answered = agree(&ours, &welcome);
    if answered.is_err() {
        // It may hang.
        let _ = child.kill();
    }
    // The server ends with its connection; nobody waits for it here.
    reaper::adopt(child);
    answered.map(|missing| (ours, missing))
}

fn welcome(dir: &VmDir, index: usize, share: &ShareConfig) -> Result<Welcome> {
    let refuse = |reason: &str| {
        let path = share.path.display();
        let message = format!("the share `{}`: {path} {reason}", share.tag);
        ApiError::new(ErrorCode::InvalidConfig, message)
    };
    let meta = fs::metadata(&share.path).map_err(failed("share", &share.path))?;
    if !meta.is_dir() {
        return Err(refuse("is not a directory"));
    }
    let text = |path: &std::path::Path| path.to_str().map(str::to_owned);
    let owner = share.owner.unwrap_or_default();
    Ok(Welcome {
        version: VERSION,
        directory: text(&share.path).ok_or_else(|| refuse("is not UTF-8"))?,
        identity: (meta.dev(), meta.ino()),
        read_only: share.read_only,
        guest_owner: (owner.user, owner.group),
        spot: text(dir.path()).ok_or_else(|| refuse("cannot be mounted"))?,
        cgroup: cgroup::make_for_share(dir.path(), index)
            .ok()
            .as_deref()
            .and_then(text),
    })
}

/// Tells the server what to serve. Returns what its jail lacks.
fn agree(socket: &OwnedFd, welcome: &Welcome) -> Result<Vec<String>> {
    let died = |error: rustix::io::Errno| {
        let message = format!("the server of {} has failed: {error}", welcome.directory);
        ApiError::new(ErrorCode::Internal, message)
    };
    let text = serde_json::to_vec(welcome).map_err(|error| ApiError::internal(&error))?;
    let set_limit = |limit| set_socket_timeout(socket, Timeout::Recv, limit).map_err(died);
    set_limit(Some(LIMIT))?;
    link::send(socket, &[0; HEADER], &text, None, Wait::Yes).map_err(died)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    let (len, _) = link::receive(socket, &mut buffer, Wait::Yes).map_err(died)?;
    set_limit(None)?;
    let text = buffer[..len].get(HEADER..).unwrap_or_default();
    if text.is_empty() {
        return Err(died(rustix::io::Errno::CONNRESET));
    }
    match serde_json::from_slice(text).map_err(|error| ApiError::internal(&error))? {
        Report::Ready { missing } => Ok(missing),
        Report::Failed { reason } => Err(ApiError::new(ErrorCode::InvalidConfig, reason)),
    }
}
