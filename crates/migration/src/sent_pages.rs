//! Which content the destination has in which page, so that equal pages are sent once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// The most contents that are remembered: a few MiB of the VM process's own memory. The later ones
/// are sent as they are.
const MAX_CONTENTS: usize = 64 << 10;

/// The beginning of the BLAKE3 hash of a page's content.
type ContentHash = [u8; 16];

/// The contents that the destination has.
#[derive(Debug, Default)]
pub(crate) struct SentPages {
    /// A page in which the destination has the content.
    pages: HashMap<ContentHash, u64>,
    /// The contents of the pages in `pages`.
    contents: HashMap<u64, ContentHash>,
}

impl SentPages {
    /// Records that `page` gets this content, and returns another page that has it already.
    pub(crate) fn send(&mut self, page: u64, content: &[u8]) -> Option<u64> {
        let mut hash = ContentHash::default();
        hash.copy_from_slice(&blake3::hash(content).as_bytes()[..16]);
        if self.contents.get(&page) == Some(&hash) {
            return None;
        }
        self.forget(page);
        let room = self.pages.len() < MAX_CONTENTS;
        match self.pages.entry(hash) {
            Entry::Occupied(other) => Some(*other.get()),
            Entry::Vacant(place) => {
                if room {
                    place.insert(page);
                    self.contents.insert(page, hash);
                }
                None
            }
        }
    }

    /// Records that `page` gets another content.
    pub(crate) fn forget(&mut self, page: u64) {
        if let Some(former) = self.contents.remove(&page) {
            self.pages.remove(&former);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_stands_for_its_equals_as_long_as_it_has_the_content() {
        let (a, b) = ([1; 4096], [2; 4096]);
        let mut sent = SentPages::default();
        assert_eq!(sent.send(1, &a), None);
        assert_eq!(sent.send(2, &a), Some(1));
        // Again the same page with the same content: it is not its own equal.
        assert_eq!(sent.send(1, &a), None);
        assert_eq!(sent.send(1, &b), None);
        assert_eq!(sent.send(3, &a), None);
        assert_eq!(sent.send(4, &a), Some(3));
        sent.forget(3);
        assert_eq!(sent.send(5, &a), None);
        assert_eq!(sent.send(6, &b), Some(1));
    }
}
