//! What a call carries beside its request, and how a node tells an old controller from a new one.
//!
//! At any time one controller owns a host: it has the host's reports, and decides about its VMs.
//! Each change of the owner gives the host a greater epoch, and each call carries the epoch that its
//! controller knows. A node refuses calls with an epoch older than it has seen, so that a controller
//! that does not know that it was replaced changes nothing.

use std::sync::{Mutex, PoisonError};

use crate::{Deadline, Error, ErrorKind, Result};

/// What every call of the contract carries beside its request.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Until when the call must be answered.
    pub deadline: Deadline,
    /// The host's epoch, as the caller knows it; 0 where the caller knows none.
    pub epoch: u64,
}

impl Call {
    /// The same call in this epoch of the host.
    #[must_use]
    pub fn in_epoch(self, epoch: u64) -> Self {
        Self { epoch, ..self }
    }
}

impl From<Deadline> for Call {
    /// A call without an epoch.
    fn from(deadline: Deadline) -> Self {
        Self { deadline, epoch: 0 }
    }
}

/// The greatest epoch that a node has seen.
pub struct Fence {
    /// Held while a greater epoch is recorded, so that it is recorded before it takes effect.
    highest: Mutex<u64>,
}

impl Fence {
    /// A fence that has seen `highest`.
    pub fn new(highest: u64) -> Self {
        Self {
            highest: Mutex::new(highest),
        }
    }

    /// Admits a call in `epoch`. A greater epoch than the fence has seen is recorded by `record`
    /// first, so that it is known after a restart of the node.
    ///
    /// # Errors
    /// [`ErrorKind::StaleEpoch`] where a greater epoch was seen, and the error of `record`.
    pub fn admit(&self, epoch: u64, record: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch < *highest {
            let message = format!(
                "the call is of the host's epoch {epoch}, and the host is in epoch {highest}: \
                 another controller has taken it over"
            );
            return Err(Error::new(ErrorKind::StaleEpoch, message));
        }
        if epoch > *highest {
            record(epoch)?;
            *highest = epoch;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_recorded_before_it_takes_effect_and_an_older_one_is_refused() {
        let fence = Fence::new(2);
        let nothing = |_| panic!("nothing is new");
        fence.admit(2, nothing).unwrap();
        assert_eq!(
            fence.admit(1, nothing).unwrap_err().kind,
            ErrorKind::StaleEpoch
        );
        let full = || Error::new(ErrorKind::Internal, "the disk is full");
        fence.admit(5, |_| Err(full())).unwrap_err();
        fence.admit(3, |_| Ok(())).unwrap();
        assert_eq!(
            fence.admit(2, nothing).unwrap_err().kind,
            ErrorKind::StaleEpoch
        );
    }
}
