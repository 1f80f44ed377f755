//! What clones of templates cost, as their hosts report it.

use std::collections::HashMap;

use tokio::time::Instant;

/// The most templates whose costs are kept. Where there are more, the one that was measured the
/// longest ago is guessed again.
const TEMPLATES: usize = 1024;
/// The part of a new figure in an average, one part in so many.
const WEIGHT: u64 = 4;

/// The costs of clones by template.
#[derive(Default)]
pub(super) struct Costs(HashMap<String, Cost>);

struct Cost {
    /// The moving average of the private memory, in bytes.
    bytes: u64,
    measured: Instant,
}

impl Costs {
    /// Adds what clones of a template cost on a host on average, in bytes.
    pub(super) fn record(&mut self, template: &str, bytes: u64) {
        let measured = Instant::now();
        if let Some(known) = self.0.get_mut(template) {
            let kept = known.bytes - known.bytes / WEIGHT;
            known.bytes = kept.saturating_add(bytes.div_ceil(WEIGHT));
            known.measured = measured;
            return;
        }
        if self.0.len() >= TEMPLATES {
            let oldest = self.0.iter().min_by_key(|(_, cost)| cost.measured);
            let oldest = oldest.map(|(template, _)| template.clone());
            oldest.map(|oldest| self.0.remove(&oldest));
        }
        self.0.insert(template.to_owned(), Cost { bytes, measured });
    }

    /// What a clone of a template costs, in bytes; `None` where none was measured.
    pub(super) fn of(&self, template: &str) -> Option<u64> {
        self.0.get(template).map(|cost| cost.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_follows_what_is_measured_and_the_oldest_one_is_forgotten() {
        let mut costs = Costs::default();
        costs.record("t", 100);
        assert_eq!(costs.of("t"), Some(100));
        for _ in 0..40 {
            costs.record("t", 1000);
        }
        assert!((990..=1010).contains(&costs.of("t").unwrap()));
        for number in 0..TEMPLATES {
            costs.record(&format!("vm:{number}"), 1);
        }
        assert_eq!((costs.0.len(), costs.of("t")), (TEMPLATES, None));
    }
}
