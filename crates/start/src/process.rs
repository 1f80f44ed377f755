//! Identifies a process on this host so that it is not mistaken for a later one with the same id.

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use clone_api::{ApiError, ErrorCode};
use clone_base::wait;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{Result, failed};

/// A process id and the start time of that process, in clock ticks since the host booted. Ids are
/// reused, but not the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// The process id.
    pub pid: u32,
    /// The 22nd field of `/proc/PID/stat`.
    pub start_time: u64,
}

impl Process {
    /// The process that has this id now, if any.
    pub fn of(pid: u32) -> Option<Self> {
        let start_time = start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        Some(Self { pid, start_time })
    }

    /// Whether the process still runs. A process that has ended but was not waited for does not
    /// run. If the state cannot be determined, for example because this process has too many open
    /// files, the process counts as running; otherwise resources that it uses might be swept away.
    pub fn is_alive(self) -> bool {
        self.look().unwrap_or(true)
    }

    fn look(self) -> io::Result<bool> {
        match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => Ok(start_time(&stat) == Some(self.start_time) && !is_zombie(&stat)),
            Err(error) => match Errno::from_io_error(&error) {
                // ESRCH means that the process ended while its file was read.
                Some(Errno::NOENT | Errno::SRCH) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Opens a pidfd of this process; `None` if it has ended.
    pub fn open(self) -> Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // The id may have been reused before the pidfd was opened, but not after.
            Ok(handle) => match self.look() {
                Ok(alive) => Ok(alive.then_some(handle)),
                Err(error) => Err(self.failed("look at", error)),
            },
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(self.failed("open a handle of", error)),
        }
    }

    /// Sends a signal; it is no error if the process has ended.
    pub fn signal(self, signal: Signal) -> Result<()> {
        let Some(handle) = self.open()? else {
            return Ok(());
        };
        match pidfd_send_signal(&handle, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(self.failed("send a signal to", error)),
        }
    }

    /// Waits until the process has ended; false if it has not after `limit` (`None` waits forever).
    pub fn wait(self, limit: Option<Duration>) -> Result<bool> {
        match self.open()? {
            Some(handle) => {
                wait::readable(&handle, limit).map_err(|error| self.failed("wait for", error))
            }
            None => Ok(true),
        }
    }

    /// Reads a file of [`Process::write`]; `None` if it does not exist or is incomplete.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            // NotADirectory means that a file of another program has the directory's path.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", path)(error)),
        };
        Ok(parse_pid_file(&text))
    }

    /// Writes the process to `path` atomically.
    pub fn write(self, path: &Path) -> Result<()> {
        // The file is renamed when it is complete, so readers never see a part of it.
        let text = format!("{} {}\n", self.pid, self.start_time);
        clone_base::file::replace_volatile(path, 0o644, text.as_bytes())
            .map_err(failed("write", path))
    }

    fn failed(self, action: &str, error: impl Display) -> ApiError {
        ApiError::new(
            ErrorCode::Internal,
            format!("cannot {action} process {}: {error}", self.pid),
        )
    }
}

fn parse_pid_file(text: &str) -> Option<Process> {
    let (pid, start_time) = text.strip_suffix('\n')?.split_once(' ')?;
    Some(Process {
        pid: pid.parse().ok()?,
        start_time: start_time.parse().ok()?,
    })
}

/// The fields after the command's name, which may contain spaces and parentheses.
fn fields(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    Some(stat[stat.rfind(')')? + 1..].split_whitespace())
}

fn start_time(stat: &str) -> Option<u64> {
    // proc_pid_stat(5): the state is field 3, the start time field 22.
    fields(stat)?.nth(22 - 3)?.parse().ok()
}

fn is_zombie(stat: &str) -> bool {
    matches!(fields(stat).and_then(|mut f| f.next()), Some("Z" | "X"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(start_time(stat), Some(4711));
        assert!(!is_zombie(stat));
        assert!(is_zombie("7 (x) Z 1"));
    }

    #[test]
    fn a_pid_file_that_was_cut_names_nobody() {
        assert!(parse_pid_file("12 345\n").is_some());
        for text in ["", "12", "12 34", "12 \n", "a b\n", "-1 5\n"] {
            assert_eq!(parse_pid_file(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_process_with_the_same_id_and_another_start_is_not_the_same() {
        let me = Process::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        assert!(me.open().unwrap().is_some());
        let reused = Process {
            start_time: me.start_time - 1,
            ..me
        };
        assert!(!reused.is_alive());
        assert!(reused.open().unwrap().is_none());
        // Would end this test if it took the id alone for the process.
        reused.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn waiting_ends_with_the_process_or_the_limit() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(!process.wait(Some(Duration::from_millis(5))).unwrap());
        process.signal(Signal::KILL).unwrap();
        assert!(process.wait(None).unwrap());
        // Not waited for yet by its parent, and gone all the same.
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
