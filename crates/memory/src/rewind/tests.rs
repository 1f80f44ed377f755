use std::collections::BTreeSet;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::layer_writer::{Checksums, LayerWriter};
use crate::layout::RamLayout;
use crate::{ChangeTracker, LayerId, Pagemap};

const PAGES: u64 = 64;

fn layout() -> RamLayout {
    RamLayout::new(PAGES * PAGE_SIZE).unwrap()
}

fn layer(memory: &GuestMemory, parent: Option<LayerId>, pages: &PageSet) -> Layer {
    let file = tempfile::tempfile().unwrap();
    let mut writer = LayerWriter::new(file, "layer", layout(), parent).unwrap();
    writer.copy(memory, pages).unwrap();
    writer.finish(Checksums::Transient).unwrap()
}

fn write(memory: &GuestMemory, page: u64, value: u64) {
    let address = GuestAddress(page * PAGE_SIZE + 8);
    memory.ram().write_obj(value, address).unwrap();
}

fn content(memory: &GuestMemory) -> Vec<u64> {
    (0..PAGES)
        .map(|page| {
            let address = GuestAddress(page * PAGE_SIZE + 8);
            memory.ram().read_obj(address).unwrap()
        })
        .collect()
}

/// A template in which each even page below 32 has its number.
fn template() -> LayerStack {
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    (0..32)
        .step_by(2)
        .for_each(|page| write(&memory, page, 1000 + page));
    let base = layer(&memory, None, &std::iter::once(0..PAGES).collect());
    LayerStack::new(vec![base]).unwrap()
}

/// A state of memory to go back to.
struct State {
    stack: LayerStack,
    content: Vec<u64>,
    given_up: BTreeSet<u64>,
}

#[test]
fn what_the_template_has_is_dropped_and_what_it_lacks_is_read() {
    let template = template();
    let memory = GuestMemory::from_layers(&layout(), &template).unwrap();
    write(&memory, 2, 7);
    write(&memory, 4, 0);
    write(&memory, 40, 9);
    let changed: PageSet = [2..3, 4..5, 40..41].into_iter().collect();
    let own = layer(&memory, Some(template.top().id()), &changed);
    let stack = LayerStack::new(vec![template.top().clone(), own]).unwrap();
    let before = content(&memory);
    for page in [2, 3, 4, 6, 40, 50] {
        write(&memory, page, 555);
    }
    let touched = [2..5, 6..7, 40..41, 50..51].into_iter().collect();
    let put = memory.put_back(&stack, &touched).unwrap();
    assert_eq!(content(&memory), before);
    // Page 3 and 50 are zero in both, 6 is the template's; 2 and 40 have data, and 4 is zero over
    // the template's data.
    assert_eq!(
        put,
        PutBack {
            dropped: 3,
            read: 3
        }
    );
    let private = memory.private_pages(&Pagemap::open().unwrap()).unwrap();
    assert_eq!(private, [2..3, 4..5, 40..41].into_iter().collect());
}

#[test]
fn layers_over_another_template_are_refused() {
    let memory = GuestMemory::from_layers(&layout(), &template()).unwrap();
    let all = std::iter::once(0..PAGES).collect();
    assert!(memory.put_back(&template(), &all).is_err());
}

#[test]
fn stacks_differ_where_their_pages_come_from_other_layers() {
    let template = template();
    let memory = GuestMemory::from_layers(&layout(), &template).unwrap();
    write(&memory, 3, 1);
    let over = |pages: Range<u64>| {
        let pages = std::iter::once(pages).collect();
        let own = layer(&memory, Some(template.top().id()), &pages);
        LayerStack::new(vec![template.top().clone(), own]).unwrap()
    };
    let (one, other) = (over(3..4), over(2..4));
    assert!(one.difference(Some(&one)).is_empty());
    let expected: PageSet = std::iter::once(2..4).collect();
    assert_eq!(one.difference(Some(&other)), expected);
    assert_eq!(other.difference(Some(&template)), expected);
    assert_eq!(template.difference(None), template.pages_with_data());
}

#[test]
fn memory_that_was_renewed_is_mapped_from_layers_again() {
    let template = template();
    let memory = GuestMemory::from_layers(&layout(), &template).unwrap();
    let before = content(&memory);
    let renewed = memory.renewed().unwrap();
    assert_eq!(content(&renewed), vec![0; PAGES as usize]);
    write(&renewed, 5, 5);
    let again = renewed.renewed_from_layers(&template).unwrap();
    assert_eq!(content(&again), before);
    assert!(
        again
            .private_pages(&Pagemap::open().unwrap())
            .unwrap()
            .is_empty()
    );
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Discard(u64),
    Save,
    Rewind(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..PAGES, 0u64..4).prop_map(|(page, value)| Step::Write(page, value)),
        1 => (0..PAGES).prop_map(Step::Discard),
        2 => Just(Step::Save),
        2 => any::<usize>().prop_map(Step::Rewind),
    ]
}

proptest! {
    /// Along any path through a tree of states, tracked changes and the stacks' difference are all
    /// that has to be put back.
    #[test]
    fn every_state_of_a_tree_comes_back(steps in prop::collection::vec(step(), 1..60)) {
        let template = template();
        let memory = GuestMemory::from_layers(&layout(), &template).unwrap();
        let pagemap = Pagemap::open().unwrap();
        let tracker = ChangeTracker::new(&memory, pagemap.try_clone().unwrap()).unwrap();
        let mut changed = tracker.arm().unwrap();
        let mut present = template.clone();
        let mut states: Vec<State> = Vec::new();
        // Pages that the guest has given up have any content until it writes them.
        let mut given_up = BTreeSet::new();
        let mut released = PageSet::new();
        for step in steps {
            match step {
                Step::Write(page, value) => {
                    write(&memory, page, value);
                    given_up.remove(&page);
                }
                Step::Discard(page) => {
                    memory.advise(page..page + 1, Advice::LinuxDontNeed).unwrap();
                    given_up.insert(page);
                    released = released.union(&std::iter::once(page..page + 1).collect());
                }
                Step::Save => {
                    changed = changed.union(&tracker.take_changed().unwrap());
                    let own = layer(&memory, Some(present.top().id()), &changed);
                    let layers = [present.layers(), &[own]].concat();
                    present = LayerStack::new(layers).unwrap();
                    changed = PageSet::new();
                    states.push(State {
                        stack: present.clone(),
                        content: content(&memory),
                        given_up: given_up.clone(),
                    });
                }
                Step::Rewind(which) if !states.is_empty() => {
                    let state = &states[which % states.len()];
                    changed = changed.union(&tracker.take_changed().unwrap());
                    let above = state.stack.pages_above(1);
                    let pages = changed
                        .union(&state.stack.difference(Some(&present)))
                        .union(&released.intersection(&above));
                    tracker.unprotect(&pages).unwrap();
                    memory.put_back(&state.stack, &pages).unwrap();
                    tracker.take_as_unchanged(&pages).unwrap();
                    let now = content(&memory);
                    for page in (0..PAGES).filter(|page| !state.given_up.contains(page)) {
                        let at = page as usize;
                        prop_assert_eq!(now[at], state.content[at], "page {}", page);
                    }
                    given_up.clone_from(&state.given_up);
                    released = PageSet::new();
                    present = state.stack.clone();
                    changed = tracker.take_changed().unwrap();
                    prop_assert!(changed.is_empty(), "{:?}", changed);
                    prop_assert_eq!(memory.usage(&pagemap).unwrap().swapped, 0);
                }
                Step::Rewind(_) => {}
            }
        }
    }
}
