//! The arguments and exit codes of the program `clone-vm`.

use std::ffi::OsStr;
use std::path::Path;

/// The exit code after the guest switched itself off, or after a requested stop.
pub const EXIT_POWER_OFF: u8 = 0;
/// The exit code of a failed start; the report gives the reason.
pub const EXIT_START_FAILED: u8 = 1;
/// The exit code after the guest crashed; the log gives the reason.
pub const EXIT_CRASH: u8 = 2;
/// The exit code after the guest requested a reset and may not or cannot boot again; the log gives
/// the reason.
pub const EXIT_REBOOT: u8 = 3;
/// The exit code after `kill` was requested by the control socket.
pub const EXIT_KILLED: u8 = 4;
/// The exit code after the event loop failed.
pub const EXIT_INTERNAL: u8 = 5;

/// The first argument that makes the program a VM's process. The build and the VM's runtime
/// directory follow.
pub const WORD: &str = "vm-process";
/// The first argument that makes the program only build a jail.
pub const CHECK_WORD: &str = "jail-check";
/// The identity of the sources of this build. A launcher works only with VM processes of the same
/// build.
pub const BUILD: &str = env!("CLONE_BUILD");

/// The arguments that make the program the process of the VM in `dir`.
pub fn words(dir: &Path) -> [&OsStr; 3] {
    [WORD.as_ref(), BUILD.as_ref(), dir.as_ref()]
}

/// The arguments that make the program build a jail around itself at `dir`, report, and end.
pub fn check_words(dir: &Path) -> [&OsStr; 3] {
    [CHECK_WORD.as_ref(), BUILD.as_ref(), dir.as_ref()]
}
