//! A person at a terminal: a window of a certain size, keys, and what is drawn.
#![allow(unreachable_pub)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// How long a screen may take to show what it should.
const LIMIT: Duration = Duration::from_secs(60);

/// A window in which a command runs.
pub struct Terminal {
    window: File,
    child: Child,
    /// What was drawn since the last key.
    drawn: String,
}

impl Terminal {
    /// Starts `command` in a window of that many rows and columns.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let window = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&window).unwrap();
        unlockpt(&window).unwrap();
        let name = ptsname(&window, Vec::new()).unwrap();
        let inner = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let inner = File::from(inner);
        tcsetwinsize(&window, size(rows, columns)).unwrap();
        command
            .env("TERM", "xterm")
            .stdin(inner.try_clone().unwrap())
            .stdout(inner.try_clone().unwrap())
            .stderr(inner);
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; both are bare
        // system calls.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                // SAFETY: standard input is open until exec, and is not used for anything else.
                let stdin = rustix::stdio::stdin();
                rustix::process::ioctl_tiocsctty(stdin)?;
                Ok(())
            });
        }
        Self {
            child: command.spawn().unwrap(),
            window: window.into(),
            drawn: String::new(),
        }
    }

    /// Drags the window to another size.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.drawn.clear();
        tcsetwinsize(&self.window, size(rows, columns)).unwrap();
    }

    /// Types, and forgets what was drawn before.
    pub fn keys(&mut self, keys: &str) {
        self.drawn.clear();
        self.window.write_all(keys.as_bytes()).unwrap();
    }

    /// Looks until `text` was drawn.
    pub fn see(&mut self, text: &str) {
        let end = Instant::now() + LIMIT;
        while !self.drawn.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {text:?} in {:?}", self.drawn);
            let mut fds = [PollFd::new(&self.window, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec::try_from(left).unwrap())).unwrap();
            if fds[0].revents().is_empty() {
                continue;
            }
            let mut chunk = [0; 4096];
            // A window whose command has ended gives an error.
            let len = self.window.read(&mut chunk).unwrap_or(0);
            assert!(len > 0, "it ended without {text:?}: {:?}", self.drawn);
            self.drawn.push_str(&String::from_utf8_lossy(&chunk[..len]));
        }
    }

    /// Waits for the command's end.
    pub fn end(mut self) -> ExitStatus {
        // Its last words must be taken, or it cannot end.
        let mut rest = Vec::new();
        let _ = self.window.read_to_end(&mut rest);
        self.child.wait().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
