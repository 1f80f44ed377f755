//! How a launcher starts the program of VMs' processes, and what its exit codes say.

use std::ffi::OsStr;
use std::path::Path;

/// How the process ends when the guest switched itself off, or was stopped by us.
pub const EXIT_POWER_OFF: u8 = 0;
/// How it ends when it could not start; the report says why.
pub const EXIT_START_FAILED: u8 = 1;
/// How it ends when the guest crashed; the log says how.
pub const EXIT_CRASH: u8 = 2;
/// How it ends when the guest asked for a reset, and is not to boot again or cannot; the log says.
pub const EXIT_REBOOT: u8 = 3;
/// How it ends when `kill` was asked of its control socket.
pub const EXIT_KILLED: u8 = 4;
/// How it ends when its own event loop failed.
pub const EXIT_INTERNAL: u8 = 5;

/// The first word of a command line that asks for a VM's process. The build and the VM's runtime
/// directory follow.
pub const WORD: &str = "vm-process";
/// The same for a process that only builds a jail.
pub const CHECK_WORD: &str = "jail-check";
/// Which sources this was built of: launchers speak with VM processes of the same only.
pub const BUILD: &str = env!("CLONE_BUILD");

/// The arguments that make the program the process of the VM in `dir`.
pub fn words(dir: &Path) -> [&OsStr; 3] {
    [WORD.as_ref(), BUILD.as_ref(), dir.as_ref()]
}

/// The arguments that make it build a jail around itself at `dir`, report, and end.
pub fn check_words(dir: &Path) -> [&OsStr; 3] {
    [CHECK_WORD.as_ref(), BUILD.as_ref(), dir.as_ref()]
}
