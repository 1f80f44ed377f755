//! A Landlock ruleset without any rule: the process can open no path, use no port, and signal no
//! process outside of the jail, whatever its namespaces would allow. Open descriptors stay usable.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

use super::{JailError, Layer, failed};

/// The oldest version that counts as this layer: it restricts paths and TCP ports (Linux 6.7).
const NEEDED: ABI = ABI::V4;
/// The newest version whose rights are restricted; older kernels ignore the rights that they do not
/// know.
const NEWEST: ABI = ABI::V6;

/// Removes every right that Landlock can restrict.
pub(super) fn forbid_everything() -> Result<Layer, JailError> {
    let status = restrict().map_err(|error| failed("take Landlock rights away")(io(error)))?;
    Ok(match status {
        RulesetStatus::NotEnforced => {
            Err("this kernel has no Landlock, or `lsm=` on its command line leaves it out".into())
        }
        _ if has_needed() => Ok(()),
        _ => Err("this kernel's Landlock is too old to forbid TCP ports".into()),
    })
}

fn has_needed() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let ruleset = ruleset.handle_access(AccessFs::from_all(NEEDED));
    ruleset
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEEDED)))
        .is_ok()
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
