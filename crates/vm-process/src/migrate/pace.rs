//! When the guest is paused for the last of its memory.

use std::time::Duration;

/// While more than this has changed, another round may be worth it.
const SMALL_BYTES: u64 = 256 << 10;
/// The pause that no further round is made for, unless the request sets another.
const SHORT_PAUSE: Duration = Duration::from_millis(20);
/// The most rounds.
const MAX_ROUNDS: usize = 30;
/// The number of rounds after which a guest that has written as much as was sent in each of them
/// counts as faster than the network.
const STALLED_ROUNDS: u32 = 3;

/// What follows a round.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Round,
    Pause,
    /// The guest would be paused for longer than this limit.
    GiveUp(Duration),
}

/// Decides when the guest is paused.
pub(super) struct Pace {
    max_pause: Option<Duration>,
    /// How much had changed at the end of the last round.
    last_changed: u64,
    /// For how many rounds that has not become less.
    stalled: u32,
}

impl Pace {
    pub(super) fn new(max_pause: Option<Duration>) -> Self {
        Self {
            max_pause,
            last_changed: u64::MAX,
            stalled: 0,
        }
    }

    /// What follows the round of this number, during which so many bytes were changed, whose sending
    /// is expected to take so long.
    pub(super) fn next(&mut self, round: usize, changed: u64, expected: Duration) -> Next {
        if changed < SMALL_BYTES || expected <= self.max_pause.unwrap_or(SHORT_PAUSE) {
            return Next::Pause;
        }
        self.stalled = match changed > self.last_changed / 10 * 9 {
            true => self.stalled + 1,
            false => 0,
        };
        self.last_changed = changed;
        if round + 1 < MAX_ROUNDS && self.stalled < STALLED_ROUNDS {
            return Next::Round;
        }
        self.max_pause.map_or(Next::Pause, Next::GiveUp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// What follows rounds in which so many MiB changed, at 100 MiB a second.
    fn follows(max_pause_ms: Option<u64>, changed_mib: &[u64]) -> Vec<Next> {
        let mut pace = Pace::new(max_pause_ms.map(Duration::from_millis));
        let rounds = changed_mib.iter().enumerate();
        rounds
            .map(|(round, mib)| pace.next(round, mib * MIB, Duration::from_millis(mib * 10)))
            .collect()
    }

    #[test]
    fn rounds_go_on_while_less_is_left_after_each() {
        let next = follows(None, &[100, 50, 20, 5, 2]);
        let pause = next.iter().position(|it| *it == Next::Pause);
        assert_eq!(pause, Some(4), "{next:?}");
        assert_eq!(follows(Some(200), &[100, 20]), [Next::Round, Next::Pause]);
        assert_eq!(follows(Some(1), &[0]), [Next::Pause]);
    }

    #[test]
    fn a_guest_that_outruns_the_network_is_paused_or_stays() {
        let stalled = [100, 99, 100, 98];
        assert_eq!(follows(None, &stalled).last(), Some(&Next::Pause));
        let limit = Duration::from_millis(300);
        assert_eq!(
            follows(Some(300), &stalled).last(),
            Some(&Next::GiveUp(limit))
        );
        // One that shrinks a little each time comes to an end, too.
        let slow: Vec<u64> = (0..MAX_ROUNDS as u64)
            .map(|round| 10_000 >> (round / 4))
            .collect();
        assert_ne!(follows(None, &slow).last(), Some(&Next::Round));
    }
}
