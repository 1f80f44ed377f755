//! Limits the guest kernel's messages on the console to warnings and worse, once the guest is up.
//!
//! Every character on a serial console is an exit from the guest, and each clone would begin with a
//! notice that its kernel reseeds its random numbers, which costs a hundred exits. All messages
//! stay in the kernel's own log (`dmesg`).

use std::fs;

/// proc_sys_kernel(5): the first of its numbers is the least level that is not printed.
const PRINTK: &str = "/proc/sys/kernel/printk";
/// Notices are not printed, warnings are (`KERN_WARNING` is 4).
const WARNINGS: u32 = 5;
/// The words on the kernel's command line that set the console's level explicitly.
const OWNERS_CHOICE: [&str; 4] = ["loglevel", "debug", "quiet", "ignore_loglevel"];

/// Keeps notices off the console, unless the command line sets the level.
pub(crate) fn settle() {
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let levels = fs::read_to_string(PRINTK).unwrap_or_default();
    if let Some(level) = wanted(&command_line, &levels) {
        // If this is not allowed, more is printed, and nothing else changes.
        let _ = fs::write(PRINTK, level.to_string());
    }
}

/// The level to set, where one is to be set.
fn wanted(command_line: &str, levels: &str) -> Option<u32> {
    let chosen = command_line.split_ascii_whitespace().any(|word| {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        OWNERS_CHOICE.contains(&name)
    });
    let now: u32 = levels.split_ascii_whitespace().next()?.parse().ok()?;
    (!chosen && now > WARNINGS).then_some(WARNINGS)
}

#[cfg(test)]
mod tests {
    use super::wanted;

    #[test]
    fn notices_are_left_out_unless_somebody_wants_them() {
        let kernels = "7\t4\t1\t7\n";
        assert_eq!(wanted("console=ttyS0 panic=-1", kernels), Some(5));
        assert_eq!(wanted("console=ttyS0 loglevel=7", kernels), None);
        assert_eq!(wanted("ignore_loglevel console=ttyS0", kernels), None);
        assert_eq!(wanted("debugfs=off", kernels), Some(5));
        // A distribution's own choice that prints less stays.
        assert_eq!(wanted("", "4 4 1 7"), None);
        assert_eq!(wanted("", ""), None);
    }
}
