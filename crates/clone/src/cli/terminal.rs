//! The user's terminal in raw mode, and back.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal in raw mode, which is restored when this is dropped.
pub(super) struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Sets `terminal` to raw mode: every key is passed on, and none is echoed.
    pub(super) fn enter(terminal: impl AsFd) -> io::Result<Self> {
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If the terminal was closed, there is nothing to restore.
        let _ = tcsetattr(&self.terminal, OptionalActions::Flush, &self.before);
    }
}

/// The size of a terminal; `None` if it is not a terminal or has no size.
pub(super) fn size(terminal: impl AsFd) -> Option<Winsize> {
    tcgetwinsize(terminal)
        .ok()
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)
}
