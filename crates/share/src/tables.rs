//! The saved form of what a server knows of its guest: nodes and handles, by which the server of a
//! fork, of a resumed VM or of a rewound one goes on.
//!
//! The bytes may come from another host. A place is a name below another node, never a path. Objects
//! are looked for when the guest uses them, must have the identity that they had, and are stale
//! otherwise. Where a file system has no times of birth, another object could have the identity of
//! one that was removed, so everything but the root is stale there.

use std::collections::HashSet;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use clone_fuse::link::MAX_TABLES;
use clone_fuse::wire::{Name, ROOT_ID};

use crate::handles::{Handles, open_flags};
use crate::nodes::Nodes;
use crate::steps::{Identity, KIND};

/// No server ever counts as far.
const MAX_NUMBER: u64 = 1 << 62;

/// The saved form. New versions are added, old ones are never changed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SavedTables {
    /// The first version.
    V1(Tables),
}

/// All nodes but the root, and all handles.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tables {
    next_node: u64,
    next_handle: u64,
    nodes: Vec<SavedNode>,
    handles: Vec<SavedHandle>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNode {
    number: u64,
    parent: u64,
    name: Vec<u8>,
    identity: Identity,
    kind: u32,
    lookups: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedHandle {
    number: u64,
    node: u64,
    flags: u32,
}

/// Encodes the tables. If the guest knows more files than fit, those that are not open are left out:
/// they are stale, and the guest looks them up again by their paths.
pub(crate) fn save(nodes: &Nodes, handles: &Handles) -> Result<Vec<u8>, Errno> {
    let saved_nodes = nodes.iter().filter_map(|(number, node)| {
        Some(SavedNode {
            number,
            parent: node.parent?,
            name: node.name.to_vec(),
            identity: node.identity,
            kind: node.kind,
            lookups: node.lookups,
        })
    });
    let mut tables = Tables {
        next_node: nodes.next_number(),
        next_handle: handles.next_number(),
        nodes: saved_nodes.collect(),
        handles: handles
            .iter()
            .map(|(number, handle)| SavedHandle {
                number,
                node: handle.node,
                flags: handle.flags.bits(),
            })
            .collect(),
    };
    // The same tables give the same bytes.
    tables.nodes.sort_unstable_by_key(|node| node.number);
    tables.handles.sort_unstable_by_key(|handle| handle.number);
    let mut saved = SavedTables::V1(tables);
    let bytes = encode(&saved)?;
    if bytes.len() <= MAX_TABLES {
        return Ok(bytes);
    }
    let SavedTables::V1(tables) = &mut saved;
    let open: HashSet<u64> = tables.handles.iter().map(|handle| handle.node).collect();
    tables
        .nodes
        .retain(|node| node.kind == libc::S_IFDIR || open.contains(&node.number));
    match encode(&saved)? {
        bytes if bytes.len() <= MAX_TABLES => Ok(bytes),
        _ => Err(Errno::FBIG),
    }
}

fn encode(saved: &SavedTables) -> Result<Vec<u8>, Errno> {
    postcard::to_stdvec(saved).map_err(|_| Errno::NOMEM)
}

/// Builds tables below the root of `former` from saved ones.
pub(crate) fn restore(bytes: &[u8], former: &Nodes) -> Result<(Nodes, Handles), Errno> {
    let (SavedTables::V1(saved), rest) =
        postcard::take_from_bytes(bytes).map_err(|_| Errno::INVAL)?;
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let mut nodes = Nodes::new(former.root().clone())?;
    let mut handles = Handles::default();
    for node in saved.nodes {
        if !node.name.is_empty() {
            Name::new(&node.name)?;
        }
        if !(ROOT_ID + 1..MAX_NUMBER).contains(&node.number) || node.kind & !KIND != 0 {
            return Err(Errno::INVAL);
        }
        // An object without a name is reached by nobody, and so is one that cannot be recognised.
        let is_found = node.identity.is_lasting();
        let name = if is_found { node.name } else { Vec::new() };
        nodes.restore(
            node.number,
            (node.parent, name.into()),
            (node.identity, node.kind),
            node.lookups,
        )?;
    }
    if saved.next_node >= MAX_NUMBER || saved.next_handle >= MAX_NUMBER {
        return Err(Errno::INVAL);
    }
    nodes.count_children();
    for handle in saved.handles {
        let flags = OFlags::from_bits_retain(handle.flags);
        if open_flags(handle.flags) != flags || handle.number >= MAX_NUMBER {
            return Err(Errno::INVAL);
        }
        handles.restore(&mut nodes, handle.number, (handle.node, flags))?;
    }
    nodes.continue_at(saved.next_node);
    handles.continue_at(saved.next_handle);
    Ok((nodes, handles))
}
