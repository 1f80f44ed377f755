//! The budget of memory for output that waits for its reader, for each tenant and for the server.
//!
//! A [`Reservation`] grows with what is kept, so a large limit of one response costs nothing until
//! there is that much output.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use army_api::{Problem, ProblemKind};
use axum::body::Bytes;
use tokio::sync::Notify;

/// When a request that found no room is worth repeating, in seconds.
const RETRY_S: u32 = 5;

/// How many bytes may be kept at a time.
#[derive(Debug, Clone, Copy)]
pub struct BufferLimits {
    /// The most bytes of one tenant.
    pub per_tenant: usize,
    /// The most bytes of the server.
    pub total: usize,
}

impl Default for BufferLimits {
    fn default() -> Self {
        Self {
            per_tenant: 256 << 20,
            total: 1 << 30,
        }
    }
}

/// The budget of a server.
#[derive(Clone)]
pub(super) struct Budget(Arc<Shared>);

struct Shared {
    limits: BufferLimits,
    used: Mutex<Used>,
    /// Notified when bytes are given back.
    freed: Notify,
}

#[derive(Default)]
struct Used {
    total: usize,
    tenants: HashMap<String, usize>,
}

/// Bytes of the budget, until they are dropped.
pub(super) struct Reservation {
    budget: Budget,
    tenant: String,
    bytes: usize,
}

impl Budget {
    pub(super) fn new(limits: BufferLimits) -> Self {
        Self(Arc::new(Shared {
            limits,
            used: Mutex::default(),
            freed: Notify::new(),
        }))
    }

    /// A reservation of nothing yet.
    pub(super) fn reservation(&self, tenant: &str) -> Reservation {
        Reservation {
            budget: self.clone(),
            tenant: tenant.to_owned(),
            bytes: 0,
        }
    }

    /// Lets `data` count until it is dropped, as soon as there is room for it. So a tenant whose
    /// clients read slowly makes its own guests wait.
    pub(super) async fn count(&self, tenant: &str, data: Vec<u8>) -> Bytes {
        let mut reservation = self.reservation(tenant);
        let wanted = data
            .len()
            .min(self.0.limits.per_tenant.min(self.0.limits.total));
        loop {
            let mut freed = std::pin::pin!(self.0.freed.notified());
            // What is given back from now on is noticed.
            freed.as_mut().enable();
            if reservation.grow_whole(wanted) {
                return Bytes::from_owner(Counted {
                    data,
                    _reservation: reservation,
                });
            }
            freed.await;
        }
    }

    /// Reserves all of `bytes` for something that begins.
    ///
    /// # Errors
    /// [`ProblemKind::Busy`] where there is no room.
    pub(super) fn reserve(&self, tenant: &str, bytes: usize) -> Result<Reservation, Problem> {
        let mut reservation = self.reservation(tenant);
        if reservation.grow_whole(bytes) {
            return Ok(reservation);
        }
        let used = self.lock().tenants.get(tenant).copied().unwrap_or(0);
        let [of_tenant, of_server] = self.limits();
        let (name, limit) = match used + bytes > of_tenant.1 {
            true => of_tenant,
            false => of_server,
        };
        let detail = format!(
            "the memory for data in transit is used up: the limit `{name}` is {limit} bytes"
        );
        Err(Problem::new(ProblemKind::Busy, detail)
            .retry_after(RETRY_S)
            .limited_by(name, limit as u64))
    }

    /// The bytes that are reserved at present.
    pub(super) fn used(&self) -> usize {
        self.lock().total
    }

    /// The limits by their names.
    pub(super) fn limits(&self) -> [(&'static str, usize); 2] {
        let limits = &self.0.limits;
        [
            ("buffer_bytes_per_tenant", limits.per_tenant),
            ("buffer_bytes", limits.total),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, Used> {
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// Reserves up to `bytes` more, and returns how many.
    pub(super) fn grow(&mut self, bytes: usize) -> usize {
        let limits = &self.budget.0.limits;
        let mut used = self.budget.lock();
        let of_tenant = used.tenants.get(&self.tenant).copied().unwrap_or(0);
        let room = (limits.total - used.total).min(limits.per_tenant.saturating_sub(of_tenant));
        let granted = bytes.min(room);
        if granted > 0 {
            used.total += granted;
            *used.tenants.entry(self.tenant.clone()).or_default() += granted;
            self.bytes += granted;
        }
        granted
    }

    /// Reserves `bytes` more, or none.
    fn grow_whole(&mut self, bytes: usize) -> bool {
        let before = self.bytes;
        let granted = self.grow(bytes);
        if granted < bytes {
            self.give_back(granted);
            debug_assert_eq!(self.bytes, before);
        }
        granted == bytes
    }

    fn give_back(&mut self, bytes: usize) {
        let mut used = self.budget.lock();
        used.total -= bytes;
        self.bytes -= bytes;
        if let Some(of_tenant) = used.tenants.get_mut(&self.tenant) {
            *of_tenant -= bytes;
            if *of_tenant == 0 {
                used.tenants.remove(&self.tenant);
            }
        }
    }
}

/// Data that counts until it is dropped.
struct Counted {
    data: Vec<u8>,
    _reservation: Reservation,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.give_back(self.bytes);
            self.budget.0.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_tenant_gets_its_part_the_server_has_a_limit_and_what_is_dropped_is_free_again() {
        let budget = Budget::new(BufferLimits {
            per_tenant: 10,
            total: 15,
        });
        let mut red = budget.reservation("red");
        assert_eq!((red.grow(7), red.grow(7)), (7, 3));
        let mut other_red = budget.reservation("red");
        assert_eq!(other_red.grow(1), 0);
        let mut blue = budget.reservation("blue");
        assert_eq!(blue.grow(10), 5, "what the server has left");
        drop(red);
        assert_eq!((other_red.grow(20), budget.used()), (10, 15));
        drop((other_red, blue));
        assert_eq!(budget.used(), 0);
        assert!(budget.lock().tenants.is_empty());
    }

    #[tokio::test]
    async fn data_waits_until_earlier_data_of_its_tenant_was_taken() {
        let budget = Budget::new(BufferLimits {
            per_tenant: 10,
            total: 100,
        });
        let first = budget.count("red", vec![1; 8]).await;
        let mut second = std::pin::pin!(budget.count("red", vec![2; 8]));
        assert!(second.as_mut().now_or_never().is_none());
        assert_eq!(budget.count("blue", vec![3; 8]).await.len(), 8);
        let refused = budget.reserve("red", 8).map(drop).unwrap_err();
        let limit = refused.limit.unwrap();
        assert_eq!(
            (limit.name.as_str(), limit.value),
            ("buffer_bytes_per_tenant", 10)
        );
        drop(first);
        assert_eq!(&second.await[..], [2; 8]);
        // A piece that is larger than the whole budget passes alone.
        assert_eq!(budget.count("red", vec![4; 50]).await.len(), 50);
    }
}
