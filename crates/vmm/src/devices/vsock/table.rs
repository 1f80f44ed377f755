//! The connections of a device: found by their ports or by the token of their socket's events in
//! constant time, limited in number and in the memory that all of them together may buffer.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::connection::{Connection, Ports, Wait};
use std::time::Instant;

/// Set in every connection's token, so that other tokens can stay below it.
const TOKEN_BIT: u32 = 1 << 30;
/// The bits of a token that name the slot. Those between them and [`TOKEN_BIT`] count the slot's
/// reuse, so that a late event of a closed socket finds no connection.
const SLOT_BITS: u32 = 16;
const GENERATIONS: u32 = 1 << (30 - SLOT_BITS);

/// The most connections that any limit may allow.
pub(super) const MAX_CONNECTIONS: usize = 1 << SLOT_BITS;
/// The buffer that even the last connection gets, in bytes.
pub(super) const MIN_BUFFER: u32 = 4 << 10;
/// The buffer that a connection gets while there is enough memory, in bytes.
const MAX_BUFFER: u32 = 256 << 10;
/// A connection gets at most this fraction of the memory that is left beyond all minimum buffers.
const SHARE: u64 = 32;

/// A connection in the table, with the time at which its timeout ends.
pub(super) struct Member {
    pub(super) connection: Connection,
    pub(super) deadline: Option<(Wait, Instant)>,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    member: Option<Member>,
}

/// The connections of a device; see the module.
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, u32>,
    max_connections: usize,
    max_buffered: u64,
    granted: u64,
}

impl Table {
    /// A table for at most `max_connections` that buffer at most `max_buffered` bytes in all (or
    /// the minimum for each, where that is more).
    pub(super) fn new(max_connections: usize, max_buffered: u64) -> Self {
        let max_connections = max_connections.clamp(1, MAX_CONNECTIONS);
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            max_connections,
            max_buffered: max_buffered.max(max_connections as u64 * u64::from(MIN_BUFFER)),
            granted: 0,
        }
    }

    /// The number of connections.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The buffer that the next connection would get; `None` when the table is full.
    pub(super) fn next_grant(&self) -> Option<u32> {
        let others = (self.max_connections - self.len()).checked_sub(1)?;
        let reserved = (others as u64 + 1) * u64::from(MIN_BUFFER);
        let spare = (self.max_buffered - self.granted).saturating_sub(reserved);
        let extra = (spare / SHARE).min(u64::from(MAX_BUFFER - MIN_BUFFER));
        Some(MIN_BUFFER + extra as u32)
    }

    /// Adds a connection and returns its token. Call only after [`Table::next_grant`].
    pub(super) fn insert(&mut self, connection: Connection) -> u32 {
        self.granted += u64::from(connection.buf_alloc());
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        let entry = &mut self.slots[slot as usize];
        entry.member = Some(Member {
            connection,
            deadline: None,
        });
        TOKEN_BIT | entry.generation << SLOT_BITS | slot
    }

    /// Makes the connection of `token` findable by `ports`; `false` where they are taken.
    pub(super) fn bind(&mut self, token: u32, ports: Ports) -> bool {
        match self.by_ports.entry(ports) {
            Entry::Occupied(_) => false,
            Entry::Vacant(vacant) => {
                vacant.insert(token);
                true
            }
        }
    }

    /// Frees the ports of the connection of `token` for another.
    pub(super) fn unbind(&mut self, token: u32, ports: Ports) {
        if self.by_ports.get(&ports) == Some(&token) {
            self.by_ports.remove(&ports);
        }
    }

    /// The token of the connection between `ports`.
    pub(super) fn find(&self, ports: Ports) -> Option<u32> {
        self.by_ports.get(&ports).copied()
    }

    /// The connection of `token`, unless it is gone.
    pub(super) fn get_mut(&mut self, token: u32) -> Option<&mut Member> {
        let slot = self
            .slots
            .get_mut((token & (MAX_CONNECTIONS as u32 - 1)) as usize)?;
        if (token & !TOKEN_BIT) >> SLOT_BITS != slot.generation {
            return None;
        }
        slot.member.as_mut()
    }

    /// Removes the connection of `token`.
    pub(super) fn remove(&mut self, token: u32) -> Option<Member> {
        self.get_mut(token)?;
        let index = token & (MAX_CONNECTIONS as u32 - 1);
        let slot = &mut self.slots[index as usize];
        let member = slot.member.take()?;
        slot.generation = (slot.generation + 1) % GENERATIONS;
        self.free.push(index);
        self.granted -= u64::from(member.connection.buf_alloc());
        self.unbind(token, member.connection.ports);
        Some(member)
    }

    /// The tokens of all connections.
    pub(super) fn tokens(&self) -> Vec<u32> {
        let live = |(index, slot): (usize, &Slot)| {
            slot.member.as_ref()?;
            Some(TOKEN_BIT | slot.generation << SLOT_BITS | index as u32)
        };
        self.slots.iter().enumerate().filter_map(live).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn connection(table: &Table) -> Connection {
        let (stream, _) = UnixStream::pair().unwrap();
        Connection::from_host(stream, table.next_grant().unwrap())
    }

    #[test]
    fn a_token_finds_nobody_once_its_connection_is_gone() {
        let mut table = Table::new(4, 0);
        let first = table.insert(connection(&table));
        assert!(table.remove(first).is_some());
        let second = table.insert(connection(&table));
        assert_ne!(first, second);
        assert!(table.get_mut(first).is_none());
        assert!(table.remove(first).is_none());
        assert!(table.get_mut(second).is_some());
    }

    #[test]
    fn grants_never_exceed_the_total_and_leave_something_for_everybody() {
        let total = 4 << 20;
        let mut table = Table::new(400, total);
        let mut granted = 0;
        let mut tokens = Vec::new();
        while let Some(grant) = table.next_grant() {
            assert!(grant >= MIN_BUFFER);
            granted += u64::from(grant);
            tokens.push(table.insert(connection(&table)));
        }
        assert_eq!(tokens.len(), 400);
        assert!(granted <= total);
        for token in tokens {
            table.remove(token);
        }
        assert_eq!((table.len(), table.granted), (0, 0));
    }
}
