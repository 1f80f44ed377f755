//! The log of a VM's process, bounded so that the guest cannot fill it.
//!
//! The log is a file in the runtime directory, which is in memory. Every line passes through this
//! module, so code that writes a warning need not limit itself: the lines of one place in the code
//! have a rate limit, all lines together have a size limit, and their text is made printable.
//! Errors have a reserve of their own beyond that limit, because the last one may explain why the
//! VM ended.

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_proto::text::printable;
use tracing::callsite::Identifier;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// The number of lines that one place in the code may write in a burst.
const BURST: u32 = 20;
/// The time after which a place in the code may write one more line.
const REFILL: Duration = Duration::from_secs(10);
/// The size limit of all lines together, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The bytes beyond [`MAX_BYTES`] that are reserved for errors.
const ERROR_BYTES: u64 = 64 << 10;

/// Writes lines to `W`, within their bounds.
pub(super) struct BoundedLog<W>(Mutex<State<W>>);

struct State<W> {
    out: W,
    written: u64,
    is_full: bool,
    /// Whether lines are rate limited. They are not when `CLONE_LOG` asks for more than warnings.
    has_rate: bool,
    places: HashMap<Identifier, Place>,
}

/// The rate limit of one place in the code that writes lines: a token bucket.
struct Place {
    tokens: u32,
    /// The time up to which `tokens` has been refilled.
    since: Instant,
    /// The number of lines dropped since the last one that was written.
    left_out: u64,
}

impl Place {
    fn new(now: Instant) -> Self {
        Self {
            tokens: BURST,
            since: now,
            left_out: 0,
        }
    }

    /// Takes a token for one line: the number of lines dropped before it, or `None` where this line
    /// must be dropped as well.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_secs() / REFILL.as_secs();
        // A number too large for `u32` means a pause long enough to refill all tokens.
        let earned = u32::try_from(earned).unwrap_or(BURST).min(BURST);
        self.tokens = (self.tokens + earned).min(BURST);
        self.since = match self.tokens {
            BURST => now,
            _ => self.since + REFILL * earned,
        };
        match self.tokens.checked_sub(1) {
            Some(rest) => {
                self.tokens = rest;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out += 1;
                None
            }
        }
    }
}

impl<W: Write> BoundedLog<W> {
    /// Makes a log that writes to `out`, which must be empty.
    pub(super) fn new(out: W, has_rate: bool) -> Self {
        Self(Mutex::new(State {
            out,
            written: 0,
            is_full: false,
            has_rate,
            places: HashMap::new(),
        }))
    }
}

impl<W: Write> State<W> {
    /// Writes the line `text` of a place in the code, if its rate and the size limit allow it.
    fn line(&mut self, place: Identifier, level: Level, now: Instant, text: &str) {
        if self.has_rate {
            let place = self.places.entry(place);
            match place.or_insert_with(|| Place::new(now)).take(now) {
                Some(0) => {}
                Some(count) => {
                    self.put(level, &format!("{count} lines like the next are left out"))
                }
                None => return,
            }
        }
        self.put(level, &printable(text));
    }

    fn put(&mut self, level: Level, line: &str) {
        let room = match level {
            Level::ERROR => MAX_BYTES + ERROR_BYTES,
            _ => MAX_BYTES,
        };
        let len = line.len() as u64 + 1;
        if self.written + len > room {
            if !std::mem::replace(&mut self.is_full, true) {
                // An error of the log itself cannot be reported anywhere.
                let _ = writeln!(self.out, "the log is full: only errors follow");
            }
            return;
        }
        self.written += len;
        let _ = self.out.write_all(format!("{line}\n").as_bytes());
    }
}

/// The writer of one line.
pub(super) struct Line<'a, W> {
    log: &'a BoundedLog<W>,
    place: Option<(Identifier, Level)>,
}

impl<W: Write> Write for Line<'_, W> {
    /// Takes a whole line, as the formatter hands it over.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some((place, level)) = &self.place {
            let text = String::from_utf8_lossy(bytes);
            // A panic while the lock was held lost one line at most; the state is still usable.
            let mut state = self.log.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.line(place.clone(), *level, Instant::now(), text.trim());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a, W: Write + 'a> MakeWriter<'a> for BoundedLog<W> {
    type Writer = Line<'a, W>;

    fn make_writer(&'a self) -> Self::Writer {
        Line {
            log: self,
            place: None,
        }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
        Line {
            log: self,
            place: Some((metadata.callsite(), *metadata.level())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// A writer that shares its bytes with the test.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    /// The bytes that the log writes while `work` runs.
    fn logged(has_rate: bool, work: impl FnOnce()) -> String {
        let written = Written::default();
        let lines = super::super::lines(BoundedLog::new(written.clone(), has_rate));
        let subscriber = tracing_subscriber::registry().with(lines);
        tracing::subscriber::with_default(subscriber, work);
        written.text()
    }

    #[test]
    fn a_warning_that_a_guest_repeats_is_written_a_few_times() {
        let text = logged(true, || {
            for number in 0..100_000 {
                tracing::warn!(number, "device broken until the driver resets it");
            }
            tracing::warn!("something else");
        });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), BURST as usize + 1, "{text}");
        assert!(lines[0].contains("number=0"), "{text}");
        assert!(lines[lines.len() - 1].contains("something else"), "{text}");
    }

    #[test]
    fn what_was_left_out_is_counted() {
        let now = Instant::now();
        let mut place = Place::new(now);
        let first = (0..BURST + 7).filter_map(|_| place.take(now)).count();
        assert_eq!(first, BURST as usize);
        let later = now + REFILL + REFILL / 2;
        assert_eq!(place.take(later), Some(7));
        assert_eq!(place.take(later), None);
        // The half that was left over counts.
        assert_eq!(place.take(now + 2 * REFILL), Some(1));
        let much_later = now + REFILL * 1_000_000;
        let all = (0..2 * BURST)
            .filter_map(|_| place.take(much_later))
            .count();
        assert_eq!(all, BURST as usize);
    }

    #[test]
    fn the_log_ends_at_its_size_but_for_errors() {
        let text = logged(false, || {
            for number in 0..100_000 {
                tracing::warn!(number, "a line of some length, as warnings have them");
            }
            tracing::error!("the guest crashed");
        });
        assert!(
            text.len() as u64 <= MAX_BYTES + ERROR_BYTES,
            "{}",
            text.len()
        );
        let mut last = text.lines().rev();
        assert!(last.next().unwrap().contains("the guest crashed"));
        assert_eq!(last.next(), Some("the log is full: only errors follow"));
        let errors = logged(false, || {
            for _ in 0..100_000 {
                tracing::error!("the guest crashed");
            }
        });
        assert!(errors.len() as u64 <= MAX_BYTES + ERROR_BYTES + 100);
    }

    #[test]
    fn a_line_is_one_printable_line() {
        let text = logged(true, || {
            tracing::warn!(name = "a\u{1b}[2J\nb", "{}", "c\u{1b}]0;d\u{7}\ne");
            tracing::error!("{}", "long ".repeat(1000));
        });
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(
            !text.contains('\u{1b}') && !text.contains('\u{7}'),
            "{text}"
        );
        assert!(text.lines().all(|line| line.chars().count() <= 500));
    }
}
