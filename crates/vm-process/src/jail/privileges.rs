//! Giving up the user, all capabilities, the ways to regain them, and the size of some resources.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::{JailError, Layer, failed};

/// Open files a VM may have: vsock connections are what there may be thousands of.
const MAX_FILES: u64 = 16 << 10;

/// Where the user ids of jailed processes begin, far from those of people and services. Each has
/// its own, which is its process id above this: no two VMs can reach each other as the same user.
const FIRST_UID: u32 = 2_000_000_000;

/// Limits what the process can take from the host; both values of each limit, for good.
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
    // A dump would hold the guest's memory.
    limit(Resource::Core, 0, "forbid core dumps")?;
    limit(Resource::Msgqueue, 0, "forbid message queues")
}

/// Takes every privilege away, for good. The layer is the user id: only root can change it.
pub(super) fn drop_all() -> Result<Layer, JailError> {
    // Changing the user clears it, and until the VM is reported it must end with its launcher.
    let death = rustix::process::parent_process_death_signal()
        .map_err(failed("read the signal of its launcher's death"))?;
    rustix::thread::clear_ambient_capability_set()
        .map_err(failed("clear the ambient capabilities"))?;
    clear_bounding_set()?;
    let user = rustix::process::geteuid();
    if user.is_root() {
        lock_root_out()?;
        become_nobody()?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("drop its capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("give up gaining privileges"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("close its memory to others"))?;
    rustix::process::set_parent_process_death_signal(death)
        .map_err(failed("keep the signal of its launcher's death"))?;
    Ok(match user.is_root() {
        true => Ok(()),
        false => Err(format!(
            "it was started by user {user}, whose id it keeps; start it as root"
        )),
    })
}

fn clear_bounding_set() -> Result<(), JailError> {
    // Ids beyond the kernel's last are refused as invalid.
    for id in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << id);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            // Neither root nor in a user namespace: there is no capability to bound, and without
            // new privileges none will come.
            Err(Errno::PERM) if !rustix::process::geteuid().is_root() => break,
            Err(error) => return Err(failed("empty its capability bounding set")(error)),
        }
    }
    Ok(())
}

/// Being user 0 shall mean nothing any more.
fn lock_root_out() -> Result<(), JailError> {
    type Bits = CapabilitiesSecureBits;
    let bits = Bits::NO_ROOT
        | Bits::NO_ROOT_LOCKED
        | Bits::KEEP_CAPS_LOCKED
        | Bits::NO_CAP_AMBIENT_RAISE
        | Bits::NO_CAP_AMBIENT_RAISE_LOCKED;
    match rustix::thread::set_capabilities_secure_bits(bits) {
        Ok(()) => Ok(()),
        Err(error) => Err(failed("take the meaning from user 0")(error)),
    }
}

/// Becomes a user that no one else is. Everything it works with is open already.
fn become_nobody() -> Result<(), JailError> {
    let id = FIRST_UID + std::process::id();
    // In this order: changing groups needs a privilege that goes with the user.
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave its groups"))?;
    let gid = Gid::from_raw(id);
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change its group"))?;
    let uid = Uid::from_raw(id);
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change its user"))
}
