//! Gives up the user id, all capabilities and the ways to regain them, and limits some resources.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::{JailError, Layer, failed};

/// The most open files of a VM. Vsock connections are the only kind that may number thousands.
const MAX_FILES: u64 = 16 << 10;

/// The start of the user ids of jailed processes, far from those of people and services. Each
/// process has its own, this number plus its process id, so no two VMs can reach each other as the
/// same user.
const FIRST_UID: u32 = 2_000_000_000;

/// Limits the host resources that the process can use. Both the soft and the hard limits are set,
/// so they cannot be raised again.
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
    // A core dump would contain the guest's memory.
    limit(Resource::Core, 0, "forbid core dumps")?;
    limit(Resource::Msgqueue, 0, "forbid message queues")
}

/// Drops every privilege for good. The jail layer that this returns is the user id, which only root
/// can change.
pub(super) fn drop_all() -> Result<Layer, JailError> {
    // Changing the user clears this signal, but until the VM is reported it must end with its
    // launcher.
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
    // The kernel refuses ids beyond its last capability as invalid.
    for id in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << id);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            // The process is neither root nor in a user namespace: it has no capability to bound,
            // and can gain none without new privileges.
            Err(Errno::PERM) if !rustix::process::geteuid().is_root() => break,
            Err(error) => return Err(failed("empty its capability bounding set")(error)),
        }
    }
    Ok(())
}

/// Sets and locks the securebits, so that user id 0 no longer implies any capability.
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

/// Changes to a user id that no other process has. Everything that the process needs is open
/// already.
fn become_nobody() -> Result<(), JailError> {
    let id = FIRST_UID + std::process::id();
    // The groups are changed first, since that needs a privilege which is lost with the user id.
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave its groups"))?;
    let gid = Gid::from_raw(id);
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change its group"))?;
    let uid = Uid::from_raw(id);
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change its user"))
}
