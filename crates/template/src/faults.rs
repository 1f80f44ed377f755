//! The steps at which making a template may fail or die, where tests inject faults.

use clone_start::error::Result;

/// Called at each step of making a template. Does nothing outside of tests.
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

    /// The fault at a step.
    #[derive(Clone, Copy)]
    pub(crate) enum Fault {
        /// The step fails, as on a full disk.
        Error,
        /// The process ends immediately.
        Death,
    }

    thread_local! {
        /// The next fault in this thread, and the number of steps until then.
        static PLAN: Cell<Option<(Fault, u32)>> = const { Cell::new(None) };
    }

    /// Injects `fault` once in this thread, after `after` steps.
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
