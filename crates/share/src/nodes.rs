//! The files and directories that the guest knows, by the numbers under which it knows them.
//!
//! A node is an identity and the place where it was last seen: a name in another node. The node's
//! descriptor, without access to content, is only a cache of bounded size: it is opened again,
//! step by step from the nearest known directory, and what is found must have the identity that the
//! node has. So the table can be saved, and a guest that knows a hundred thousand files costs no
//! hundred thousand descriptors. An object that somebody else has moved meanwhile is stale until the
//! guest looks it up again.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use clone_fuse::wire::ROOT_ID;
use rustix::fs::Statx;
use rustix::io::Errno;

use crate::steps::{self, Identity};

/// The most nodes.
pub(crate) const MAX_NODES: usize = 256 << 10;
/// The most descriptors of nodes that are kept open, besides those of nodes with handles.
const MAX_CACHED: usize = 1024;
/// The most steps from the root to an object; a path of Linux has fewer.
const MAX_DEPTH: usize = 2048;

/// A file or directory that the guest knows.
#[derive(Debug)]
pub(crate) struct Node {
    /// The directory that it was last seen in. The root has none.
    pub(crate) parent: Option<u64>,
    /// Its name there; empty for a file that never had one.
    pub(crate) name: Box<[u8]>,
    pub(crate) identity: Identity,
    /// The kind of the object, as in a mode.
    pub(crate) kind: u32,
    /// The lookup count: the number of replies that named the node to the guest, less those that the
    /// guest has forgotten.
    pub(crate) lookups: u64,
    /// The nodes that were last seen in this one.
    children: u32,
    /// The handles of the node, which keep its descriptor open.
    handles: u32,
    object: Option<Rc<OwnedFd>>,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Nodes {
    root: Rc<OwnedFd>,
    nodes: HashMap<u64, Node>,
    by_identity: HashMap<Identity, u64>,
    next: u64,
    /// The nodes whose descriptors were opened, the oldest first.
    cached: VecDeque<u64>,
    most: usize,
}

impl Nodes {
    /// A table that only has the root.
    pub(crate) fn new(root: Rc<OwnedFd>) -> Result<Self, Errno> {
        let attributes = steps::attributes_of(&root)?;
        let mut nodes = Self {
            root,
            nodes: HashMap::new(),
            by_identity: HashMap::new(),
            next: ROOT_ID + 1,
            cached: VecDeque::new(),
            most: MAX_NODES,
        };
        let identity = Identity::of(&attributes);
        nodes.by_identity.insert(identity, ROOT_ID);
        nodes.nodes.insert(
            ROOT_ID,
            Node {
                parent: None,
                name: Box::default(),
                identity,
                kind: steps::kind_of(&attributes),
                lookups: 1,
                children: 0,
                handles: 0,
                object: Some(Rc::clone(&nodes.root)),
            },
        );
        Ok(nodes)
    }

    /// Lowers the limit of nodes.
    #[cfg(test)]
    pub(crate) fn limit(&mut self, most: usize) {
        self.most = most;
    }

    /// The root's descriptor.
    pub(crate) fn root(&self) -> &Rc<OwnedFd> {
        &self.root
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The number of the next node.
    pub(crate) fn next_number(&self) -> u64 {
        self.next
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(number, node)| (*number, node))
    }

    /// The node, if the guest knows it.
    pub(crate) fn get(&self, number: u64) -> Result<&Node, Errno> {
        self.nodes.get(&number).ok_or(Errno::STALE)
    }

    /// The node's descriptor, which is good for names below it and for attributes, not for content.
    pub(crate) fn object(&mut self, number: u64) -> Result<Rc<OwnedFd>, Errno> {
        let mut steps_left = Vec::new();
        let mut at = number;
        let mut object = loop {
            let node = self.get(at)?;
            if let Some(object) = &node.object {
                break Rc::clone(object);
            }
            // Others can move directories such that remembered places form a circle.
            if steps_left.len() == MAX_DEPTH {
                return Err(Errno::STALE);
            }
            steps_left.push(at);
            at = node.parent.ok_or(Errno::STALE)?;
        };
        while let Some(number) = steps_left.pop() {
            let node = self.get(number)?;
            object = Rc::new(found(&object, node)?);
            self.cache(number, Rc::clone(&object));
        }
        Ok(object)
    }

    /// As [`Nodes::object`], for steps to names below the node. A directory that somebody has moved
    /// out of the share meanwhile is not the guest's any more.
    pub(crate) fn directory(&mut self, number: u64) -> Result<Rc<OwnedFd>, Errno> {
        let directory = self.object(number)?;
        if number != ROOT_ID {
            steps::check_connected(&directory)?;
        }
        Ok(directory)
    }

    /// The descriptor of the directory in which the node was last seen, and its name there.
    pub(crate) fn place(&mut self, number: u64) -> Result<(Rc<OwnedFd>, Box<[u8]>), Errno> {
        let node = self.get(number)?;
        let name = node.name.clone();
        let parent = node.parent.filter(|_| !name.is_empty());
        let directory = self.directory(parent.ok_or(Errno::STALE)?)?;
        Ok((directory, name))
    }

