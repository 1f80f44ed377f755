//! Turns: what changes a VM waits for what is changing that VM, and for nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::lock;

/// The turns of VMs. There is an entry for each VM that is being changed.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Arc<Mutex<()>>>>);

impl Turns {
    /// Does `work` when nothing else is done with the VM in a turn.
    pub(crate) fn take<T>(&self, id: &str, work: impl FnOnce() -> T) -> T {
        let turn = Arc::clone(lock(&self.0).entry(id.to_owned()).or_default());
        let done = {
            let _turn = lock(&turn);
            work()
        };
        let mut turns = lock(&self.0);
        // This turn and the entry: nobody waits.
        if Arc::strong_count(&turn) == 2 {
            turns.remove(id);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn one_vm_is_changed_by_one_at_a_time_and_leaves_nothing() {
        let turns = Turns::default();
        let (inside, most) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    turns.take("1", || {
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        // Another VM has its own turn.
                        turns.take("2", || {});
                        inside.fetch_sub(1, Ordering::SeqCst);
                    });
                });
            }
        });
        assert_eq!(most.into_inner(), 1);
        assert!(lock(&turns.0).is_empty());
    }
}
