//! Where the making of a template may fail or die, for tests to do so at each place.

use clone_start::error::Result;

/// Told at each step of making a template. Does nothing but in tests.
#[cfg(not(test))]
pub(super) fn step(_name: &str) -> Result<()> {
    Ok(())
}

#[cfg(test)]
pub(super) use in_tests::{Fault, inject, step};

#[cfg(test)]
mod in_tests {
    use std::cell::Cell;

    use clone_api::{ApiError, ErrorCode};

    use super::Result;

    /// What happens at a step.
    #[derive(Clone, Copy)]
    pub(crate) enum Fault {
        /// It fails, as on a full disk.
        Error,
        /// The process ends on the spot.
        Death,
    }

    thread_local! {
        /// The fault to come in this thread, and how many steps are left until then.
        static PLAN: Cell<Option<(Fault, u32)>> = const { Cell::new(None) };
    }

    /// Lets `fault` happen once in this thread, after so many steps.
    pub(crate) fn inject(fault: Fault, after: u32) {
        PLAN.set(Some((fault, after)));
    }

    pub(crate) fn step(name: &str) -> Result<()> {
        match PLAN.take() {
            Some((Fault::Error, 0)) => {
                let message = format!("a fault was injected {name}");
                Err(ApiError::new(ErrorCode::Internal, message))
            }
            Some((Fault::Death, 0)) => std::process::abort(),
            Some((fault, left)) => {
                PLAN.set(Some((fault, left - 1)));
                Ok(())
            }
            None => Ok(()),
        }
    }
}
