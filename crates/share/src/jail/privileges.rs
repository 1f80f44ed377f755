//! Gives up all capabilities and the ways to regain them, becomes the directory's owner, and limits
//! resources.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::{JailError, Layer, failed};
use crate::handles::MAX_HANDLES;

/// The most open files: two for each handle, and the cache of nodes.
const MAX_FILES: u64 = 2 * MAX_HANDLES as u64 + 4096;

/// Limits the host resources that the process can use.
pub(super) fn limit_resources() -> Result<(), JailError> {
    let limit = |resource, most: u64, action| {
        let now = rustix::process::getrlimit(resource);
        let value = Some(now.maximum.unwrap_or(u64::MAX).min(most));
        let limit = Rlimit {
            current: value,
            maximum: value,
        };
        rustix::process::setrlimit(resource, limit).map_err(failed(action))
    };
    limit(Resource::Nofile, MAX_FILES, "limit open files")?;
    limit(Resource::Core, 0, "forbid core dumps")?;
    limit(Resource::Msgqueue, 0, "forbid message queues")
}

/// Drops every privilege for good, and becomes the user and group of `owner`, which only root can.
pub(super) fn drop_all(owner: (u32, u32)) -> Result<Layer, JailError> {
    rustix::thread::clear_ambient_capability_set()
        .map_err(failed("clear the ambient capabilities"))?;
    clear_bounding_set()?;
    let user = rustix::process::geteuid();
    let layer = match user.is_root() {
        true => {
            lock_root_out()?;
            become_owner(owner)?;
            Ok(())
        }
        false if owner.0 == user.as_raw() => Ok(()),
        false => Err(format!(
            "user: it was started by user {}, and the directory belongs to {}: it reaches what the \
             former may",
            user.as_raw(),
            owner.0
        )),
    };
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("drop its capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("give up gaining privileges"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("close its memory to others"))?;
    Ok(layer)
}

fn clear_bounding_set() -> Result<(), JailError> {
    // The kernel refuses ids beyond its last capability as invalid.
    for id in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << id);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(error) => return Err(failed("empty its capability bounding set")(error)),
        }
    }
    Ok(())
}

/// Sets and locks the securebits, so that user id 0 implies no capability: a directory may belong to
/// root.
fn lock_root_out() -> Result<(), JailError> {
    type Bits = CapabilitiesSecureBits;
    let bits = Bits::NO_ROOT
        | Bits::NO_ROOT_LOCKED
        | Bits::KEEP_CAPS_LOCKED
        | Bits::NO_CAP_AMBIENT_RAISE
        | Bits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits)
        .map_err(failed("take the meaning from user 0"))
}

fn become_owner((user, group): (u32, u32)) -> Result<(), JailError> {
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave its groups"))?;
    let gid = Gid::from_raw(group);
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change its group"))?;
    let uid = Uid::from_raw(user);
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change its user"))
}
