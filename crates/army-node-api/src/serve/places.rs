//! The places of connections: how many there are, and who has to make room.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, watch};

use super::Limits;

/// The connections of a server.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    state: Mutex<State>,
    count: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct State {
    addresses: HashMap<IpAddr, Address>,
    total: usize,
    arriving: usize,
    last_id: u64,
}

/// What one address has.
#[derive(Debug, Default)]
struct Address {
    connections: usize,
    /// The connections that have made no request yet, the oldest first.
    arriving: VecDeque<Arriving>,
}

#[derive(Debug)]
struct Arriving {
    id: u64,
    since: Instant,
    expelled: Arc<Notify>,
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    connections: Connections,
    address: IpAddr,
    id: u64,
    expelled: Arc<Notify>,
    established: AtomicBool,
}

impl Connections {
    pub(super) fn new(limits: Limits) -> Self {
        Self(Arc::new(Shared {
            limits,
            state: Mutex::default(),
            count: watch::channel(0).0,
        }))
    }

    /// The number of open connections, and of the WebSockets and streams that they have become.
    pub fn count(&self) -> usize {
        *self.0.count.borrow()
    }

    /// The most connections that may be open.
    pub fn limit(&self) -> usize {
        self.0.limits.connections
    }

    /// Completes when no connection is open.
    pub(super) async fn empty(&self) {
        let mut count = self.0.count.subscribe();
        // The sender is there as long as this value.
        let _ = count.wait_for(|count| *count == 0).await;
    }

    /// A place for a connection from `address`; `None` where there is no room.
    pub(super) fn admit(&self, address: IpAddr) -> Option<Place> {
        self.admit_at(address, Instant::now())
    }

    fn admit_at(&self, address: IpAddr, now: Instant) -> Option<Place> {
        let limits = &self.0.limits;
        let address = group(address);
        let mut state = self.lock();
        if let Some(entry) = state.addresses.get(&address)
            && entry.arriving.len() >= limits.arriving_per_address
            && let Some(oldest) = entry.arriving.front()
            && now.duration_since(oldest.since) >= limits.patience
        {
            state.expel_oldest(address);
        }
        if state.arriving >= limits.arriving {
            let addresses = state.addresses.iter();
            let crowded = addresses.max_by_key(|(_, entry)| entry.arriving.len());
            if let Some(crowded) = crowded.map(|(address, _)| *address) {
                state.expel_oldest(crowded);
            }
        }
        let of_address = state.addresses.get(&address).map_or(0, |it| it.connections);
        if state.total >= limits.connections || of_address >= limits.per_address {
            return None;
        }
        state.total += 1;
        state.arriving += 1;
        state.last_id += 1;
        let (id, expelled) = (state.last_id, Arc::new(Notify::new()));
        let entry = state.addresses.entry(address).or_default();
        entry.connections += 1;
        entry.arriving.push_back(Arriving {
            id,
            since: now,
            expelled: Arc::clone(&expelled),
        });
        self.0.count.send_replace(state.total);
        Some(Place {
            connections: self.clone(),
            address,
            id,
            expelled,
            established: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Tells the oldest arriving connection of an address to end.
    fn expel_oldest(&mut self, address: IpAddr) {
        let entry = self.addresses.get_mut(&address);
        if let Some(oldest) = entry.and_then(|entry| entry.arriving.pop_front()) {
            self.arriving -= 1;
            oldest.expelled.notify_one();
        }
    }

    /// Takes a connection from those that are arriving, if it is one of them.
    fn remove_arriving(&mut self, address: IpAddr, id: u64) {
        let Some(entry) = self.addresses.get_mut(&address) else {
            return;
        };
        if let Some(index) = entry.arriving.iter().position(|it| it.id == id) {
            entry.arriving.remove(index);
            self.arriving -= 1;
        }
    }
}

impl Place {
    /// The connection has made a request.
    pub(super) fn establish(&self) {
        if !self.established.swap(true, Ordering::Relaxed) {
            self.connections
                .lock()
                .remove_arriving(self.address, self.id);
        }
    }

    pub(super) fn is_established(&self) -> bool {
        self.established.load(Ordering::Relaxed)
    }

    /// Completes when the connection has to make room for others.
    pub(super) fn expelled(&self) -> impl Future<Output = ()> + Send + use<> {
        let expelled = Arc::clone(&self.expelled);
        async move { expelled.notified().await }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.connections.lock();
        state.remove_arriving(self.address, self.id);
        state.total -= 1;
        if let Some(entry) = state.addresses.get_mut(&self.address) {
            entry.connections -= 1;
            if entry.connections == 0 {
                state.addresses.remove(&self.address);
            }
        }
        self.connections.0.count.send_replace(state.total);
    }
}

/// The address that is counted: of IPv6 the network of 64 bits, which one host has for itself.
fn group(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn connections(limits: Limits) -> Connections {
        Connections::new(limits)
    }

    fn is_expelled(place: &Place) -> bool {
        place.expelled().now_or_never().is_some()
    }

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));
    const LIMITS: Limits = Limits {
        arriving_per_address: 2,
        arriving: 4,
        ..Limits::STRANGERS
    };

    #[test]
    fn an_address_with_too_many_silent_connections_loses_its_own_oldest() {
        let connections = connections(LIMITS);
        let other = connections.admit(THERE).unwrap();
        let silent: Vec<Place> = (0..2).map(|_| connections.admit(HERE).unwrap()).collect();
        let later = Instant::now() + LIMITS.patience;
        let next = connections.admit_at(HERE, later).unwrap();
        let expelled: Vec<bool> = silent.iter().map(is_expelled).collect();
        assert_eq!(expelled, [true, false]);
        assert!(!is_expelled(&other) && !is_expelled(&next));
    }

    #[test]
    fn a_burst_of_one_address_makes_room_for_others_at_once() {
        let connections = connections(LIMITS);
        let burst: Vec<Place> = (0..4).map(|_| connections.admit(HERE).unwrap()).collect();
        assert!(!burst.iter().any(is_expelled), "a burst is not silence");
        let other = connections.admit(THERE).unwrap();
        assert!(is_expelled(&burst[0]) && !is_expelled(&other));
    }

    #[test]
    fn established_connections_stay_and_are_limited_by_address_and_in_total() {
        let limits = Limits {
            connections: 3,
            per_address: 2,
            ..LIMITS
        };
        let connections = connections(limits);
        let here: Vec<Place> = (0..2).map(|_| connections.admit(HERE).unwrap()).collect();
        for place in &here {
            place.establish();
        }
        let later = Instant::now() + LIMITS.patience;
        assert!(connections.admit_at(HERE, later).is_none());
        let there = connections.admit(THERE).unwrap();
        assert!(connections.admit(THERE).is_none(), "three in total");
        assert!(!here.iter().any(is_expelled));
        assert_eq!(connections.count(), 3);
        drop((here, there));
        connections.empty().now_or_never().unwrap();
        assert!(connections.lock().addresses.is_empty());
    }

    #[test]
    fn a_network_of_64_bits_is_one_address() {
        let group = |text: &str| group(text.parse().unwrap());
        assert_eq!(group("2001:db8::1"), group("2001:db8::ffff:0:0:2"));
        assert_ne!(group("2001:db8::1"), group("2001:db8:0:1::1"));
        assert_eq!(group("::ffff:192.0.2.1"), HERE);
    }
}
