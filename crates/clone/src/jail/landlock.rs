//! Landlock without a single rule: no path may be opened, no port used, no process outside of the
//! jail signalled, whatever namespaces would allow. What is open stays usable.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

use super::{JailError, failed};

/// The newest rights known here; older kernels leave out those they do not know.
const NEWEST: ABI = ABI::V6;

/// Takes every right away that Landlock knows of.
pub(super) fn forbid_everything() -> Result<(), JailError> {
    let status = restrict().map_err(|error| failed("take Landlock rights away")(io(error)))?;
    match status {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => {
            tracing::debug!("this host's Landlock is older than we know: some rights are left");
        }
        RulesetStatus::NotEnforced => tracing::debug!("this host has no Landlock"),
    }
    Ok(())
}

fn restrict() -> Result<RulesetStatus, RulesetError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    Ok(ruleset.restrict_self()?.ruleset)
}

fn io(error: RulesetError) -> std::io::Error {
    std::io::Error::other(error)
}
