use super::*;
use crate::layer_writer::{Checksums, LayerWriter};
use crate::mapping::GuestMemory;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tempfile::tempfile;
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 48;

fn layout() -> RamLayout {
    RamLayout::new(PAGES * PAGE_SIZE).unwrap()
}

fn set(pages: &[u64]) -> PageSet {
    pages.iter().map(|page| *page..page + 1).collect()
}

fn fill(memory: &GuestMemory, page: u64, byte: u8) {
    let bytes = [byte; PAGE_SIZE as usize];
    let address = memory.layout().address_of(page * PAGE_SIZE).unwrap();
    memory.ram().write_slice(&bytes, address).unwrap();
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.layout().size() as usize];
    memory
        .ram()
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    bytes
}

/// A layer over `parent` whose pages are filled with a byte each.
fn layer(parent: Option<&Layer>, pages: &[(u64, u8)]) -> Layer {
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    pages
        .iter()
        .for_each(|(page, byte)| fill(&memory, *page, *byte));
    let file = tempfile().unwrap();
    let mut writer = LayerWriter::new(file, "test", layout(), parent.map(Layer::id)).unwrap();
    let numbers: Vec<_> = pages.iter().map(|(page, _)| *page).collect();
    writer.copy(&memory, &set(&numbers)).unwrap();
    writer.finish(Checksums::Yes).unwrap()
}

fn reopened(layer: &Layer) -> Result<Layer, LayerError> {
    Layer::open(layer.file().try_clone().unwrap(), "again")
}

fn copy_of(layer: &Layer) -> File {
    let mut bytes = vec![0; layer.file().metadata().unwrap().len() as usize];
    layer.file().read_exact_at(&mut bytes, 0).unwrap();
    let copy = tempfile().unwrap();
    copy.write_all_at(&bytes, 0).unwrap();
    copy
}

/// The layer's file with its index changed and its checksum made right again, as a hostile hand
/// would do it.
fn forged(index: Index) -> Result<Layer, LayerError> {
    let file = tempfile().unwrap();
    let (bytes, _) = index.encode();
    file.write_all_at(&bytes, index.layout.size()).unwrap();
    Layer::open(file, "forged")
}

fn data(pages: std::ops::Range<u64>) -> Extent {
    Extent {
        pages,
        content: Content::Data,
    }
}

fn index(extents: Vec<Extent>) -> Index {
    Index {
        layout: layout(),
        parent: None,
        extents,
        sums: Sums::Transient { nonce: [7; 16] },
    }
}

#[test]
fn a_layer_read_back_is_the_layer_written() {
    let base = layer(None, &[(0, 1), (1, 1), (5, 0), (47, 9)]);
    let diff = layer(Some(&base), &[(1, 0), (2, 3)]);
    for layer in [&base, &diff] {
        let again = reopened(layer).unwrap();
        assert_eq!(again.id(), layer.id());
        assert_eq!(again.extents(), layer.extents());
        again.verify(3).unwrap();
    }
    assert_eq!(base.extents(), [data(0..2), data(47..48)]);
    let zero = Extent {
        pages: 1..2,
        content: Content::Zero,
    };
    assert_eq!(diff.extents(), [zero, data(2..3)]);
    assert_eq!(diff.parent(), Some(base.id()));
}

#[test]
fn version_1_of_the_format_stays_as_it_is() {
    let base = layer(None, &[(1, 0x11), (2, 0x22), (40, 0x33)]);
    let ids = [base.id(), layer(Some(&base), &[(1, 0), (7, 7)]).id()];
    let golden = [
        include_str!("golden/base.id"),
        include_str!("golden/diff.id"),
    ];
    assert_eq!(ids.map(|id| id.to_string()), golden.map(str::trim));
    // The id covers the index, so only the bytes of one index need to be kept.
    let (bytes, _) = base.inner.index.encode();
    assert_eq!(bytes, include_bytes!("golden/base.index"));
    let file = tempfile().unwrap();
    file.write_all_at(include_bytes!("golden/base.index"), layout().size())
        .unwrap();
    assert_eq!(
        Layer::open(file, "golden").unwrap().extents(),
        base.extents()
    );
}