    /// Tells the guest of an object: returns its number, which is a new one if the guest does not
    /// know it. `parent` and `name` are where it was found.
    pub(crate) fn tell(
        &mut self,
        parent: u64,
        name: &[u8],
        object: OwnedFd,
        attributes: &Statx,
    ) -> Result<u64, Errno> {
        let identity = Identity::of(attributes);
        if let Some(&number) = self.by_identity.get(&identity) {
            self.moved(number, parent, name);
            if let Some(node) = self.nodes.get_mut(&number) {
                node.lookups = node.lookups.saturating_add(1);
            }
            return Ok(number);
        }
        if self.nodes.len() >= self.most {
            return Err(Errno::NFILE);
        }
        let number = self.next;
        self.next += 1;
        self.insert(
            number,
            Node {
                parent: Some(parent),
                name: name.into(),
                identity,
                kind: steps::kind_of(attributes),
                lookups: 1,
                children: 0,
                handles: 0,
                object: None,
            },
        );
        self.cache(number, Rc::new(object));
        Ok(number)
    }

    fn insert(&mut self, number: u64, node: Node) {
        if let Some(parent) = node.parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            parent.children += 1;
        }
        self.by_identity.insert(node.identity, number);
        self.nodes.insert(number, node);
    }

    /// Takes over a node of a saved table. Its object is looked for when it is needed.
    pub(crate) fn restore(
        &mut self,
        number: u64,
        (parent, name): (u64, Box<[u8]>),
        (identity, kind): (Identity, u32),
        lookups: u64,
    ) -> Result<(), Errno> {
        let is_new = !self.nodes.contains_key(&number) && number != 0;
        if !is_new || self.nodes.len() >= self.most {
            return Err(Errno::INVAL);
        }
        self.next = self.next.max(number.saturating_add(1));
        self.insert(
            number,
            Node {
                parent: Some(parent),
                name,
                identity,
                kind,
                lookups,
                children: 0,
                handles: 0,
                object: None,
            },
        );
        Ok(())
    }

    /// Counts the children of restored nodes, whose parents may have come after them.
    pub(crate) fn count_children(&mut self) {
        let parents: Vec<u64> = self.nodes.values().filter_map(|node| node.parent).collect();
        for node in self.nodes.values_mut() {
            node.children = 0;
        }
        for parent in parents {
            if let Some(parent) = self.nodes.get_mut(&parent) {
                parent.children += 1;
            }
        }
    }

    /// Sets the number of the next node, which the guest was never told.
    pub(crate) fn continue_at(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// The number of the node of the object with these attributes, if the guest knows it.
    pub(crate) fn known(&self, attributes: &Statx) -> Option<u64> {
        self.by_identity.get(&Identity::of(attributes)).copied()
    }

    /// Remembers where a node was seen.
    pub(crate) fn moved(&mut self, number: u64, parent: u64, name: &[u8]) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT_ID) else {
            return;
        };
        if *node.name != *name {
            node.name = name.into();
        }
        let former = node.parent.replace(parent);
        if former == Some(parent) {
            return;
        }
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children += 1;
        }
        if let Some(former) = former {
            self.lose_child(former);
        }
    }

    /// Lowers the node's lookup count by `count`, and removes the node if nothing needs it any more.
    pub(crate) fn forget(&mut self, number: u64, count: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(count);
            self.remove_unused(number);
        }
    }

    fn lose_child(&mut self, parent: u64) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
            self.remove_unused(parent);
        }
    }

    /// Removes a node that nothing needs, and then its parents.
    fn remove_unused(&mut self, number: u64) {
        let mut next = Some(number);
        while let Some(number) = next.filter(|number| *number != ROOT_ID) {
            let Some(node) = self.nodes.get(&number) else {
                return;
            };
            if node.lookups > 0 || node.children > 0 || node.handles > 0 {
                return;
            }
            if self.by_identity.get(&node.identity) == Some(&number) {
                self.by_identity.remove(&node.identity);
            }
            next = self.nodes.remove(&number).and_then(|node| node.parent);
            if let Some(parent) = next.and_then(|parent| self.nodes.get_mut(&parent)) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    /// A handle of the node was opened. `object` is its descriptor, if no other is known: without it
    /// a file that has no name any more could not be reached.
    pub(crate) fn opened(&mut self, number: u64, object: Option<Rc<OwnedFd>>) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.handles += 1;
            node.object = node.object.take().or(object);
        }
    }

    /// A handle of the node was closed.
    pub(crate) fn closed(&mut self, number: u64) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        node.handles = node.handles.saturating_sub(1);
        if node.handles == 0 && number != ROOT_ID {
            // It may be the handle's own descriptor, which must not stay open.
            node.object = None;
            self.remove_unused(number);
        }
    }

    fn cache(&mut self, number: u64, object: Rc<OwnedFd>) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        node.object = Some(object);
        self.cached.push_back(number);
        while self.cached.len() > MAX_CACHED {
            let oldest = self.cached.pop_front();
            let node = oldest.and_then(|oldest| self.nodes.get_mut(&oldest));
            if let Some(node) = node.filter(|node| node.handles == 0) {
                node.object = None;
            }
        }
    }
}

/// Finds the node's object below `directory`, where it was last seen.
fn found(directory: &OwnedFd, node: &Node) -> Result<OwnedFd, Errno> {
    if node.name.is_empty() {
        return Err(Errno::STALE);
    }
    let object = match steps::find(directory, &node.name) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP) => Err(Errno::STALE),
        found => found,
    }?;
    match Identity::of(&steps::attributes_of(&object)?) == node.identity {
        true => Ok(object),
        false => Err(Errno::STALE),
    }
}
