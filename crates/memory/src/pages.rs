//! Sets of guest pages, as runs.
//!
//! Pages are numbered by RAM offset: page `n` is the bytes `[n * PAGE_SIZE, (n + 1) * PAGE_SIZE)`
//! of RAM without the PCI hole (see [`crate::layout`]).

use std::ops::Range;

use crate::layout::PAGE_SIZE;

/// A set of pages: runs in ascending order that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    runs: Vec<Range<u64>>,
}

impl PageSet {
    /// Makes an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds pages, none of which may be before the last run's start, since sets are built in
    /// ascending order.
    ///
    /// # Panics
    /// If the pages are out of order. That is an error of the caller, and would make every later
    /// result wrong.
    pub fn append(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if pages.start <= last.end => {
                assert!(pages.start >= last.start, "pages appended out of order");
                last.end = last.end.max(pages.end);
            }
            _ => self.runs.push(pages),
        }
    }

    /// The runs of page numbers, ascending.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// The number of pages.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// The size of the pages together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether the set contains this page.
    pub fn contains(&self, page: u64) -> bool {
        let after = self.runs.partition_point(|run| run.end <= page);
        self.runs.get(after).is_some_and(|run| run.start <= page)
    }

    /// The pages of either set.
    pub fn union(&self, other: &Self) -> Self {
        let (mut ours, mut theirs) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        let mut union = Self::new();
        loop {
            let next = match (ours.peek(), theirs.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => ours.next(),
                (_, Some(_)) => theirs.next(),
                _ => ours.next(),
            };
            let Some(run) = next else { return union };
            union.append(run.clone());
        }
    }

    /// The pages of this set that the other lacks.
    pub fn difference(&self, other: &Self) -> Self {
        let mut difference = Self::new();
        let mut others = other.runs.as_slice();
        for run in &self.runs {
            let mut start = run.start;
            while let Some(first) = others.first() {
                if first.start >= run.end {
                    break;
                }
                difference.append(start..first.start.max(start).min(run.end));
                start = start.max(first.end);
                if first.end > run.end {
                    break;
                }
                others = &others[1..];
            }
            difference.append(start.min(run.end)..run.end);
        }
        difference
    }

    /// The pages of both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        self.difference(&self.difference(other))
    }

    /// The set with every gap of at most `gap` pages filled.
    pub fn bridged(&self, gap: u64) -> Self {
        let mut bridged = Self::new();
        for run in &self.runs {
            match bridged.runs.last_mut() {
                Some(last) if run.start - last.end <= gap => last.end = run.end,
                _ => bridged.runs.push(run.clone()),
            }
        }
        bridged
    }

    /// The set [bridged](Self::bridged) with the smallest power of two of pages that leaves at
    /// most `runs` runs; as it is if it has no more.
    pub fn bridged_to(&self, runs: usize) -> Self {
        let mut bridged = self.clone();
        let mut gap = 1;
        while bridged.runs.len() > runs.max(1) {
            bridged = bridged.bridged(gap);
            gap *= 2;
        }
        bridged
    }
}

impl FromIterator<Range<u64>> for PageSet {
    /// Collects runs in any order, which may overlap.
    fn from_iter<T: IntoIterator<Item = Range<u64>>>(runs: T) -> Self {
        let mut runs: Vec<_> = runs.into_iter().collect();
        runs.sort_by_key(|run| run.start);
        let mut set = Self::new();
        runs.into_iter().for_each(|run| set.append(run));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn members(set: &PageSet) -> BTreeSet<u64> {
        set.runs().iter().cloned().flatten().collect()
    }

    fn is_canonical(set: &PageSet) -> bool {
        let apart = set.runs.windows(2).all(|pair| pair[0].end < pair[1].start);
        apart && set.runs.iter().all(|run| !run.is_empty())
    }

    fn sets() -> impl Strategy<Value = PageSet> {
        proptest::collection::vec((0u64..80, 1u64..9), 0..12).prop_map(|runs| {
            runs.into_iter()
                .map(|(start, len)| start..start + len)
                .collect()
        })
    }

    proptest! {
        #[test]
        fn set_algebra_agrees_with_sets_of_numbers(a in sets(), b in sets()) {
            let (x, y) = (members(&a), members(&b));
            for (ours, model) in [
                (a.union(&b), x.union(&y).copied().collect::<BTreeSet<_>>()),
                (a.difference(&b), x.difference(&y).copied().collect()),
                (a.intersection(&b), x.intersection(&y).copied().collect()),
            ] {
                prop_assert!(is_canonical(&ours), "{ours:?}");
                prop_assert_eq!(members(&ours), model);
            }
            for page in 0..90 {
                prop_assert_eq!(a.contains(page), x.contains(&page));
            }
            prop_assert_eq!(a.pages(), x.len() as u64);
        }

        #[test]
        fn bridging_keeps_every_page_and_fills_only_small_gaps(a in sets(), gap in 0u64..9) {
            let bridged = a.bridged(gap);
            prop_assert!(is_canonical(&bridged));
            prop_assert!(a.difference(&bridged).is_empty());
            prop_assert!(bridged.difference(&a).runs().iter().all(|run| run.end - run.start <= gap));
            prop_assert!(bridged.runs.windows(2).all(|pair| pair[1].start - pair[0].end > gap));
            prop_assert!(a.bridged_to(3).runs().len() <= 3);
        }
    }

    #[test]
    #[should_panic(expected = "out of order")]
    fn appending_backwards_is_refused() {
        let mut set = PageSet::new();
        set.append(10..20);
        set.append(5..30);
    }
}
