//! A Landlock ruleset with one rule: files below the shared directory.

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::{JailError, Layer, failed};

/// The newest version whose rights are restricted; older kernels ignore what they do not know.
const NEWEST: ABI = ABI::V6;

/// Leaves what a file server needs below `root`, and nothing else.
pub(super) fn allow_only(root: &OwnedFd, read_only: bool) -> Result<Layer, JailError> {
    let status = restrict(root, read_only)
        .map_err(|error| failed("take Landlock rights away")(std::io::Error::other(error)))?;
    Ok(match status {
        RulesetStatus::NotEnforced => Err(
            "landlock: this kernel has none, or `lsm=` on its command line leaves it out".into(),
        ),
        _ => Ok(()),
    })
}

fn restrict(root: &OwnedFd, read_only: bool) -> Result<RulesetStatus, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::MakeFifo
        | AccessFs::MakeSym
        | AccessFs::Refer;
    let allowed = if read_only { read } else { read | write };
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(root, allowed))?;
    Ok(ruleset.restrict_self()?.ruleset)
}
