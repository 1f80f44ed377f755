//! A PostgreSQL of this machine's package, which is started for the bench.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use army_controller::testing::Postgres;

/// The time of one tick of the kernel's accounts, which is the same on all Linux of this processor.
const TICK: Duration = Duration::from_millis(10);

/// A PostgreSQL, where its package is installed. Its files are on a disk, and not in memory.
pub(super) fn start() -> Result<Option<Postgres>> {
    let options = ["-c", "shared_buffers=512MB", "-c", "max_wal_size=4GB"];
    Postgres::start(Path::new("/var/tmp"), &options).context("cannot start PostgreSQL")
}

/// The processor time that the server has taken, in all of its processes.
pub(super) fn processor_time(postgres: &Postgres) -> Result<Duration> {
    let first = postgres.process_id();
    let mut ticks = 0;
    for entry in std::fs::read_dir("/proc")? {
        // A process may end at any time.
        let Ok(stat) = std::fs::read_to_string(entry?.path().join("stat")) else {
            continue;
        };
        ticks += ticks_of(&stat, first).unwrap_or(0);
    }
    Ok(TICK.saturating_mul(ticks))
}

/// The ticks of the process with this `stat`, where it is the process `first` or a child of it. Those of
/// children that have ended are among those of `first`.
fn ticks_of(stat: &str, first: u32) -> Option<u32> {
    let (id, rest) = stat.split_once(' ')?;
    // The name of the program, in parentheses, may have any character.
    let fields: Vec<&str> = rest.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |index: usize| fields.get(index)?.parse::<u32>().ok();
    let is_first = id.parse() == Ok(first);
    if !is_first && field(1)? != first {
        return None;
    }
    let own = field(11)?.checked_add(field(12)?)?;
    match is_first {
        true => own.checked_add(field(13)?)?.checked_add(field(14)?),
        false => Some(own),
    }
}

#[cfg(test)]
mod tests {
    use super::ticks_of;

    #[test]
    fn the_time_of_a_server_is_that_of_its_processes_and_of_no_others() {
        let of = |id, parent| {
            format!("{id} (post) gres) S {parent} 1 1 0 -1 0 0 0 0 0 7 11 13 17 20 0 1 0 5")
        };
        assert_eq!(ticks_of(&of(5, 1), 5), Some(48));
        assert_eq!(ticks_of(&of(6, 5), 5), Some(18));
        assert_eq!(ticks_of(&of(7, 6), 5), None);
    }
}