#[test]
fn a_layer_is_sparse_and_holds_no_zero_pages() {
    use std::os::unix::fs::MetadataExt;
    let layout = RamLayout::new(1 << 30).unwrap();
    let memory = GuestMemory::anonymous(&layout).unwrap();
    fill(&memory, 100_000, 1);
    let mut writer = LayerWriter::new(tempfile().unwrap(), "sparse", layout, None).unwrap();
    writer
        .copy(&memory, &std::iter::once(99_000..101_000).collect())
        .unwrap();
    assert_eq!(writer.data_bytes(), PAGE_SIZE);
    let layer = writer.finish(Checksums::Yes).unwrap();
    let taken = layer.file().metadata().unwrap().blocks() * 512;
    assert!(taken <= 64 << 10, "{taken} bytes on disk for one page");
}

#[test]
fn the_last_copy_of_a_page_counts() {
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    fill(&memory, 3, 1);
    fill(&memory, 4, 1);
    let base = layer(None, &[(3, 8), (4, 8), (5, 8)]);
    let mut writer =
        LayerWriter::new(tempfile().unwrap(), "twice", layout(), Some(base.id())).unwrap();
    writer.copy(&memory, &set(&[3, 4, 5])).unwrap();
    fill(&memory, 3, 0);
    fill(&memory, 5, 2);
    writer.copy(&memory, &set(&[3, 5])).unwrap();
    let stack = LayerStack::new(vec![base, writer.finish(Checksums::Yes).unwrap()]).unwrap();
    let clone = content(&GuestMemory::from_layers(&layout(), &stack).unwrap());
    let bytes: Vec<u8> = (2..6)
        .map(|page| clone[page * PAGE_SIZE as usize])
        .collect();
    assert_eq!(bytes, [0, 0, 1, 2]);
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_located() {
    let base = layer(None, &[(0, 1), (9, 2)]);
    let len = base.file().metadata().unwrap().len();
    for at in [100, 9 * PAGE_SIZE + 4095] {
        let file = copy_of(&base);
        file.write_all_at(&[0x55], at).unwrap();
        let layer = Layer::open(file, "flipped").unwrap();
        for result in [layer.verify(1), layer.verify(2), layer.verify_around(at)] {
            let error = result.unwrap_err();
            assert!(
                matches!(error, LayerError::Corrupt { offset: 0, .. }),
                "{error}"
            );
        }
    }
    for at in layout().size()..len {
        let file = copy_of(&base);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let error = Layer::open(file, "flipped").unwrap_err();
        assert!(
            matches!(error, LayerError::Format { .. }),
            "byte {at}: {error}"
        );
    }
}

#[test]
fn a_file_cut_short_or_with_more_at_its_end_is_refused() {
    let base = layer(None, &[(0, 1)]);
    let len = base.file().metadata().unwrap().len();
    for cut in [0, 1, 119, 120, PAGE_SIZE, len - 1, len + 1, len + PAGE_SIZE] {
        let file = copy_of(&base);
        file.set_len(cut).unwrap();
        let error = Layer::open(file, "cut").unwrap_err();
        assert!(matches!(error, LayerError::Format { .. }), "{cut}: {error}");
    }
}

#[test]
fn extents_that_break_the_rules_are_refused_even_with_right_checksums() {
    assert!(forged(index(vec![data(0..2), data(3..PAGES)])).is_ok());
    let zero = Extent {
        pages: 0..1,
        content: Content::Zero,
    };
    for (extents, why) in [
        (vec![data(0..PAGES + 1)], "beyond RAM"),
        (vec![data(PAGES..PAGES + 1)], "beyond RAM"),
        (vec![data(0..3), data(2..4)], "overlap"),
        (vec![data(5..6), data(2..4)], "out of order"),
        (vec![data(0..2), data(2..4)], "two pieces"),
        (vec![data(3..3)], "empty"),
        (vec![data(u64::MAX - 1..u64::MAX), data(0..1)], "beyond RAM"),
        (vec![zero], "override nothing"),
    ] {
        let error = forged(index(extents)).unwrap_err().to_string();
        let reason = error.split("invalid: ").nth(1);
        assert!(reason.is_some_and(|reason| reason.contains(why)), "{error}");
    }
    let sums = Sums::Chunks(vec![]);
    let none = Index {
        sums,
        ..index(vec![data(0..1)])
    };
    assert!(
        forged(none)
            .unwrap_err()
            .to_string()
            .contains("one checksum")
    );
}

#[test]
fn a_layer_of_a_later_version_is_refused_by_name() {
    let file = copy_of(&layer(None, &[(0, 1)]));
    let len = file.metadata().unwrap().len();
    file.write_all_at(&2_u32.to_le_bytes(), len - 112).unwrap();
    let error = Layer::open(file, "new.layer").unwrap_err().to_string();
    assert!(
        error.contains("new.layer") && error.contains("version 2"),
        "{error}"
    );
}

#[test]
fn missing_and_swapped_layers_are_refused() {
    let base = layer(None, &[(0, 1)]);
    let other = layer(None, &[(0, 2)]);
    let first = layer(Some(&base), &[(1, 1)]);
    let second = layer(Some(&first), &[(2, 1)]);
    assert!(LayerStack::new(vec![base.clone(), first.clone(), second.clone()]).is_ok());
    for wrong in [
        vec![base.clone(), second.clone()],
        vec![first.clone(), second.clone()],
        vec![base.clone(), second, first.clone()],
        vec![other, first],
        vec![base.clone(), base],
    ] {
        let error = LayerStack::new(wrong).unwrap_err();
        assert!(matches!(error, LayerError::Parent { .. }), "{error}");
    }
    assert!(matches!(LayerStack::new(vec![]), Err(LayerError::NoLayer)));
}

#[test]
fn a_transient_layer_can_be_mapped_but_not_verified() {
    let memory = GuestMemory::anonymous(&layout()).unwrap();
    fill(&memory, 1, 1);
    let transient = || {
        let mut writer = LayerWriter::new(tempfile().unwrap(), "t", layout(), None).unwrap();
        writer.copy(&memory, &set(&[1])).unwrap();
        writer.finish(Checksums::Transient).unwrap()
    };
    let (one, two) = (transient(), transient());
    assert_ne!(one.id(), two.id());
    assert!(matches!(
        reopened(&one).unwrap().verify(1),
        Err(LayerError::Transient { .. })
    ));
    let stack = LayerStack::new(vec![one]).unwrap();
    let clone = GuestMemory::from_layers(&layout(), &stack).unwrap();
    assert_eq!(content(&clone), content(&memory));
}

#[test]
fn a_layer_in_memory_is_the_same_and_sealed() {
    let base = layer(None, &[(0, 1), (9, 2)]);
    let copy = base.to_memory().unwrap();
    copy.verify(1).unwrap();
    reopened(&copy).unwrap().verify(1).unwrap();
    assert_eq!(copy.id(), base.id());
    assert!(copy.file().write_all_at(&[1], 0).is_err());
    assert!(copy.file().set_len(1).is_err());
    let seen = |layer: Layer| {
        let stack = LayerStack::new(vec![layer]).unwrap();
        content(&GuestMemory::from_layers(&layout(), &stack).unwrap())
    };
    assert_eq!(seen(copy), seen(base));
}

#[test]
fn clones_write_neither_the_layers_nor_each_other() {
    let stack = LayerStack::new(vec![layer(None, &[(0, 1), (9, 2)])]).unwrap();
    let clones = [0, 1].map(|_| GuestMemory::from_layers(&layout(), &stack).unwrap());
    let before = content(&clones[1]);
    (0..PAGES).for_each(|page| fill(&clones[0], page, 0xee));
    assert_eq!(content(&clones[1]), before);
    stack.layers()[0].verify(1).unwrap();
}

#[test]
fn a_stack_in_too_many_pieces_is_refused_until_it_is_flattened() {
    let layout = RamLayout::new(8 * MAX_MAPPINGS as u64 * PAGE_SIZE).unwrap();
    let scattered = |parent: Option<&Layer>, step: usize, byte| {
        let memory = GuestMemory::anonymous(&layout).unwrap();
        let pages: Vec<_> = (0..layout.size() / PAGE_SIZE).step_by(step).collect();
        pages.iter().for_each(|page| fill(&memory, *page, byte));
        let parent = parent.map(Layer::id);
        let mut writer = LayerWriter::new(tempfile().unwrap(), "s", layout, parent).unwrap();
        writer.copy(&memory, &set(&pages)).unwrap();
        writer.finish(Checksums::Yes).unwrap()
    };
    let base = scattered(None, 2, 1);
    assert_eq!(base.extents().len(), 1, "zeros between data are filled");
    let diff = scattered(Some(&base), 3, 2);
    let stack = LayerStack::new(vec![base.clone(), diff]).unwrap();
    let error = GuestMemory::from_layers(&layout, &stack).unwrap_err();
    assert!(error.to_string().contains("flatten them"), "{error}");
    let model = {
        let mut bytes = vec![0; layout.size() as usize];
        stack.read(0, &mut bytes).unwrap();
        bytes
    };
    for keep in [0, 1] {
        let flat = stack.flatten(keep, tempfile().unwrap(), "flat").unwrap();
        let mut layers = stack.layers()[..keep].to_vec();
        layers.push(flat);
        let flat = LayerStack::new(layers).unwrap();
        assert!(content(&GuestMemory::from_layers(&layout, &flat).unwrap()) == model);
    }
}

#[test]
fn writing_over_an_existing_file_is_refused() {
    let file = tempfile().unwrap();
    file.write_all_at(b"precious", 0).unwrap();
    let error = LayerWriter::new(file, "precious", layout(), None).unwrap_err();
    assert!(matches!(error, LayerError::NotEmpty { .. }), "{error}");
}

fn random_layers() -> impl Strategy<Value = Vec<BTreeMap<u64, u8>>> {
    let layer = proptest::collection::btree_map(0..PAGES, 0_u8..4, 0..24);
    proptest::collection::vec(layer, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_seen_through_any_stack_is_what_was_written(
        written in random_layers(),
        keep in 0_usize..6,
    ) {
        let mut model = vec![0; layout().size() as usize];
        let mut layers: Vec<Layer> = Vec::new();
        for pages in &written {
            for (page, byte) in pages {
                model[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize].fill(*byte);
            }
            let pages: Vec<_> = pages.iter().map(|(page, byte)| (*page, *byte)).collect();
            layers.push(layer(layers.last(), &pages));
        }
        let stack = LayerStack::new(layers).unwrap();
        let mut read = vec![0xff; model.len()];
        stack.read(0, &mut read).unwrap();
        prop_assert!(read == model, "read through the stack");
        let mapped = GuestMemory::from_layers(&layout(), &stack).unwrap();
        prop_assert!(content(&mapped) == model, "mapped");

        let pieces = stack.pieces();
        prop_assert_eq!((pieces[0].pages.start, pieces[pieces.len() - 1].pages.end), (0, PAGES));
        for pair in pieces.windows(2) {
            prop_assert_eq!(pair[0].pages.end, pair[1].pages.start);
            prop_assert_ne!(pair[0].source, pair[1].source);
        }

        let keep = keep % stack.layers().len();
        let mut flat = stack.layers()[..keep].to_vec();
        flat.push(stack.flatten(keep, tempfile().unwrap(), "flat").unwrap());
        let flat = LayerStack::new(flat).unwrap();
        flat.top().verify(1).unwrap();
        let mapped = GuestMemory::from_layers(&layout(), &flat).unwrap();
        prop_assert!(content(&mapped) == model, "flattened");
    }

    #[test]
    fn no_bytes_make_the_reader_panic(mut tail in proptest::collection::vec(any::<u8>(), 0..400)) {
        // Half of them get the right magic and version, to come further.
        if tail.len() > 130 && tail[0] & 1 == 0 {
            let at = tail.len() - 120;
            tail[at..at + 12].copy_from_slice(b"CLONELYR\x01\0\0\0");
        }
        let file = tempfile().unwrap();
        file.write_all_at(&tail, layout().size()).unwrap();
        prop_assert!(Layer::open(file, "random").is_err());
    }
}

#[test]
fn renewed_ram_is_zero_at_the_same_addresses_whatever_it_was() {
    let base = layer(None, &[(0, 1), (5, 2), (47, 9)]);
    let stack = LayerStack::new(vec![base]).unwrap();
    for memory in [
        GuestMemory::from_layers(&layout(), &stack).unwrap(),
        GuestMemory::anonymous(&layout()).unwrap(),
        GuestMemory::shared(&layout()).unwrap(),
    ] {
        fill(&memory, 7, 3);
        let view = memory.ram().clone();
        let renewed = memory.renewed().unwrap();
        assert_eq!(renewed.regions(), memory.regions());
        assert!(renewed.layers().is_none());
        assert!(content(&renewed).iter().all(|byte| *byte == 0));
        // Who had a view before sees what is written from now on.
        fill(&renewed, 5, 8);
        let address = GuestAddress(5 * PAGE_SIZE);
        assert_eq!(view.read_obj::<u8>(address).unwrap(), 8);
    }
    // Others that map the layer keep it.
    let sibling = GuestMemory::from_layers(&layout(), &stack).unwrap();
    assert_eq!(content(&sibling)[0], 1);
}
