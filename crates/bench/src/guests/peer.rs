//! A machine of a VMM that is asked by HTTP on a Unix socket and, as ours, has the guest's vsock
//! behind another one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent_proto::client::{Connection, Deadline};
use anyhow::{Context as _, Result};

use super::{Ended, GREETING_LIMIT, Guest};

/// The sockets of one machine.
pub(super) struct Sockets {
    pub(super) api: PathBuf,
    pub(super) vsock: PathBuf,
}

impl Sockets {
    /// Paths with nothing there: VMMs make their sockets, and not where one was left.
    pub(super) fn fresh(folder: &Path, name: &str) -> Self {
        let fresh = |kind: &str| {
            let path = folder.join(format!("{name}.{kind}"));
            let _ = fs::remove_file(&path);
            path
        };
        Self {
            api: fresh("api"),
            vsock: fresh("vsock"),
        }
    }
}

/// A running machine of such a VMM.
pub(crate) struct PeerVm {
    process: Ended,
    vsock: PathBuf,
}

impl PeerVm {
    /// Starts a VMM whose guest is, or will be, behind `vsock`; nobody sees its console.
    pub(super) fn spawn(mut command: Command, vsock: &Path) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let program = command.get_program().to_owned();
        let process = command
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self {
            process: Ended(process),
            vsock: vsock.to_owned(),
        })
    }
}

impl Guest for PeerVm {
    fn connect(&self) -> Result<Connection> {
        Ok(Connection::open(
            &self.vsock,
            Deadline::after(GREETING_LIMIT),
        )?)
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }
}
