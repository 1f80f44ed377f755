//! What can be checked of a request for VMs before anything is done.

use army_api::vms::{CreateVms, MAX_SECONDS};
use army_node_api::validate;

use crate::{Error, ErrorKind, Result};

/// The most VMs of one request.
const MAX_COUNT: u32 = 1000;
/// The most bytes of the names and values of a request's environment together.
const MAX_ENVIRONMENT: usize = 64 << 10;

/// Checks what can be checked before anything is done.
pub(crate) fn check(details: &CreateVms) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidRequest, message));
    if !(1..=MAX_COUNT).contains(&details.count) {
        return invalid(format!(
            "`count` must be 1 to {MAX_COUNT}, not {}",
            details.count
        ));
    }
    let times = [details.ttl_s, details.idle.map(|idle| idle.after_s)];
    let is_invalid = |seconds: u64| !(1..=MAX_SECONDS).contains(&seconds);
    if times.into_iter().flatten().any(is_invalid) {
        return invalid(format!(
            "`ttl_s` and `idle.after_s` must be 1 to {MAX_SECONDS}"
        ));
    }
    if let Some(name) = &details.name
        && !clone_api::validate::is_valid_name(&format!("{name}-{}", details.count))
    {
        return invalid(format!("invalid VM name `{}`", name.escape_debug()));
    }
    if let Some(network) = &details.network {
        validate::egress(network)?;
    }
    let size = |(key, value): (&String, &String)| key.len() + value.len();
    if details.environment.iter().map(size).sum::<usize>() > MAX_ENVIRONMENT {
        return invalid(format!(
            "`environment` exceeds {MAX_ENVIRONMENT} bytes of names and values together"
        ));
    }
    for (key, value) in &details.environment {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return invalid(format!(
                "invalid environment variable `{}`",
                key.escape_debug()
            ));
        }
    }
    Ok(())
}
